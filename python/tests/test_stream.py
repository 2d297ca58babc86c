"""Streams: pieces as they come, and every way to end them."""

from __future__ import annotations

import threading

import pytest
from conftest import COUNTING
from qwen2_rs import ContextOverflowError, InvalidArgumentError, Model


def test_pieces_join_to_the_text(demo: Model) -> None:
    whole = demo.chat(COUNTING, temperature=0)
    stream = demo.chat(COUNTING, temperature=0, stream=True)
    pieces = list(stream)
    assert "".join(piece.text for piece in pieces) == whole.text
    assert [piece.token for piece in pieces] == whole.tokens
    assert stream.finish().text == whole.text
    assert list(stream) == []


def test_a_piece_prints_as_its_text(demo: Model, capsys: pytest.CaptureFixture[str]) -> None:
    for piece in demo.chat(COUNTING, temperature=0, stream=True):
        print(piece, end="")
    assert capsys.readouterr().out == demo.chat(COUNTING, temperature=0).text


def test_pieces_are_whole_characters(demo: Model) -> None:
    # 14 tokens for these 9 characters: some are put together from several tokens.
    question = [{"role": "user", "content": "请说“苹果在勇敢帽子快乐”。"}]
    stream = demo.chat(question, temperature=0, repetition_penalty=1, stream=True)
    pieces = [piece.text for piece in stream]
    assert "".join(pieces) == "苹果在勇敢帽子快乐"
    assert "" in pieces[:-1]


def test_finish_runs_to_the_end_and_may_be_called_again(demo: Model) -> None:
    stream = demo.chat(COUNTING, temperature=0, stream=True)
    first = next(stream)
    answer = stream.finish()
    assert answer.text == demo.chat(COUNTING, temperature=0).text
    assert answer.text.startswith(first.text)
    assert stream.finish().tokens == answer.tokens
    with pytest.raises(StopIteration):
        next(stream)


def test_cancel_keeps_what_was_said(demo: Model) -> None:
    stream = demo.chat(COUNTING, temperature=0, stream=True)
    pieces = [next(stream) for _ in range(3)]
    stream.cancel()
    assert list(stream) == []
    answer = stream.finish()
    assert answer.finish_reason == "cancelled"
    assert answer.tokens == [piece.token for piece in pieces]


def test_close_ends_the_generation_where_it_is(demo: Model) -> None:
    with demo.chat(COUNTING, temperature=0, stream=True) as stream:
        pieces = [next(stream) for _ in range(2)]
    assert list(stream) == []
    assert stream.finish().finish_reason == "cancelled"
    assert stream.finish().tokens == [piece.token for piece in pieces]
    stream.close()  # again


def test_a_stream_that_ended_stays_as_it_ended(demo: Model) -> None:
    stream = demo.chat(COUNTING, temperature=0, stream=True)
    answer = stream.finish()
    stream.cancel()
    stream.close()
    assert stream.finish().finish_reason == answer.finish_reason == "stop"


def test_breaking_out_leaves_the_model_usable(demo: Model) -> None:
    expected = demo.chat(COUNTING, temperature=0).text
    for _ in range(20):
        for _piece in demo.chat(COUNTING, temperature=0, stream=True):
            break
    stream = demo.chat(COUNTING, temperature=0, stream=True)
    next(stream)
    del stream
    assert demo.chat(COUNTING, temperature=0).text == expected


def test_errors_come_before_the_first_piece(demo: Model) -> None:
    with pytest.raises(InvalidArgumentError):
        demo.stream("x", top_p=2)
    with pytest.raises(ContextOverflowError):
        demo.stream([1] * 2000)


def test_two_streams_of_one_model_do_not_mix(demo: Model) -> None:
    expected = demo.chat(COUNTING, temperature=0).text
    one, two = (demo.chat(COUNTING, temperature=0, stream=True) for _ in range(2))
    texts = ["", ""]
    for first, second in zip(one, two, strict=True):
        texts[0] += first.text
        texts[1] += second.text
    assert texts == [expected, expected]


def test_threads_share_the_pieces_of_a_stream(long_model: Model) -> None:
    stream = long_model.stream([1, 2, 3], temperature=0, ignore_eos=True, max_new_tokens=400)
    taken: list[list[int]] = [[], []]

    def take(into: list[int]) -> None:
        into.extend(piece.token for piece in stream)

    threads = [threading.Thread(target=take, args=(into,)) for into in taken]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken[0] + taken[1]) == sorted(stream.finish().tokens)


def test_cancel_works_from_another_thread(long_model: Model) -> None:
    stream = long_model.stream([1, 2, 3], temperature=0, ignore_eos=True)
    timer = threading.Timer(0.2, stream.cancel)
    timer.start()
    answer = stream.finish()
    timer.join()
    assert answer.finish_reason == "cancelled"
    assert 0 < len(answer.tokens) < 190_000
