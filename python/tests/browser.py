"""Chromium without a window, driven over a pipe with the DevTools protocol."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pytest

# DevTools reads file descriptor 3 and writes 4: a process between puts our ends there.
LAUNCHER = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3]]
for place, end in enumerate(ends, start=3):
    os.dup2(end, place)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Page:
    """A tab, with the few commands that the tests need."""

    def __init__(self, commands: BinaryIO, events: BinaryIO) -> None:
        self.commands = commands
        self.events = events
        self.last = 0
        self.session: str | None = None
        self.unread = b""
        self.requested: list[str] = []
        self.complaints: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Network", "Page", "Runtime", "Log"):
            self.call(domain + ".enable")

    def call(self, method: str, **params: Any) -> Any:
        """Sends a command and waits for its answer."""
        self.last += 1
        message = {"id": self.last, "method": method, "params": params}
        if self.session is not None:
            message["sessionId"] = self.session
        self.commands.write(json.dumps(message).encode() + b"\0")
        self.commands.flush()
        while True:
            answer = self.read()
            if answer.get("id") == self.last:
                assert "error" not in answer, answer
                return answer["result"]
            self.note(answer)

    def read(self) -> Any:
        while b"\0" not in self.unread:
            more = os.read(self.events.fileno(), 65536)
            assert more, "Chromium has ended"
            self.unread += more
        message, self.unread = self.unread.split(b"\0", 1)
        return json.loads(message)

    def note(self, event: Any) -> None:
        match event.get("method"):
            case "Network.requestWillBeSent":
                self.requested.append(event["params"]["request"]["url"])
            case "Runtime.exceptionThrown" | "Log.entryAdded":
                self.complaints.append(json.dumps(event["params"]))

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait_for(self, expression: str) -> Any:
        """Waits until the expression is true."""
        deadline = time.monotonic() + 60
        while not (value := self.evaluate(expression)):
            assert time.monotonic() < deadline, self.evaluate("document.body.innerText")
            time.sleep(0.05)
        return value

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.wait_for("document.readyState === 'complete'")

    def screenshot(self, path: Path) -> None:
        """Writes what is seen into a PNG file."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))


def chromium() -> str:
    """The program, or the end of the test where it must be there."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    why = "chromium is not installed"
    if os.environ.get("QWEN2_REQUIRE_ALL") == "1":
        pytest.fail(why)
    pytest.skip(why)


@contextlib.contextmanager
def browsing(profile: Path) -> Iterator[Page]:
    """A tab of a fresh browser."""
    arguments = ["--headless=new", "--remote-debugging-pipe", f"--user-data-dir={profile}", "--disable-gpu"]
    arguments += ["--no-first-run", "--disable-background-networking", "--disable-component-update"]
    # CI is root in a container, where Chromium's sandbox does not start.
    arguments += ["--no-sandbox", "--disable-dev-shm-usage", "--window-size=900,760"]
    to_browser, from_us = os.pipe()
    to_us, from_browser = os.pipe()
    launcher = [sys.executable, "-c", LAUNCHER, str(to_browser), str(from_browser)]
    process = subprocess.Popen(
        [*launcher, chromium(), *arguments],
        pass_fds=[to_browser, from_browser],
        stderr=subprocess.DEVNULL,
    )
    os.close(to_browser)
    os.close(from_browser)
    with os.fdopen(from_us, "wb") as commands, os.fdopen(to_us, "rb") as events:
        try:
            page = Page(commands, events)
            yield page
            page.session = None
            page.call("Browser.close")
            process.wait(timeout=60)
        finally:
            process.kill()
            process.wait()
