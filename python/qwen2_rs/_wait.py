"""Waiting in an event loop for what an engine computes: no thread is blocked."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

T = TypeVar("T")

Step = Callable[[asyncio.AbstractEventLoop, "asyncio.Future[None]"], "tuple[T] | None"]
"""Gives what is there, or None: then it wakes the future when it may be there."""


class Bell(Protocol):
    """Futures of one loop that were woken."""

    def take(self) -> list[asyncio.Future[None]]:
        """Each is given once."""


def ring(bell: Bell) -> None:
    """Wakes the futures; the loop calls it."""
    for future in bell.take():
        if not future.done():
            future.set_result(None)


async def wait(step: Step[T], cancel: Callable[[], object] | None = None) -> T:
    """What the step gives. A task that is cancelled while it waits calls cancel."""
    loop = asyncio.get_running_loop()
    while True:
        future = loop.create_future()
        found = step(loop, future)
        if found is not None:
            return found[0]
        try:
            await future
        except asyncio.CancelledError:
            if cancel is not None:
                cancel()
            raise


async def next_piece(step: Step[Any], cancel: Callable[[], object]) -> Any:
    """The next piece of a request, as `__anext__` gives it."""
    piece = await wait(step, cancel)
    if piece is None:
        raise StopAsyncIteration
    return piece
