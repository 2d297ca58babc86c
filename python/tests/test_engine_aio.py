"""Requests to an engine in an event loop, which is never blocked."""

from __future__ import annotations

import asyncio
import gc
import itertools
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from conftest import COUNTING, QUESTION
from qwen2_rs import CancelledError, Engine, Generation, InvalidArgumentError, Model, RequestStream

QUESTIONS = [[{"role": "user", "content": f"What is {i} plus {i + 3}?"}] for i in range(40)]


@pytest.fixture
def busy(long_model: Model) -> Iterator[Engine]:
    """An engine of a model that can answer for minutes."""
    with long_model.engine() as engine:
        yield engine


async def until(condition: Callable[[], bool]) -> None:
    async def poll() -> None:
        while not condition():
            await asyncio.sleep(0.005)

    await asyncio.wait_for(poll(), 30)


def test_many_streams_run_side_by_side_without_threads(demo: Model) -> None:
    want = [demo.chat(question, temperature=0).text for question in QUESTIONS]

    async def run(engine: Engine) -> tuple[list[str], int]:
        most = 0

        async def read(question: list[dict[str, str]]) -> str:
            nonlocal most
            text = ""
            async for piece in engine.chat(question, temperature=0, stream=True):
                text += piece.text
                most = max(most, threading.active_count())
            return text

        return await asyncio.gather(*map(read, QUESTIONS)), most

    before = threading.active_count()
    with demo.engine() as engine:
        texts, most = asyncio.run(run(engine))
        assert texts == want
        assert most <= before
        assert engine.stats.steps < engine.stats.completion_tokens
        # Another loop uses the same engine.
        assert asyncio.run(run(engine))[0] == want


def test_coroutines_give_what_the_calls_give(demo: Model) -> None:
    async def run(engine: Engine) -> None:
        want = demo.chat(QUESTION, temperature=0).text
        assert (await engine.generate_async(QUESTION, temperature=0)).text == want
        assert (await engine.chat_async(QUESTION, temperature=0)).text == want
        stream = await engine.submit_async(QUESTION, temperature=0, priority=3)
        assert (await stream.finish_async()).text == want
        assert (await stream.finish_async()).text == want
        assert [piece async for piece in stream] == []
        stream = await engine.chat_async(QUESTION, temperature=0, stream=True)
        assert "".join([piece.text async for piece in stream]) == want
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
        with pytest.raises(InvalidArgumentError, match="top_p"):
            await engine.generate_async("x", top_p=2)

    with demo.engine() as engine:
        asyncio.run(run(engine))


def test_the_event_loop_runs_meanwhile(busy: Engine) -> None:
    async def run() -> tuple[int, float]:
        ticks, longest = 0, 0.0

        async def tick() -> None:
            nonlocal ticks, longest
            while True:
                before = time.perf_counter()
                await asyncio.sleep(0.001)
                ticks, longest = ticks + 1, max(longest, time.perf_counter() - before)

        ticker = asyncio.create_task(tick())
        await busy.generate_async([1] * 3000, temperature=0, ignore_eos=True, max_new_tokens=100)
        ticker.cancel()
        return ticks, longest

    ticks, longest = asyncio.run(run())
    assert ticks > 20
    # The whole takes seconds.
    assert longest < 1


def test_a_cancelled_task_cancels_its_request(busy: Engine) -> None:
    stream = busy.submit([1, 2], temperature=0, ignore_eos=True)

    async def read() -> None:
        async for _ in stream:
            pass

    async def run() -> None:
        for work in (read(), busy.generate_async([1] * 5000, ignore_eos=True)):
            task = asyncio.create_task(work)
            await asyncio.sleep(0.2)
            assert busy.stats.running + busy.stats.waiting > 0
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            del task
        await until(lambda: busy.stats.running + busy.stats.waiting == 0)

    asyncio.run(run())
    assert stream.finish().finish_reason == "cancelled"
    assert busy.stats.failed == 0


