"""Types of what is passed in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias, TypedDict

import numpy as np
import numpy.typing as npt


class _Turn(TypedDict):
    role: str
    """Who speaks: system, user, assistant, tool, or what the chat template knows besides."""
    content: str
    """What is said: plain text. Control tokens spelled in it stay plain text."""


class MessageDict(_Turn, total=False):
    """One turn of a conversation."""

    tool_calls: list[dict[str, Any]]
    """The calls that an assistant asks for, as `ToolCall.to_dict` gives them."""
    tool_call_id: str
    """The call that a tool answers."""
    name: str
    """The name of the tool that answers."""


Message: TypeAlias = MessageDict | Mapping[str, Any]
"""A dict with a role and a content; with tools also tool_calls, tool_call_id and name, as in OpenAI's
interface."""

Prompt: TypeAlias = str | Sequence[int] | Sequence[Message]
"""What a model answers to: text, token ids or a conversation."""

LogitsProcessor: TypeAlias = Callable[
    [npt.NDArray[np.uint32], npt.NDArray[np.float32]], npt.NDArray[Any] | Sequence[float] | None
]
"""Gets the tokens of prompt and output so far and the logits of the next one; changes the logits in place and
returns None, or returns others, one for each id of the vocabulary."""


class SchemaClass(Protocol):
    """A model class of pydantic."""

    @classmethod
    def model_json_schema(cls) -> dict[str, Any]:
        """Its JSON schema."""


JsonSchema: TypeAlias = Mapping[str, Any] | bool | str | type[SchemaClass]
"""A JSON schema: a dict, its text, or a pydantic model class."""
