"""A server of the command `qwen2 serve`, for the tests that talk to one."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path


class Server:
    """A running server."""

    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self.process = process
        self.url = url


@contextlib.contextmanager
def serving(model: Path, *arguments: str) -> Iterator[Server]:
    """Starts a server on a free port and ends it as a service manager does."""
    command = [sys.executable, "-m", "qwen2_rs", "serve", str(model), "--port", "0", "--threads", "2"]
    process = subprocess.Popen([*command, *arguments], stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        assert " at http://" in line, line + process.stderr.read()
        url = line.split(" at ")[1].split(",")[0].strip()
        urllib.request.urlopen(url + "/health").close()  # noqa: S310
        yield Server(process, url)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.communicate()
