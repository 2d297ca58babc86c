"""Asynchronous iteration over a TokenStream: its steps run on a thread of the stream's own."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qwen2_rs._qwen2 import Piece, TokenStream


def executor() -> ThreadPoolExecutor:
    """The thread of one stream; it ends when the stream is let go."""
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="qwen2-stream")


async def next_piece(stream: TokenStream, executor: ThreadPoolExecutor) -> Piece:
    """The next piece. A task that is cancelled while it waits cancels the generation."""
    loop = asyncio.get_running_loop()
    try:
        piece = await loop.run_in_executor(executor, next, stream, None)
    except asyncio.CancelledError:
        stream.cancel()
        raise
    if piece is None:
        raise StopAsyncIteration
    return piece