def test_a_cancelled_task_that_is_kept_cancels_its_request(busy: Engine) -> None:
    kept: list[asyncio.CancelledError] = []

    async def read() -> None:
        try:
            await busy.generate_async([1, 2], ignore_eos=True)
        except asyncio.CancelledError as error:
            kept.append(error)  # and with it the frames that waited

    async def run() -> None:
        task = asyncio.create_task(read())
        await until(lambda: busy.stats.running == 1)
        task.cancel()
        await task
        await until(lambda: busy.stats.running == 0)

    asyncio.run(run())
    assert kept


def test_breaking_out_and_letting_go_cancel(busy: Engine) -> None:
    async def run() -> None:
        async for _ in busy.submit([1], ignore_eos=True):
            break
        stream = busy.submit([1], ignore_eos=True)
        await anext(stream)
        del stream
        with busy.submit([1], ignore_eos=True) as closed:
            await anext(closed)
        assert [piece async for piece in closed] == []
        assert (await closed.finish_async()).finish_reason == "cancelled"
        gc.collect()
        await until(lambda: busy.stats.running + busy.stats.waiting == 0)

    asyncio.run(run())


def test_a_coroutine_that_is_never_awaited_submits_nothing(busy: Engine) -> None:
    busy.generate_async([1]).close()
    assert busy.stats.submitted == 0


def test_tasks_share_the_pieces_of_a_request(busy: Engine) -> None:
    async def run() -> None:
        stream = busy.submit([1, 2, 3], temperature=0, ignore_eos=True, max_new_tokens=200)

        async def take() -> list[int]:
            return [piece.token async for piece in stream]

        taken = await asyncio.gather(take(), take(), take())
        assert sorted(itertools.chain(*taken)) == sorted((await stream.finish_async()).tokens)

    asyncio.run(run())


def test_a_full_queue_is_waited_for_without_blocking(long_model: Model) -> None:
    async def run(engine: Engine) -> None:
        first = engine.submit([1], ignore_eos=True)
        await until(lambda: engine.stats.running == 1)
        work = [engine.generate_async([1], ignore_eos=True, max_new_tokens=5) for _ in range(6)]
        answers = [asyncio.create_task(one) for one in work]
        await asyncio.sleep(0.1)
        assert engine.stats.submitted == 2
        answers[5].cancel()
        first.cancel()
        done = await asyncio.gather(*answers, return_exceptions=True)
        assert isinstance(done[5], asyncio.CancelledError)
        assert [len(answer.tokens) for answer in done[:5] if not isinstance(answer, BaseException)] == [5] * 5

    with long_model.engine(max_sequences=1, queue_limit=1, when_full="wait") as engine:
        asyncio.run(run(engine))


def test_closing_ends_who_waits(long_model: Model) -> None:
    async def run() -> None:
        engine = long_model.engine(max_sequences=1, queue_limit=1, when_full="wait")
        waiting = [asyncio.create_task(engine.generate_async([1], ignore_eos=True)) for _ in range(3)]
        await asyncio.sleep(0.2)
        engine.close()
        for outcome in await asyncio.gather(*waiting, return_exceptions=True):
            assert isinstance(outcome, CancelledError)
            assert "engine was closed" in str(outcome)

    asyncio.run(run())


def test_a_loop_that_is_closed_leaves_the_engine_usable(busy: Engine) -> None:
    async def leave() -> None:
        stream = busy.submit([2], ignore_eos=True, max_new_tokens=50)
        streams.append(stream)
        tasks.append(asyncio.create_task(busy.generate_async([1] * 100, ignore_eos=True)))
        await anext(stream)

    streams: list[RequestStream] = []
    tasks: list[asyncio.Task[Generation]] = []
    loop = asyncio.new_event_loop()
    loop.run_until_complete(leave())
    tasks[0].cancel()
    with pytest.raises(asyncio.CancelledError):
        loop.run_until_complete(tasks[0])
    loop.close()
    assert len(streams[0].finish().tokens) == 50
    assert len(busy.generate([1], ignore_eos=True, max_new_tokens=30).tokens) == 30


def test_waiting_needs_a_running_loop(busy: Engine) -> None:
    step = busy.submit(COUNTING, max_new_tokens=1).__anext__()
    with pytest.raises(RuntimeError, match="no running event loop"):
        step.send(None)
