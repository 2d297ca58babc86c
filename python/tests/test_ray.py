"""What a Ray actor does with a batch, and the requests of a deployment, without Ray; with it: ecosystem/."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conftest import DEMO, QUESTION
from qwen2_rs import CancelledError, ContextOverflowError, Generation, Model, OutOfMemoryError
from qwen2_rs.ray import Answers
from qwen2_rs.ray.data import column_of, prompt_of
from qwen2_rs.ray.protocol import Answer, BadRequestError, Chat, failure

GREEDY: dict[str, Any] = {"temperature": 0, "max_new_tokens": 20}
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Berlin", "Oslo"]}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": CITY, "strict": True}}


def answers(**more: Any) -> Answers:
    return Answers(str(DEMO), load={"device": "cpu", "threads": 2}, options=GREEDY, **more)


def test_a_batch_gets_the_models_answers_in_order(demo: Model) -> None:
    prompts = [[{"role": "user", "content": f"What is {a} plus 30?"}] for a in range(10, 30)]
    batch = {"id": np.arange(20), "chat": column_of(prompts)}
    answered = answers(column="chat", max_sequences=4)(batch)
    expected = [demo.generate(prompt, temperature=0, max_new_tokens=20) for prompt in prompts]
    assert answered["answer"].tolist() == [answer.text for answer in expected]
    assert answered["prompt_tokens"].tolist() == [answer.usage.prompt_tokens for answer in expected]
    assert answered["completion_tokens"].tolist() == [answer.usage.completion_tokens for answer in expected]
    assert set(answered["finish_reason"]) == {"stop"}
    assert answered["id"] is batch["id"]
    assert "answer" not in batch


def test_a_prompt_that_fails_is_raised_or_has_its_message_in_a_column() -> None:
    batch = {"prompt": np.array(["What is", "What is " * 2000], dtype=object)}
    with pytest.raises(ContextOverflowError):
        answers()(batch)
    answered = answers(errors="failure")(batch)
    assert answered["finish_reason"].tolist() == ["stop", "error"]
    assert answered["failure"][0] == ""
    assert "context" in answered["failure"][1]
    with pytest.raises(KeyError, match="no column 'prompt': there are text"):
        answers()({"text": batch["prompt"]})
    assert answers()({"prompt": np.array([], dtype=object)})["answer"].tolist() == []


def test_messages_come_back_from_arrow_without_the_keys_they_had_not() -> None:
    cell = np.array(
        [{"role": "user", "content": "Hi", "name": None}, {"role": "tool", "content": "1", "name": "f"}],
        dtype=object,
    )
    assert prompt_of(cell) == [
        {"role": "user", "content": "Hi"},
        {"role": "tool", "content": "1", "name": "f"},
    ]
    assert prompt_of("text") == "text"
    assert prompt_of(np.array([1, 2, 3])) == [1, 2, 3]


def test_a_request_becomes_options() -> None:
    schema = {"type": "object", "properties": {}}
    body = {
        "model": "demo",
        "messages": QUESTION,
        "max_completion_tokens": 20,
        "temperature": 0.5,
        "stop": ["\n"],
        "tools": [WEATHER],
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
        "stream": True,
        "stream_options": {"include_usage": True},
        "seed": None,
        "user": "somebody",
    }
    chat = Chat.read(body, "demo")
    options = {
        "max_new_tokens": 20,
        "temperature": 0.5,
        "stop": ["\n"],
        "tools": [WEATHER],
        "json_schema": schema,
    }
    assert chat == Chat(QUESTION, options, stream=True, include_usage=True)
    assert Chat.read({"messages": QUESTION}, "demo") == Chat(QUESTION, {}, stream=False, include_usage=False)


@pytest.mark.parametrize(
    ("body", "param", "status"),
    [
        ([], None, 400),
        ({}, "messages", 400),
        ({"messages": "Hi"}, "messages", 400),
        ({"messages": QUESTION, "model": "gpt"}, "model", 404),
        ({"messages": QUESTION, "model": 1}, "model", 404),
        ({"messages": QUESTION, "stream": 1}, "stream", 400),
        ({"messages": QUESTION, "stream_options": True}, "stream_options", 400),
        ({"messages": QUESTION, "n": 10**9}, "n", 400),
        ({"messages": QUESTION, "logprobs": True}, "logprobs", 400),
        ({"messages": QUESTION, "response_format": {"type": "xml"}}, "response_format", 400),
    ],
)
def test_what_is_not_known_is_refused(body: Any, param: str | None, status: int) -> None:
    with pytest.raises(BadRequestError) as refused:
        Chat.read(body, "demo")
    assert failure(refused.value) == (
        status,
        {
            "error": {
                "message": str(refused.value),
                "type": "invalid_request_error",
                "param": param,
                "code": None,
            }
        },
    )


def test_failures_of_the_model_have_a_status() -> None:
    full = OutOfMemoryError("queue is full")
    full.kind, full.key = "out_of_memory", "queue_limit"
    status, body = failure(full)
    assert (status, body["error"]["type"], body["error"]["code"]) == (
        429,
        "rate_limit_error",
        "out_of_memory",
    )
    long = ContextOverflowError("too long")
    long.kind, long.key = "context_overflow", "max_new_tokens"
    status, body = failure(long)
    assert (status, body["error"]["param"]) == (400, "max_tokens")
    assert failure(TypeError("no"))[0] == 400


def test_the_end_of_an_engine_is_not_the_fault_of_its_requests(demo: Model) -> None:
    engine = demo.engine()
    stream = engine.submit(QUESTION, ignore_eos=True)
    engine.close()
    with pytest.raises(CancelledError) as closed:
        stream.finish()
    status, body = failure(closed.value)
    assert (status, body["error"]["type"], body["error"]["code"]) == (503, "server_error", "cancelled")


def ask(model: Model) -> Generation:
    return model.generate(QUESTION, temperature=0)


def test_an_answer_has_openais_form_whole_and_in_parts(demo: Model) -> None:
    answer, generation = Answer("demo"), ask(demo)
    whole = answer.whole(generation)
    assert whole["choices"] == [
        {"index": 0, "message": {"role": "assistant", "content": generation.text}, "finish_reason": "stop"}
    ]
    assert whole["usage"]["total_tokens"] == generation.usage.prompt_tokens + len(generation.tokens)
    parts = [answer.piece(piece, 0) for piece in demo.stream(QUESTION, temperature=0)]
    texts = [part["choices"][0]["delta"]["content"] for part in parts if part is not None]
    assert "".join(texts) == generation.text
    end, usage = answer.end(generation, include_usage=True)
    assert end["choices"][0]["finish_reason"] == "stop"
    assert (usage["choices"], usage["usage"]) == ([], whole["usage"])
    assert {part["id"] for part in parts if part is not None} == {whole["id"], end["id"]}
    cut = demo.generate(QUESTION, temperature=0, max_new_tokens=2)
    assert answer.whole(cut)["choices"][0]["finish_reason"] == "length"


def test_calls_of_tools_are_numbered_through(demo: Model) -> None:
    stream = demo.stream(QUESTION, tools=[WEATHER], tool_choice="required", temperature=0, max_new_tokens=200)
    answer, parts, calls = Answer("demo"), [], 0
    for piece in stream:
        parts.append(answer.piece(piece, calls))
        calls += len(piece.tool_calls)
    deltas = [part["choices"][0]["delta"] for part in parts if part is not None]
    found = [call for delta in deltas for call in delta.get("tool_calls", [])]
    generation = stream.finish()
    assert len(generation.tool_calls) == 1
    assert [call["index"] for call in found] == list(range(len(generation.tool_calls)))
    assert found[0]["function"] == {"name": "weather", "arguments": generation.tool_calls[0].arguments}
    choice = answer.whole(generation)["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert [call["function"] for call in choice["message"]["tool_calls"]] == [found[0]["function"]]
