"""Constraints and tools: schemas, expressions, lists, calls and their results."""

from __future__ import annotations

import json
import re
from typing import Any, cast

import pytest
from conftest import QUESTION
from qwen2_rs import InvalidArgumentError, InvalidConstraintError, Model

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "size": {"enum": ["small", "large"]},
        "n": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["size", "n"],
    "additionalProperties": False,
}
MEASURE: dict[str, Any] = {
    "name": "measure",
    "description": "Measures.",
    "parameters": SCHEMA,
    "strict": True,
}
TOOL: dict[str, Any] = {"type": "function", "function": MEASURE}


class LikePydantic:
    """What pydantic's model classes offer."""

    @classmethod
    def model_json_schema(cls) -> dict[str, Any]:
        return SCHEMA


def check(text: str) -> None:
    value = json.loads(text)
    assert set(value) == {"size", "n"}
    assert value["size"] in {"small", "large"}
    assert 0 <= value["n"] <= 99


@pytest.mark.parametrize("schema", [SCHEMA, json.dumps(SCHEMA), LikePydantic])
def test_json_keeps_to_a_schema(demo: Model, schema: Any) -> None:
    answer = demo.chat(QUESTION, json_schema=schema, temperature=1.0, seed=3, max_new_tokens=100)
    check(answer.text)
    assert answer.finish_reason == "stop"
    assert answer.stop_match is not None
    assert answer.stop_match.kind == "constraint"


def test_a_pydantic_class_gives_its_values(demo: Model) -> None:
    pydantic = pytest.importorskip("pydantic")
    closed = {"__config__": pydantic.ConfigDict(extra="forbid")}
    part = pydantic.create_model("Part", **closed, count=(int, pydantic.Field(ge=1, le=9)))
    parts = (list[part], pydantic.Field(max_length=2))  # type: ignore[valid-type]
    whole = pydantic.create_model("Whole", **closed, parts=parts, done=(bool, ...))
    answer = demo.chat(QUESTION, json_schema=whole, temperature=1.0, seed=1, max_new_tokens=200)
    whole.model_validate_json(answer.text)


def test_text_keeps_to_an_expression_a_grammar_and_a_list(demo: Model) -> None:
    assert re.fullmatch("[0-9]{4}", demo.chat(QUESTION, regex="[0-9]{4}").text)
    assert demo.chat(QUESTION, grammar='start: "a" | "b"').text in {"a", "b"}
    assert demo.chat(QUESTION, choice=("yes", "no")).text in {"yes", "no"}
    pieces = list(demo.stream(QUESTION, choice=["one two three"]))
    assert "".join(piece.text for piece in pieces) == "one two three"


def test_a_bad_form_names_itself(demo: Model) -> None:
    bad: list[dict[str, Any]] = [
        {"json_schema": {"type": "animal"}},
        {"regex": "("},
        {"grammar": "start: nowhere"},
        {"choice": []},
    ]
    for option in bad:
        with pytest.raises(InvalidConstraintError):
            demo.chat(QUESTION, **option)
    with pytest.raises(InvalidArgumentError, match="two constraints"):
        demo.chat(QUESTION, regex="a", choice=["a"])
    wrong: list[dict[str, Any]] = [
        {"json_schema": 3},
        {"regex": 3},
        {"choice": "yes"},
        {"choice": [1]},
        {"tools": TOOL},
        {"tools": "measure"},
    ]
    for option in wrong:
        with pytest.raises(TypeError, match=re.escape(next(iter(option)))):
            demo.chat(QUESTION, **option)


@pytest.mark.parametrize("tool_format", ["hermes", "qwen_agent"])
def test_a_tool_is_called_and_its_result_fed_back(demo: Model, tool_format: Any) -> None:
    choice = {"type": "function", "function": {"name": "measure"}}
    options: dict[str, Any] = {"tools": [TOOL], "tool_format": tool_format, "temperature": 1.0, "seed": 2}
    answer = demo.chat(QUESTION, tool_choice=choice, max_new_tokens=200, **options)
    assert answer.finish_reason == "tool_calls"
    (call,) = answer.tool_calls
    assert call.name == "measure"
    check(call.arguments)
    assert answer.text == ""
    assert "measure" in repr(call)
    messages: list[Any] = [
        *QUESTION,
        {"role": "assistant", "content": None, "tool_calls": [call.to_dict()]},
        {"role": "tool", "tool_call_id": "1", "content": "7"},
    ]
    again = demo.chat(messages, max_new_tokens=5, **options)
    assert again.usage.prompt_tokens > answer.usage.prompt_tokens
    session = demo.session()
    session.append(messages)
    assert session.messages[1]["tool_calls"] == [call.to_dict()]
    streamed = list(demo.stream(QUESTION, tool_choice=choice, max_new_tokens=200, **options))
    assert [call.arguments for piece in streamed for call in piece.tool_calls] == [call.arguments]


def test_bad_tools_are_refused(demo: Model) -> None:
    with pytest.raises(InvalidArgumentError, match="name"):
        demo.chat(QUESTION, tools=[{"type": "function", "function": {"name": "a b"}}])
    with pytest.raises(InvalidArgumentError, match="tool_choice"):
        demo.chat(QUESTION, tools=[TOOL], tool_choice=cast(Any, "perhaps"))
    with pytest.raises(InvalidArgumentError, match="tool_format"):
        demo.chat(QUESTION, tools=[TOOL], tool_format=cast(Any, "xml"))
    with pytest.raises(InvalidArgumentError, match="messages"):
        demo.generate("What is", tools=[TOOL])
    with pytest.raises(InvalidArgumentError, match="call"):
        demo.chat([{"role": "assistant", "content": "", "tool_calls": [{"name": "x"}]}])
