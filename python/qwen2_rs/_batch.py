"""Many prompts through one engine, answered in their order."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event
from typing import TYPE_CHECKING, Any, TypeAlias

from qwen2_rs._qwen2 import Qwen2Error
from qwen2_rs._types import Prompt

if TYPE_CHECKING:
    from qwen2_rs._qwen2 import Engine, Generation, RequestStream

Request: TypeAlias = tuple[Prompt, Mapping[str, Any]]
"""A prompt and its options."""


def in_order(
    engine: Engine, requests: Iterable[Request], at_once: int
) -> Generator[Generation | Qwen2Error, None, None]:
    """Answers every request, `at_once` of them together; a failure stands in the place of its answer.

    `requests` is read as answers are taken, so it may be long. Whoever stops reading ends what is running.
    """
    running: list[RequestStream] = []
    stopped = Event()

    def answer(prompt: Prompt, options: Mapping[str, Any]) -> Generation | Qwen2Error:
        try:
            stream = engine.submit(prompt, **options)
            running.append(stream)
            try:
                if stopped.is_set():
                    stream.cancel()
                return stream.finish()
            finally:
                running.remove(stream)
        except Qwen2Error as error:
            return error

    # A thread for each, because an engine ends requests whose pieces are not taken for a minute.
    pool = ThreadPoolExecutor(at_once, thread_name_prefix="qwen2-batch")
    waiting: deque[Future[Generation | Qwen2Error]] = deque()
    try:
        for prompt, options in requests:
            waiting.append(pool.submit(answer, prompt, options))
            if len(waiting) >= 2 * at_once:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        stopped.set()
        for stream in list(running):
            stream.cancel()
        pool.shutdown(cancel_futures=True)


def all_answered(
    engine: Engine, requests: Iterable[Request], at_once: int
) -> Generator[Generation, None, None]:
    """As in_order, where a failure is raised."""
    for answer in in_order(engine, requests, at_once):
        if isinstance(answer, Qwen2Error):
            raise answer
        yield answer
