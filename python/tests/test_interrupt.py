"""Ctrl-C ends what the model does with KeyboardInterrupt, and leaves the model usable."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")

# Who starts the tests in the background has them ignore SIGINT, and children inherit that.
HEED = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"

PROGRAM = """
{heed}
import sys, time
from qwen2_rs import Model
model = Model.load(sys.argv[1], threads=2)
session = model.session()
session.append([1, 2, 3])
tokens = [1] * 150_000
def stream():
    global kept
    kept = model.stream([1, 2, 3], temperature=0, ignore_eos=True)
    for piece in kept: pass
print("ready", flush=True)
start = time.perf_counter()
try:
    {work}
except KeyboardInterrupt:
    print("interrupted", flush=True)
print(model.chat([{{"role": "user", "content": "What is 12 plus 30?"}}], temperature=0).text, flush=True)
{after}
"""

LONG = {
    "generate": ("model.generate([1, 2, 3], temperature=0, ignore_eos=True)", ""),
    "the reading of a long prompt": ("model.generate(tokens, temperature=0, ignore_eos=True)", ""),
    "the reading of a stream's prompt": ("next(model.stream(tokens, temperature=0, ignore_eos=True))", ""),
    "stream": ("stream()", "print(kept.finish().finish_reason)"),
    "the scores of a long text": ("model.score(tokens)", ""),
    "the embedding of a long text": ("model.embed(tokens)", ""),
    "the perplexity of a long text": ("model.perplexity(tokens)", ""),
    "a batch": ("model.generate_batch([[1, 2, 3]] * 50, temperature=0, ignore_eos=True)", ""),
    "a session": (
        "session.generate(temperature=0, ignore_eos=True)",
        "print('kept' if len(session.tokens) > 3 else 'lost')",
    ),
}
LAST = {"stream": "cancelled\n", "a session": "kept\n"}


@pytest.mark.parametrize("what", LONG)
def test_ctrl_c_ends(what: str, long_directory: Path) -> None:
    work, after = LONG[what]
    command = [sys.executable, "-c", PROGRAM.format(heed=HEED, work=work, after=after), str(long_directory)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        watchdog = threading.Timer(60, child.kill)  # the end of the block waits for the child
        watchdog.start()
        assert child.stdout.readline() == "ready\n"
        time.sleep(1)
        assert child.poll() is None
        sent = time.perf_counter()
        child.send_signal(signal.SIGINT)
        line = child.stdout.readline()
        took = time.perf_counter() - sent
        out, err = child.communicate()
        watchdog.cancel()
    assert line == "interrupted\n", err
    # One chunk of a prompt or one token, and 50 ms between two looks at the signals.
    assert took < 10
    answer, _, rest = out.partition("\n")
    assert "42" in answer
    assert rest == LAST.get(what, "")
    assert (child.returncode, err) == (0, "")


def test_ctrl_c_stops_the_loading() -> None:
    code = """
import os, signal, sys
from qwen2_rs import Model
signal.signal(signal.SIGINT, signal.default_int_handler)
seen = []
def progress(done, total):
    seen.append((done, total))
    os.kill(os.getpid(), signal.SIGINT)
try:
    Model.load(sys.argv[1], progress=progress)
except KeyboardInterrupt:
    print("interrupted")
"""
    directory = Path(__file__).resolve().parents[2] / "examples" / "demo-model"
    command = [sys.executable, "-c", code, str(directory)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stdout) == (0, "interrupted\n"), result.stderr


def test_a_handler_of_the_program_is_called_and_does_not_interrupt(long_directory: Path) -> None:
    code = """
import signal, sys, threading, os
from qwen2_rs import Model
model = Model.load(sys.argv[1], threads=2)
calls = []
signal.signal(signal.SIGUSR1, lambda *_: calls.append(1))
timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGUSR1))
timer.start()
answer = model.generate([1], temperature=0, ignore_eos=True, max_new_tokens=1500)
timer.join()
print(len(answer.tokens), answer.finish_reason, len(calls))
"""
    command = [sys.executable, "-c", code, str(long_directory)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stdout) == (0, "1500 length 1\n"), result.stderr
