"""An engine: every request gets what the model gives it alone, whoever joins, leaves and fails."""

from __future__ import annotations

import asyncio
import copy
import gc
import itertools
import json
import pickle
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest
from conftest import COUNTING, DEMO, QUESTION
from qwen2_rs import (
    CancelledError,
    ContextOverflowError,
    Engine,
    EngineStats,
    InvalidArgumentError,
    InvalidConstraintError,
    Model,
    OutOfMemoryError,
    UnsupportedError,
)

QUESTIONS = [
    [{"role": "user", "content": f"What is {i} plus {2 * i + 1}?"}]
    if i % 2
    else [{"role": "user", "content": f"Count from {i} to {i + 9}."}]
    for i in range(1, 17)
]


@pytest.fixture(scope="module")
def engine(demo: Model) -> Iterator[Engine]:
    with demo.engine(max_sequences=8) as engine:
        yield engine


@pytest.fixture
def busy(long_model: Model) -> Iterator[Engine]:
    """An engine of a model that can answer for minutes."""
    with long_model.engine() as engine:
        yield engine


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def idle(engine: Engine) -> bool:
    return engine.stats.running == 0 and engine.stats.waiting == 0


def test_requests_get_what_the_model_gives_alone(demo: Model) -> None:
    alone = [demo.chat(question, temperature=0) for question in QUESTIONS]
    with demo.engine(max_sequences=5, cache_bytes=1 << 30, prefill_chunk=32) as engine:
        streams = [engine.chat(question, temperature=0, stream=True) for question in QUESTIONS]
        for stream, want in zip(streams, alone, strict=True):
            pieces = list(stream)
            assert [piece.token for piece in pieces] == want.tokens
            assert "".join(map(str, pieces)) == want.text
            answer = stream.finish()
            assert (answer.text, answer.finish_reason) == (want.text, want.finish_reason)
            assert answer.usage.prompt_tokens == want.usage.prompt_tokens
            assert stream.finish().tokens == want.tokens
            assert list(stream) == []
        stats = engine.stats
        assert isinstance(stats, EngineStats)
        assert (stats.submitted, stats.finished, stats.failed) == (16, 16, 0)
        # Each weight was read for several at a time.
        assert stats.steps < stats.completion_tokens
        assert stats.cache_limit == 1 << 30
        assert repr(stats).startswith("EngineStats(waiting=0, running=0, submitted=16")
        assert repr(engine) == 'Engine("demo-model", running=0, waiting=0)'


def test_generate_and_chat_answer_as_the_model(demo: Model, engine: Engine) -> None:
    want = demo.chat(QUESTION, temperature=0)
    assert engine.chat(QUESTION, temperature=0).text == want.text
    assert engine.generate(QUESTION, temperature=0).tokens == want.tokens
    assert engine.submit(QUESTION, temperature=0, priority=-128).finish().tokens == want.tokens
    limited = engine.generate("x", temperature=0, max_new_tokens=3, ignore_eos=True, logprobs=2, priority=127)
    assert (len(limited.tokens), limited.finish_reason, len(limited.logprobs)) == (3, "length", 3)


def test_threads_share_an_engine(demo: Model, engine: Engine) -> None:
    want = [demo.chat(question, temperature=0).text for question in QUESTIONS]
    with ThreadPoolExecutor(8) as pool:
        answers = pool.map(lambda question: engine.chat(question, temperature=0).text, QUESTIONS)
        assert list(answers) == want


def test_threads_share_the_pieces_of_a_request(busy: Engine) -> None:
    stream = busy.submit([1, 2, 3], temperature=0, ignore_eos=True, max_new_tokens=300)
    taken: list[list[int]] = [[], [], []]

    def take(into: list[int]) -> None:
        into.extend(piece.token for piece in stream)

    threads = [threading.Thread(target=take, args=(into,)) for into in taken]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(itertools.chain(*taken)) == sorted(stream.finish().tokens)


SIZE = {
    "type": "object",
    "properties": {"size": {"enum": ["small", "large"]}},
    "required": ["size"],
    "additionalProperties": False,
}
MEASURE = {"type": "function", "function": {"name": "measure", "parameters": SIZE, "strict": True}}


