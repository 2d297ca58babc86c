"""What OpenAI's client asks for beyond text: likelihoods, forms, tools, vectors."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import openai
import pytest
from conftest import DEMO, QUESTION
from serving import serving

MODEL = "demo-model"
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Berlin", "Oslo"]}, "days": {"enum": [1, 2, 3]}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA, "strict": True}}


# Any: its types name the models and options of one week of OpenAI's, and these tests are about the wire.
@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    with (
        serving(DEMO) as server,
        openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


def fits_schema(value: Any) -> bool:
    return (
        value.keys() == {"city", "days"}
        and value["city"] in ("Berlin", "Oslo")
        and value["days"] in (1, 2, 3)
    )


def test_likelihoods_of_a_chat_are_told_whole_and_streamed_alike(client: Any) -> None:
    def ask(**more: Any) -> Any:
        return client.chat.completions.create(
            model=MODEL, messages=QUESTION, temperature=0, logprobs=True, top_logprobs=3, **more
        )

    ask()  # leaves the prompt in the cache, so that both of the others find it there and sum alike
    tokens = ask().choices[0].logprobs.content
    assert "".join(token.token for token in tokens).startswith("12 + 30 = 42.")
    for token in tokens:
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0].logprob == token.logprob, "greedy takes the likeliest"
        assert sum(math.exp(top.logprob) for top in token.top_logprobs) <= 1.0001
    streamed = [
        token
        for chunk in ask(stream=True)
        for token in (chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else [])
    ]
    assert [(token.token, token.logprob) for token in streamed] == [
        (token.token, token.logprob) for token in tokens
    ]


def test_a_prompt_is_scored_by_echo(client: Any) -> None:
    answer = client.completions.create(
        model=MODEL, prompt="12 + 30 = 42.", temperature=0, max_tokens=1, echo=True, logprobs=2
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    text = answer.choices[0].text
    assert text.startswith("12 + 30 = 42.")
    assert logprobs.token_logprobs[0] is None, "nothing foretells the first token"
    assert all(logprob <= 0 for logprob in logprobs.token_logprobs[1:])
    assert all(len(top) == 2 for top in logprobs.top_logprobs[1:])
    for token, offset in zip(logprobs.tokens, logprobs.text_offset, strict=True):
        if offset < len(text):
            assert text[offset : offset + len(token)] == token


def test_biases_and_penalties_change_the_answer(client: Any) -> None:
    plain = client.completions.create(model=MODEL, prompt="a", temperature=0, max_tokens=2, logprobs=1)
    assert plain.choices[0].logprobs is not None
    biased = client.completions.create(
        model=MODEL, prompt="a", temperature=0, max_tokens=3, logit_bias={"17": 100}, logprobs=0
    )
    assert biased.choices[0].logprobs is not None
    assert len(set(biased.choices[0].logprobs.tokens)) == 1, "the same token each time"
    penalised = client.completions.create(
        model=MODEL,
        prompt="a",
        temperature=0,
        max_tokens=3,
        logit_bias={"17": 1.5, "18": 1.4, "19": 1.3},
        presence_penalty=2,
        frequency_penalty=2,
        logprobs=0,
    )
    assert penalised.choices[0].text != biased.choices[0].text


def test_an_answer_keeps_to_a_schema(client: Any) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=QUESTION,
        temperature=2,
        seed=3,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "trip", "schema": SCHEMA, "strict": True},
        },
    )
    assert fits_schema(json.loads(answer.choices[0].message.content or ""))
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model=MODEL,
            messages=QUESTION,
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": {"type": "nonsense"}},
            },
        )
    assert caught.value.param == "response_format"
    choice = client.completions.create(
        model=MODEL, prompt="a", extra_body={"guided_choice": ["yes", "no"]}, max_tokens=9
    )
    assert choice.choices[0].text in ("yes", "no")


def test_a_tool_is_called_and_its_result_goes_back(client: Any) -> None:
    named: Any = {"type": "function", "function": {"name": "weather"}}
    answer = client.chat.completions.create(
        model=MODEL, messages=QUESTION, tools=[WEATHER], tool_choice=named, temperature=2, seed=1
    )
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    (call,) = choice.message.tool_calls
    assert call.function.name == "weather"
    assert fits_schema(json.loads(call.function.arguments))
    conversation = [*QUESTION, choice.message, {"role": "tool", "tool_call_id": call.id, "content": "rain"}]
    again = client.chat.completions.create(model=MODEL, messages=conversation, tools=[WEATHER], max_tokens=4)
    assert again.usage.prompt_tokens > answer.usage.prompt_tokens
    conversation[-1]["tool_call_id"] = "another"
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=conversation, tools=[WEATHER])
    assert caught.value.param == "messages[2].tool_call_id"


def test_a_call_of_a_tool_is_streamed(client: Any) -> None:
    with client.chat.completions.stream(
        model=MODEL, messages=QUESTION, tools=[WEATHER], tool_choice="required", temperature=2, seed=1
    ) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].finish_reason == "tool_calls"
    (call,) = final.choices[0].message.tool_calls
    assert fits_schema(json.loads(call.function.arguments))


def test_texts_become_vectors(client: Any) -> None:
    # The client asks for base64 and decodes it.
    answer = client.embeddings.create(model=MODEL, input=["12 + 30", "Tuesday"])
    first, second = (np.array(item.embedding) for item in answer.data)
    assert np.linalg.norm(first) == pytest.approx(1, abs=1e-5)
    assert first @ second < 0.9999
    floats = client.embeddings.create(model=MODEL, input="12 + 30", encoding_format="float")
    assert np.array(floats.data[0].embedding) == pytest.approx(first)
    assert 0 < floats.usage.prompt_tokens < answer.usage.prompt_tokens
    with pytest.raises(openai.BadRequestError) as caught:
        client.embeddings.create(model=MODEL, input="x", dimensions=7)
    assert caught.value.param == "dimensions"
