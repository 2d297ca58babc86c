"""Sessions: a conversation that keeps its cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import COUNTING, QUESTION, fixture_directory
from qwen2_rs import ContextOverflowError, InvalidArgumentError, InvalidFileError, Model


def test_a_conversation_equals_the_chat_of_its_messages(demo: Model) -> None:
    session = demo.session()
    messages = []
    for question in [*QUESTION, *COUNTING]:
        session.append([question])
        answer = session.generate(temperature=0)
        messages.append(question)
        assert answer.text == demo.chat(messages, temperature=0).text
        messages.append({"role": "assistant", "content": answer.text})
    assert session.messages == messages


def test_the_second_turn_reads_only_what_is_new(demo: Model) -> None:
    session = demo.session()
    session.append(QUESTION)
    first = session.generate(temperature=0)
    assert first.usage.cached_tokens == 0
    session.append(COUNTING)
    second = session.generate(temperature=0)
    assert second.usage.cached_tokens >= first.usage.prompt_tokens
    assert second.usage.prompt_tokens > second.usage.cached_tokens
    assert session.memory > 0


def test_text_and_tokens_go_behind_what_is_there(demo: Model) -> None:
    session = demo.session()
    session.append("What")
    session.append([5, 6])
    assert session.tokens == [*demo.tokenizer.encode("What"), 5, 6]
    assert session.messages == []
    with pytest.raises(InvalidArgumentError, match="session holds text, not messages"):
        session.append(QUESTION)


def test_a_stream_becomes_part_of_the_conversation(demo: Model) -> None:
    session = demo.session()
    session.append(COUNTING)
    prompt = len(session.tokens)
    pieces = list(session.stream(temperature=0))
    assert session.tokens[prompt:] == [piece.token for piece in pieces]
    assert session.messages[-1]["content"] == "".join(map(str, pieces))


def test_what_was_said_before_a_break_is_part_of_the_conversation(demo: Model) -> None:
    session = demo.session()
    session.append(COUNTING)
    prompt = len(session.tokens)
    for piece in session.stream(temperature=0):
        said = piece
        break
    assert session.tokens[prompt:] == [said.token]
    with session.stream(temperature=0) as stream:
        next(stream)
    assert len(session.tokens) == prompt + 2


def test_a_session_belongs_to_its_stream_while_that_runs(demo: Model) -> None:
    session = demo.session()
    session.append(COUNTING)
    stream = session.stream(temperature=0)
    next(stream)
    uses: list[Callable[[], object]] = [
        lambda: session.append("x"),
        session.generate,
        session.stream,
        session.fork,
        lambda: session.truncate(0),
        lambda: session.tokens,
        lambda: session.messages,
        lambda: session.memory,
    ]
    for use in uses:
        with pytest.raises(
            InvalidArgumentError, match="session is in use: session: a stream of it"
        ) as caught:
            use()
        assert caught.value.help == "read the stream to its end, finish it, or close it first"
    stream.finish()
    assert session.tokens


def test_forks_go_on_independently(demo: Model) -> None:
    session = demo.session()
    session.append(QUESTION)
    session.generate(temperature=0)
    fork = session.fork()
    assert fork.tokens == session.tokens
    fork.append(COUNTING)
    before = session.tokens
    fork.generate(temperature=0)
    assert session.tokens == before
    session.append(COUNTING)
    session.generate(temperature=0)
    assert session.tokens == fork.tokens


def test_truncate_forgets_the_end(demo: Model) -> None:
    session = demo.session()
    session.append([1, 2, 3, 4])
    expected = session.fork().generate(temperature=0, max_new_tokens=5).tokens
    session.generate(temperature=0, max_new_tokens=5)
    session.truncate(4)
    assert session.tokens == [1, 2, 3, 4]
    assert session.generate(temperature=0, max_new_tokens=5).tokens == expected
    with pytest.raises(InvalidArgumentError, match="session is shorter"):
        session.truncate(1000)
    with pytest.raises(InvalidArgumentError, match="not a number of tokens"):
        session.truncate(-1)
    session.truncate(0)
    session.append(QUESTION)


def test_an_empty_session_has_nothing_to_answer(demo: Model) -> None:
    with pytest.raises(InvalidArgumentError, match="prompt is empty"):
        demo.session().generate()


def test_a_failed_append_changes_nothing(demo: Model) -> None:
    session = demo.session()
    session.append([1, 2])
    with pytest.raises(ContextOverflowError):
        session.append([1] * demo.context_length)
    with pytest.raises(InvalidArgumentError):
        session.append([10**6])
    assert session.tokens == [1, 2]


def test_a_rollback_lets_the_model_answer_anew(demo: Model) -> None:
    session = demo.session()
    session.append(QUESTION)
    first = session.generate(temperature=0)
    session.append(COUNTING)
    session.generate(temperature=0)
    session.rollback(3)
    assert session.messages == QUESTION
    again = session.generate(temperature=0)
    assert again.text == first.text
    assert again.usage.cached_tokens > 0
    with pytest.raises(InvalidArgumentError, match="session has fewer messages"):
        session.rollback(3)


def test_a_shift_forgets_the_middle(demo: Model) -> None:
    session = demo.session()
    session.append([*QUESTION, {"role": "assistant", "content": "42"}, *COUNTING])
    session.shift_messages(0, 2)
    assert session.messages == COUNTING
    assert session.generate(temperature=0).text == demo.chat(COUNTING, temperature=0).text
    tokens = demo.session()
    tokens.append([5, 6, 7, 8, 9])
    tokens.shift(1, 2)
    assert tokens.tokens == [5, 8, 9]
    with pytest.raises(InvalidArgumentError, match="session is shorter"):
        tokens.shift(2, 2)


def test_a_session_comes_back_from_its_file(demo: Model, tmp_path: Path) -> None:
    session = demo.session()
    session.append(QUESTION)
    session.generate(temperature=0)
    session.append(COUNTING)
    session.save(tmp_path / "a.session")
    restored = demo.open_session(str(tmp_path / "a.session"))
    assert restored.messages == session.messages
    want, got = session.generate(temperature=0), restored.generate(temperature=0)
    assert (got.text, got.usage.cached_tokens) == (want.text, want.usage.cached_tokens)
    data = bytearray((tmp_path / "a.session").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "a.session").write_bytes(data)
    with pytest.raises(InvalidFileError, match="session file is damaged"):
        demo.open_session(tmp_path / "a.session")
    other = Model.load(fixture_directory("tied"), device="cpu")
    session.save(tmp_path / "b.session")
    with pytest.raises(InvalidFileError, match="session is of another model"):
        other.open_session(tmp_path / "b.session")