def only_77(_tokens: npt.NDArray[np.uint32], logits: npt.NDArray[np.float32]) -> None:
    logits[:77] = -np.inf
    logits[78:] = -np.inf


OWN: dict[str, dict[str, Any]] = {
    "plain": {"temperature": 0},
    "json": {"temperature": 0, "json_schema": SIZE},
    "regex": {"temperature": 0, "regex": "[0-9]{5}"},
    "choice": {"temperature": 0, "choice": ["small", "large"]},
    "tools": {"temperature": 0, "tools": [MEASURE], "tool_choice": "required"},
    "first seed": {"temperature": 2.0, "seed": 1, "ignore_eos": True, "max_new_tokens": 24},
    "second seed": {"temperature": 2.0, "seed": 2, "ignore_eos": True, "max_new_tokens": 24},
    "logprobs": {"temperature": 0, "logprobs": 3, "prompt_logprobs": 2},
    "processor": {"temperature": 0, "processor": only_77, "max_new_tokens": 4},
}


def test_each_request_keeps_its_own_options_among_the_others(demo: Model) -> None:
    with demo.engine(deterministic=True, prefix_cache=False) as engine:
        alone = {name: engine.chat(QUESTION, **options) for name, options in OWN.items()}
        streams = {name: engine.chat(QUESTION, stream=True, **options) for name, options in OWN.items()}
        calls = {
            name: [call for piece in stream for call in piece.tool_calls] for name, stream in streams.items()
        }
        for name, stream in streams.items():
            answer = stream.finish()
            assert (answer.tokens, answer.text) == (alone[name].tokens, alone[name].text), name
            assert answer.finish_reason == alone[name].finish_reason
            assert repr(answer.logprobs) == repr(alone[name].logprobs)
            assert repr(answer.prompt_logprobs) == repr(alone[name].prompt_logprobs)
            assert answer.tokens == demo.chat(QUESTION, **OWN[name]).tokens
    assert json.loads(alone["json"].text)["size"] in {"small", "large"}
    assert re.fullmatch("[0-9]{5}", alone["regex"].text)
    assert alone["choice"].text in {"small", "large"}
    assert [call.name for call in calls.pop("tools")] == ["measure"]
    assert alone["tools"].finish_reason == "tool_calls"
    assert set(map(tuple, calls.values())) == {()}
    assert alone["first seed"].tokens != alone["second seed"].tokens
    likely = alone["logprobs"]
    assert [len(each.top) for each in likely.logprobs] == [3] * len(likely.tokens)
    assert len(likely.prompt_logprobs) == likely.usage.prompt_tokens - 1
    assert alone["processor"].tokens == [77] * 4


def test_a_higher_priority_goes_first(demo: Model) -> None:
    with demo.engine(max_sequences=1) as engine:
        first, low, high = (
            engine.submit([1], temperature=0, ignore_eos=True, max_new_tokens=60, priority=priority)
            for priority in (0, 0, 1)
        )
        high.finish()
        assert engine.stats.finished < 3
        assert [len(stream.finish().tokens) for stream in (first, low)] == [60, 60]


