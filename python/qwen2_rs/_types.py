"""Types of what is passed in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias, TypedDict


class MessageDict(TypedDict):
    """One turn of a conversation."""

    role: str
    """Who speaks: system, user, assistant, tool, or what the chat template knows besides."""
    content: str
    """What is said: plain text. Control tokens spelled in it stay plain text."""


Message: TypeAlias = MessageDict | Mapping[str, str]
"""A dict with a role and a content."""

Prompt: TypeAlias = str | Sequence[int] | Sequence[Message]
"""What a model answers to: text, token ids or a conversation."""
