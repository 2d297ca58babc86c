"""Waiting in an event loop for what an engine computes: no thread is blocked."""

from __future__ import annotations

import asyncio
from typing import Any, Protocol, TypeVar

T_co = TypeVar("T_co", covariant=True)


class Step(Protocol[T_co]):
    """What is waited for."""

    def __call__(self, loop: asyncio.AbstractEventLoop, future: asyncio.Future[None]) -> tuple[T_co] | None:
        """Gives what is there, or None: then it wakes the future when it may be there."""

    def cancel(self) -> None:
        """Nobody waits any more."""


class Bell(Protocol):
    """Futures of one loop that were woken."""

    def take(self) -> list[asyncio.Future[None]]:
        """Each is given once."""


def ring(bell: Bell) -> None:
    """Wakes the futures; the loop calls it."""
    for future in bell.take():
        if not future.done():
            future.set_result(None)


async def wait(step: Step[T_co]) -> T_co:
    """What the step gives. A task that is cancelled while it waits cancels it."""
    loop = asyncio.get_running_loop()
    while True:
        future = loop.create_future()
        found = step(loop, future)
        if found is not None:
            return found[0]
        try:
            await future
        except asyncio.CancelledError:
            step.cancel()
            raise


async def next_piece(step: Step[Any]) -> Any:
    """The next piece of a request, as `__anext__` gives it."""
    piece = await wait(step)
    if piece is None:
        raise StopAsyncIteration
    return piece