def test_a_bad_constraint_fails_its_own_request(demo: Model, engine: Engine) -> None:
    failed = engine.stats.failed
    good = engine.submit(COUNTING, temperature=0)
    with pytest.raises(InvalidConstraintError):
        engine.submit("x", regex="(a")
    bad = engine.submit("x", temperature=0, regex="[0-9]{5}", processor=only_77)
    with pytest.raises(InvalidConstraintError, match="no token is possible"):
        bad.finish()
    assert good.finish().tokens == demo.chat(COUNTING, temperature=0).tokens
    assert engine.stats.failed == failed + 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_sequences": 0}, "setting is out of range: max_sequences: 0"),
        ({"cache_bytes": -1}, "setting is out of range: cache_bytes: -1"),
        ({"prefill_chunk": 0}, "setting is out of range: prefill_chunk: 0"),
        ({"queue_limit": 0}, "setting is out of range: queue_limit: 0"),
        ({"when_full": "drop"}, "unknown answer to a full queue: when_full: drop"),
        ({"reader_patience": -1.0}, "setting is out of range: reader_patience: -1"),
    ],
)
def test_a_setting_out_of_range_names_itself(demo: Model, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        demo.engine(**settings)
    assert str(caught.value) == message


def test_options_are_read_as_the_model_reads_them(engine: Engine) -> None:
    with pytest.raises(TypeError, match=r"submit\(\) got an unexpected keyword argument 'temprature'"):
        cast(Any, engine).submit("x", temprature=0)
    with pytest.raises(InvalidArgumentError, match="option out of range: top_p"):
        engine.submit("x", top_p=2)
    with pytest.raises(InvalidArgumentError, match="priority: expected -128 to 127, found 128"):
        engine.submit("x", priority=128)
    with pytest.raises(ContextOverflowError):
        engine.generate([1] * 5000)
    with pytest.raises(UnsupportedError, match="engine has no such option: prompt_lookup"):
        engine.generate("x", prompt_lookup=4)
    with pytest.raises(TypeError, match=r"[Mm]odel"):
        cast(Any, engine).submit("x", model="other")


def test_a_bad_request_does_not_disturb_its_neighbours(demo: Model, engine: Engine) -> None:
    class EnoughError(Exception):
        pass

    calls = 0

    def raises(_tokens: npt.NDArray[np.uint32], _logits: npt.NDArray[np.float32]) -> None:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise EnoughError

    want = demo.chat(COUNTING, temperature=0).tokens
    neighbours = [engine.submit(COUNTING, temperature=0) for _ in range(4)]
    bad = engine.submit(COUNTING, temperature=0, processor=raises)
    with pytest.raises(InvalidArgumentError):
        engine.submit("")
    pieces: list[int] = []
    with pytest.raises(EnoughError):
        pieces.extend(piece.token for piece in bad)
    with pytest.raises(EnoughError):
        bad.finish()
    assert len(pieces) == 3
    assert list(bad) == []
    assert [neighbour.finish().tokens for neighbour in neighbours] == [want] * 4


def test_a_processor_cannot_wait_for_its_own_engine(demo: Model) -> None:
    engine = demo.engine()
    seen: list[str] = []

    def waits(_tokens: npt.NDArray[np.uint32], logits: npt.NDArray[np.float32]) -> None:
        try:
            engine.generate("x")
        except InvalidArgumentError as error:
            seen.append(str(error))
        logits[:] = -np.inf
        logits[77] = 0

    assert engine.generate("x", temperature=0, max_new_tokens=2, processor=waits).tokens == [77] * 2
    assert seen == ["object is in use: engine: a processor uses what calls it"] * 2


def test_a_processor_may_close_its_engine(demo: Model) -> None:
    engine = demo.engine()
    closes = lambda _tokens, _logits: engine.close()  # noqa: E731
    with pytest.raises(CancelledError, match="engine was closed before the request ended"):
        engine.generate("x", ignore_eos=True, processor=closes)
    assert repr(engine) == "Engine(closed)"


def test_cancel_close_break_and_del_end_a_request_and_no_other(busy: Engine) -> None:
    def submit() -> Any:
        return busy.submit([1, 2, 3], temperature=0, ignore_eos=True)

    stays = busy.submit([4, 5], temperature=0, ignore_eos=True, max_new_tokens=400)
    cancelled, closed, dropped = submit(), submit(), submit()
    first = next(cancelled)
    cancelled.cancel()
    answer = cancelled.finish()
    assert answer.finish_reason == "cancelled"
    assert answer.tokens[0] == first.token
    with closed:
        next(closed)
    assert list(closed) == []
    assert closed.finish().finish_reason == "cancelled"
    closed.close()  # again
    del dropped
    for _ in submit():
        break
    gc.collect()
    until(lambda: busy.stats.running + busy.stats.waiting <= 1)
    assert len(stays.finish().tokens) == 400
    assert busy.stats.failed == 0


def test_cancel_works_from_another_thread_and_a_timeout_ends(busy: Engine) -> None:
    stream = busy.submit([1, 2, 3], temperature=0, ignore_eos=True)
    timer = threading.Timer(0.2, stream.cancel)
    timer.start()
    assert stream.finish().finish_reason == "cancelled"
    timer.join()
    assert busy.generate([1], temperature=0, ignore_eos=True, timeout=0.2).finish_reason == "timeout"


def test_a_full_queue_refuses(long_model: Model) -> None:
    with long_model.engine(max_sequences=1, queue_limit=1) as engine:
        running = engine.submit([1], ignore_eos=True)
        until(lambda: engine.stats.running == 1)
        waiting = engine.submit([1], ignore_eos=True, max_new_tokens=5)
        for refused in (engine.submit, engine.generate):
            with pytest.raises(OutOfMemoryError, match="queue is full") as caught:
                refused([1])
            assert caught.value.key == "queue_limit"
        with pytest.raises(OutOfMemoryError, match="queue is full"):
            asyncio.run(engine.generate_async([1]))
        running.cancel()
        assert len(waiting.finish().tokens) == 5


def test_a_full_queue_is_waited_for(demo: Model) -> None:
    with demo.engine(max_sequences=1, queue_limit=1, when_full="wait") as engine:
        streams = [engine.submit([1], ignore_eos=True, max_new_tokens=20) for _ in range(6)]
        assert [len(stream.finish().tokens) for stream in streams] == [20] * 6


def test_closing_ends_who_waits_for_a_full_queue(long_model: Model) -> None:
    engine = long_model.engine(max_sequences=1, queue_limit=1, when_full="wait")
    running = engine.submit([1], ignore_eos=True)
    until(lambda: engine.stats.running == 1)
    waiting = engine.submit([1], ignore_eos=True)
    with ThreadPoolExecutor(1) as pool:
        third = pool.submit(engine.submit, [1])
        time.sleep(0.1)
        assert not third.done()
        engine.close()
        with pytest.raises(CancelledError, match="engine was closed"):
            third.result()
    for stream in (running, waiting):
        with pytest.raises(CancelledError, match="engine was closed before the request ended"):
            stream.finish()


def test_a_reader_that_reads_nothing_loses_its_request(long_model: Model) -> None:
    engine = long_model.engine(reader_patience=0.05)
    unread = engine.submit([1], ignore_eos=True)
    end = time.monotonic() + 60
    while engine.stats.finished == 0:
        assert time.monotonic() < end
        time.sleep(0.01)
    answer = unread.finish()
    assert (answer.finish_reason, len(answer.tokens)) == ("cancelled", 256)
    engine.close()


def test_closing_ends_running_requests_and_refuses_others(long_model: Model) -> None:
    engine = long_model.engine()
    read, unread = (engine.submit([1], ignore_eos=True) for _ in range(2))
    next(read)
    engine.close()
    engine.close()  # again
    for stream in (read, unread):
        with pytest.raises(CancelledError, match="engine was closed before the request ended"):
            stream.finish()
        assert list(stream) == []
    for use in (lambda: engine.submit("x"), lambda: engine.stats, lambda: engine.generate("x")):
        with pytest.raises(InvalidArgumentError, match="engine is closed"):
            use()
    assert [t.name for t in threading.enumerate() if "engine" in t.name] == []


def test_an_engine_outlives_its_model_and_a_stream_its_engine() -> None:
    with Model.load(DEMO, device="cpu", threads=2) as model:
        want = model.chat(COUNTING, temperature=0).text
        engine = model.engine()
    with pytest.raises(InvalidArgumentError, match="model is closed"):
        model.engine()
    del model
    gc.collect()
    stream = engine.submit(COUNTING, temperature=0)
    first = next(stream)
    del engine
    gc.collect()
    assert first.text + "".join(map(str, stream)) == want


def test_what_belongs_to_the_process_is_not_pickled(engine: Engine) -> None:
    stream = engine.submit("x", max_new_tokens=1)
    for thing, name in ((engine, "Engine"), (stream, "RequestStream")):
        with pytest.raises(TypeError, match=f"cannot pickle a {name}"):
            pickle.dumps(thing)
        with pytest.raises(TypeError, match=f"cannot pickle a {name}"):
            copy.copy(thing)


def test_other_threads_run_while_an_engine_is_waited_for(busy: Engine) -> None:
    ticks = 0
    done = threading.Event()

    def tick() -> None:
        nonlocal ticks
        while not done.wait(0.001):
            ticks += 1

    ticker = threading.Thread(target=tick)
    ticker.start()
    busy.generate([1] * 2000, temperature=0, ignore_eos=True, max_new_tokens=100)
    done.set()
    ticker.join()
    assert ticks > 5
