"""Asynchronous iteration."""

from __future__ import annotations

import asyncio
import gc
import threading
import time

import pytest
from conftest import COUNTING, QUESTION
from qwen2_rs import Model


def test_async_for_gives_the_pieces(demo: Model) -> None:
    async def run() -> str:
        return "".join([piece.text async for piece in demo.chat(COUNTING, temperature=0, stream=True)])

    assert asyncio.run(run()) == demo.chat(COUNTING, temperature=0).text


def test_the_event_loop_runs_meanwhile(long_model: Model) -> None:
    async def run() -> tuple[int, int]:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0.001)

        ticker = asyncio.create_task(tick())
        stream = long_model.stream([1] * 3000, temperature=0, ignore_eos=True, max_new_tokens=3)
        n_pieces = 0
        async for _ in stream:
            n_pieces += 1
        ticker.cancel()
        return n_pieces, ticks

    n_pieces, ticks = asyncio.run(run())
    assert n_pieces == 3
    assert ticks > 5


def test_streams_run_side_by_side(demo: Model) -> None:
    async def read(question: list[dict[str, str]]) -> str:
        return "".join([piece.text async for piece in demo.chat(question, temperature=0, stream=True)])

    async def run() -> list[str]:
        return await asyncio.gather(*(read(question) for question in [QUESTION, COUNTING, QUESTION]))

    expected = [demo.chat(question, temperature=0).text for question in [QUESTION, COUNTING, QUESTION]]
    assert asyncio.run(run()) == expected


def test_a_cancelled_task_cancels_the_generation(long_model: Model) -> None:
    stream = long_model.stream([1] * 20_000, temperature=0, ignore_eos=True)

    async def run() -> None:
        async for _ in stream:
            pass

    with pytest.raises(asyncio.TimeoutError):
        asyncio.run(asyncio.wait_for(run(), 0.3))
    assert stream.finish().finish_reason == "cancelled"


def test_breaking_out_leaves_the_model_usable_and_no_thread(demo: Model) -> None:
    def threads() -> list[str]:
        return [t.name for t in threading.enumerate() if t.name.startswith("qwen2-stream")]

    async def run() -> None:
        async for _ in demo.chat(COUNTING, temperature=0, stream=True):
            assert threads()
            break

    asyncio.run(run())
    gc.collect()
    deadline = time.monotonic() + 10
    while threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threads() == []
    assert "42" in demo.chat(QUESTION, temperature=0).text


def test_the_end_is_seen_as_often_as_it_is_asked_for(demo: Model) -> None:
    async def run() -> None:
        stream = demo.stream("x", max_new_tokens=2, ignore_eos=True)
        pieces = [piece async for piece in stream]
        assert len(pieces) == 2
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
        assert stream.finish().finish_reason == "length"

    asyncio.run(run())


def test_async_iteration_needs_a_running_loop(demo: Model) -> None:
    step = demo.stream("x", max_new_tokens=1).__anext__()
    with pytest.raises(RuntimeError, match="no running event loop"):
        step.send(None)
