"""OpenAI's chat completions: what a request asks for, and what an answer looks like."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from qwen2_rs._qwen2 import Qwen2Error

if TYPE_CHECKING:
    from qwen2_rs._qwen2 import Generation, Piece

OPTIONS = {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    **{
        name: name
        for name in (
            "temperature",
            "top_k",
            "top_p",
            "min_p",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
            "seed",
            "stop",
            "ignore_eos",
            "tools",
            "tool_choice",
        )
    },
}
"""Fields of a request, and the options of Model.generate that they set."""

FIELDS = {"prompt": "messages", "max_new_tokens": "max_tokens", "json_schema": "response_format"}
"""Fields that errors name otherwise."""

STATUS = {"out_of_memory": 429, "cancelled": 503, "device_failed": 503, "internal": 500}
"""What is not the fault of a request. A full queue is out of memory, the end of an engine cancels."""


class BadRequestError(ValueError):
    """A request that cannot be answered."""

    def __init__(self, message: str, param: str | None = None, status: int = 400) -> None:
        """`param`: the field."""
        super().__init__(message)
        self.param = param
        self.status = status


@dataclass(frozen=True)
class Chat:
    """A request that was read."""

    messages: list[dict[str, Any]]
    options: dict[str, Any]
    stream: bool
    include_usage: bool

    @staticmethod
    def read(body: Any, model: str) -> Chat:
        """Reads the JSON of a request to the model of this name; what is not known is refused."""
        if not isinstance(body, dict):
            raise BadRequestError("the body is no JSON object")
        fields = {name: value for name, value in body.items() if value is not None}
        if fields.pop("model", model) != model:
            message = f"no such model: {body['model']!r}; this one is {model!r}"
            raise BadRequestError(message, "model", 404)
        messages = fields.pop("messages", None)
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            raise BadRequestError("messages must be a list of objects", "messages")
        stream = fields.pop("stream", False)
        if not isinstance(stream, bool):
            raise BadRequestError("stream must be true or false", "stream")
        stream_options = fields.pop("stream_options", {})
        if not isinstance(stream_options, dict):
            raise BadRequestError("stream_options must be an object", "stream_options")
        if fields.pop("n", 1) != 1:
            raise BadRequestError("n must be 1", "n")
        fields.pop("user", None)
        options = form(fields.pop("response_format", {"type": "text"}))
        for name, value in fields.items():
            if name not in OPTIONS:
                raise BadRequestError(f"unknown field: {name}", name)
            options[OPTIONS[name]] = value
        return Chat(messages, options, stream, stream_options.get("include_usage") is True)


def form(response_format: Any) -> dict[str, Any]:
    """The option for a response_format."""
    match response_format:
        case {"type": "text"}:
            return {}
        case {"type": "json_object"}:
            return {"json_schema": {"type": "object"}}
        case {"type": "json_schema", "json_schema": {"schema": schema}}:
            return {"json_schema": schema}
    message = "response_format must be text, json_object, or json_schema with a schema"
    raise BadRequestError(message, "response_format")


@dataclass(frozen=True)
class Answer:
    """What is sent for one request."""

    model: str
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def _envelope(self, object_name: str, **more: Any) -> dict[str, Any]:
        return {"id": self.id, "object": object_name, "created": self.created, "model": self.model, **more}

    def whole(self, generation: Generation) -> dict[str, Any]:
        """A completion."""
        message: dict[str, Any] = {"role": "assistant", "content": generation.text}
        if generation.tool_calls:
            message["tool_calls"] = [call.to_dict() for call in generation.tool_calls]
        choice = {"index": 0, "message": message, "finish_reason": reason(generation)}
        return self._envelope("chat.completion", choices=[choice], usage=usage(generation))

    def chunk(self, delta: Mapping[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        """A part of a completion."""
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
        return self._envelope("chat.completion.chunk", choices=[choice])

    def piece(self, piece: Piece, calls_before: int) -> dict[str, Any] | None:
        """The part for a piece, if there is anything to tell."""
        delta: dict[str, Any] = {}
        if piece.text:
            delta["content"] = piece.text
        if piece.tool_calls:
            calls = enumerate(piece.tool_calls, calls_before)
            delta["tool_calls"] = [{"index": index, **call.to_dict()} for index, call in calls]
        return self.chunk(delta) if delta else None

    def end(self, generation: Generation, include_usage: bool) -> Iterator[dict[str, Any]]:
        """The last parts."""
        yield self.chunk({}, reason(generation))
        if include_usage:
            yield self._envelope("chat.completion.chunk", choices=[], usage=usage(generation))


def reason(generation: Generation) -> str:
    """Why it ended, in OpenAI's words: whoever stops early is told that there is more."""
    ended = generation.finish_reason
    return ended if ended in ("stop", "tool_calls") else "length"


def usage(generation: Generation) -> dict[str, Any]:
    """Token counts."""
    counts = generation.usage
    return {
        "prompt_tokens": counts.prompt_tokens,
        "completion_tokens": counts.completion_tokens,
        "total_tokens": counts.prompt_tokens + counts.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": counts.cached_tokens},
    }


def failure(error: Exception) -> tuple[int, dict[str, Any]]:
    """The status and the body for an error."""
    param: str | None = None
    if isinstance(error, BadRequestError):
        status, param, code = error.status, error.param, None
    elif isinstance(error, Qwen2Error):
        status, code = STATUS.get(error.kind, 400), error.kind
        param = FIELDS.get(error.key or "", error.key)
    else:
        # A wrong type, which the bindings refuse.
        status, code = 400, None
    kinds = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}
    kind = kinds.get(status, "invalid_request_error")
    return status, {"error": {"message": str(error), "type": kind, "param": param, "code": code}}
