"""Proposals, timeouts and progress: they change when tokens come, never which."""

from __future__ import annotations

import sys

import pytest
from conftest import COUNTING, QUESTION, fixture_directory
from qwen2_rs import InvalidArgumentError, Model


def test_a_draft_and_prompt_lookup_leave_the_tokens_as_they_are(demo: Model) -> None:
    both = demo.with_draft(demo)
    for options in [{"temperature": 0.0}, {"temperature": 1.3, "seed": 4}]:
        plain = demo.chat(COUNTING, max_new_tokens=40, **options)  # type: ignore[call-overload]
        fast = both.chat(COUNTING, max_new_tokens=40, **options)  # type: ignore[call-overload]
        looked_up = demo.chat(COUNTING, max_new_tokens=40, prompt_lookup=5, **options)  # type: ignore[call-overload]
        assert plain.tokens == fast.tokens == looked_up.tokens
        assert plain.usage.draft_tokens == 0
        assert fast.usage.draft_tokens >= fast.usage.accepted_tokens > 0
    assert "accepted_tokens=" in repr(fast.usage)


def test_a_draft_of_another_vocabulary_and_a_missing_one_are_refused(demo: Model) -> None:
    with pytest.raises(InvalidArgumentError, match="draft model has another vocabulary"):
        demo.with_draft(Model.load(fixture_directory("tied"), device="cpu"))
    with pytest.raises(InvalidArgumentError, match="model has no draft model"):
        demo.chat(QUESTION, draft_tokens=3)
    with pytest.raises(InvalidArgumentError, match="prompt_lookup"):
        demo.chat(QUESTION, prompt_lookup=65)


def test_a_timeout_ends_with_its_own_reason(demo: Model) -> None:
    answer = demo.chat(QUESTION, timeout=1e-9)
    assert (answer.finish_reason, answer.text) == ("timeout", "")
    assert demo.chat(QUESTION, temperature=0, timeout=1e6).finish_reason == "stop"
    with pytest.raises(InvalidArgumentError, match="timeout"):
        demo.chat(QUESTION, timeout=0)


def test_on_prefill_tells_how_far_a_prompt_is(demo: Model) -> None:
    seen: list[tuple[int, int]] = []
    answer = demo.chat(QUESTION, temperature=0, on_prefill=lambda *progress: seen.append(progress))
    total = answer.usage.prompt_tokens
    assert seen == sorted(seen)
    assert seen[-1] == (total, total)
    stream = demo.stream(QUESTION, temperature=0, on_prefill=lambda *progress: seen.append(progress))
    seen.clear()
    next(stream)
    assert seen[-1] == (total, total)
    with pytest.raises(TypeError, match="on_prefill"):
        demo.chat(QUESTION, on_prefill=3)  # type: ignore[call-overload]


def test_what_on_prefill_raises_ends_the_generation(demo: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    raised: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: raised.append(unraisable.exc_value))

    def fail(_done: int, _total: int) -> None:
        raise ValueError("enough")

    answer = demo.chat(QUESTION, on_prefill=fail)
    assert answer.finish_reason == "cancelled"
    assert [str(error) for error in raised] == ["enough"]
