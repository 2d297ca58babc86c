"""The bar of Model.load(progress=True)."""

from __future__ import annotations

import sys
from typing import TextIO

_WIDTH = 30
_STEP = 1000  # between units of bytes


class Bar:
    """Draws how far the loading is, in one line on stderr that it leaves behind when it is done."""

    def __init__(self, stream: TextIO | None = None) -> None:
        # None if the program has no stderr, as under pythonw.
        self._stream: TextIO | None = stream if stream is not None else sys.stderr
        self._last = ""

    def __call__(self, done: int, total: int) -> None:
        if self._stream is None:
            return
        share = done / total if total else 1.0
        filled = int(share * _WIDTH)
        line = f"loading [{'#' * filled}{'.' * (_WIDTH - filled)}] {share:4.0%} of {_size(total)}"
        if line != self._last:
            self._last = line
            self._stream.write(f"\r{line}" + ("\n" if done >= total else ""))
            self._stream.flush()


def _size(n: float) -> str:
    for unit in ("B", "KB", "MB"):
        if n < _STEP:
            return f"{n:.0f} {unit}"
        n /= _STEP
    return f"{n:.1f} GB"
