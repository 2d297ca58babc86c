"""An engine and the process: Ctrl-C, forks, and the end of the interpreter."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import DEMO, run_python

# Who starts the tests in the background has them ignore SIGINT, and children inherit that.
INTERRUPTED = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from qwen2_rs import Model
model = Model.load(sys.argv[1], threads=2)
engine = model.engine(max_sequences=1, queue_limit=1, when_full="wait")
kept = engine.submit([1, 2], temperature=0, ignore_eos=True)
next(kept)
{before}
print("ready", flush=True)
try:
    {work}
except KeyboardInterrupt:
    print("interrupted", flush=True)
print({after}, flush=True)
kept.cancel()
print(engine.chat([{{"role": "user", "content": "What is 12 plus 30?"}}], temperature=0).text, flush=True)
"""

LONG = {
    "generate": ("", "engine.generate([1, 2, 3], temperature=0, ignore_eos=True)", "'ok'", "ok"),
    "the reading of a stream": ("", "for piece in kept: pass", "kept.finish().finish_reason", "cancelled"),
    "the end of a stream": ("", "kept.finish()", "kept.finish().finish_reason", "cancelled"),
    "a wait for room": (
        "second = engine.submit([1], max_new_tokens=1)",
        "engine.submit([1, 2, 3])",
        "engine.stats.submitted",
        "2",
    ),
    "an event loop": (
        "import asyncio",
        "asyncio.run(engine.generate_async([1, 2], ignore_eos=True))",
        "'ok'",
        "ok",
    ),
}


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
@pytest.mark.parametrize("what", LONG)
def test_ctrl_c_ends(what: str, long_directory: Path) -> None:
    before, work, after, want = LONG[what]
    code = INTERRUPTED.format(before=before, work=work, after=after)
    command = [sys.executable, "-c", code, str(long_directory)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        watchdog = threading.Timer(60, child.kill)  # the end of the block waits for the child
        watchdog.start()
        assert child.stdout.readline() == "ready\n"
        time.sleep(0.5)
        assert child.poll() is None
        sent = time.perf_counter()
        child.send_signal(signal.SIGINT)
        line = child.stdout.readline()
        took = time.perf_counter() - sent
        out, err = child.stdout.read(), child.stderr.read()
        child.wait()
        watchdog.cancel()
    assert line == "interrupted\n", err
    # 50 ms between two looks at the signals.
    assert took < 5
    assert (child.returncode, err) == (0, "")
    told, _, answer = out.partition("\n")
    assert told == want
    assert "42" in answer


@pytest.mark.skipif(sys.platform == "win32", reason="no fork on Windows")
def test_a_fork_is_told_to_build_its_own_engine(long_directory: Path) -> None:
    code = """
import asyncio, gc, os, sys, warnings
warnings.simplefilter("ignore")
from qwen2_rs import Model, UnsupportedError
model = Model.load(sys.argv[1], threads=2)
engine = model.engine()
# Forked over and over while the engine works: some forks find its locks held.
for _ in range(20):
    streams = [engine.submit([1, 2], ignore_eos=True, max_new_tokens=400) for _ in range(4)]
    next(streams[0])
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            uses = [
                lambda: engine.submit("x"),
                lambda: engine.generate("x"),
                lambda: asyncio.run(engine.generate_async("x")),
                lambda: engine.stats,
                lambda: next(streams[0]),
                lambda: streams[1].finish(),
                lambda: asyncio.run(streams[1].finish_async()),
                lambda: engine.close(),
            ]
            for use in uses:
                try:
                    use()
                except UnsupportedError as error:
                    assert "does not survive a fork" in str(error), error
                    assert "in the process that uses" in error.help, error.help
                else:
                    raise AssertionError("not refused")
            assert repr(engine) in ("Engine(of another process)", "Engine(closed)")
            streams[2].cancel()
            streams[3].close()
            del engine, streams, uses, use
            gc.collect()
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert [len(stream.finish().tokens) for stream in streams] == [400] * 4
print("ok")
"""
    result = run_python(code, long_directory, timeout=100)
    assert (result.returncode, result.stdout, result.stderr) == (0, "ok\n", "")


@pytest.mark.skipif(sys.platform == "win32", reason="no fork on Windows")
def test_a_fork_that_ends_as_a_program_does_ends_well(long_directory: Path) -> None:
    code = """
import os, sys, warnings
warnings.simplefilter("ignore")
from qwen2_rs import Model
engine = Model.load(sys.argv[1], threads=2).engine()
stream = engine.submit([1, 2], ignore_eos=True)
next(stream)
pid = os.fork()
if pid == 0:
    sys.exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
next(stream)
print("ok")
"""
    result = run_python(code, long_directory)
    assert (result.returncode, result.stdout, result.stderr) == (0, "ok\n", "")


SLOW = "def slow(tokens, logits):\n    for _ in range(20000): pass\n"
EXITS = {
    "a stream is half read": "stream = engine.submit([1], ignore_eos=True); next(stream)",
    "requests were never read": "streams = [engine.submit([1], ignore_eos=True) for _ in range(9)]",
    "sys.exit inside a loop": "for piece in engine.submit([1], ignore_eos=True): sys.exit(0)",
    "a processor of Python runs": (
        SLOW + "streams = [engine.submit([1], ignore_eos=True, processor=slow) for _ in range(3)]\n"
        "next(streams[0])"
    ),
    "a processor of Python runs beside an event loop": (
        SLOW + "import asyncio\n"
        "async def work():\n"
        "    for _ in range(3): await anext(engine.submit([1], ignore_eos=True, processor=slow))\n"
        "asyncio.run(work())"
    ),
    "an engine is used behind the hook that closes it": (
        "import asyncio, atexit\n"
        "from qwen2_rs import CancelledError\n"
        "def late():\n"
        "    try: engine.generate([1], max_new_tokens=1)\n"
        "    except CancelledError: pass\n"
        "atexit.register(late)\n"
        "asyncio.run(engine.generate_async([1], max_new_tokens=1))"
    ),
    "a daemon thread reads": (
        "import threading, time\n"
        "stream = engine.submit([1], ignore_eos=True)\n"
        "threading.Thread(target=list, args=(stream,), daemon=True).start()\n"
        "time.sleep(0.3)"
    ),
    "an asynchronous stream is half read": (
        "import asyncio\n"
        "streams = [engine.submit([1], ignore_eos=True) for _ in range(5)]\n"
        "async def first(): return await asyncio.gather(*map(anext, streams))\n"
        "asyncio.run(first())"
    ),
    "a loop in a daemon thread waits": (
        "import asyncio, threading, time\n"
        "stream = engine.submit([1], ignore_eos=True)\n"
        "async def read():\n"
        "    async for piece in stream: pass\n"
        "threading.Thread(target=lambda: asyncio.run(read()), daemon=True).start()\n"
        "time.sleep(0.3)"
    ),
    "the engine was closed": "stream = engine.submit([1], ignore_eos=True); next(stream); engine.close()",
}


@pytest.mark.parametrize("how", EXITS)
def test_the_interpreter_ends_well_while(how: str, long_directory: Path) -> None:
    code = (
        "import sys\nfrom qwen2_rs import Model\nmodel = Model.load(sys.argv[1], threads=2)\n"
        f"engine = model.engine()\n{EXITS[how]}\n"
    )
    result = run_python(code, long_directory, timeout=20)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_exceptions_of_a_closed_engine_are_seen_by_its_reader() -> None:
    code = """
import sys
from qwen2_rs import CancelledError, Model
engine = Model.load(sys.argv[1]).engine()
stream = engine.submit([1], ignore_eos=True)
engine.close()
try:
    stream.finish()
except CancelledError as error:
    print(error, "-", error.help)
"""
    result = run_python(code, DEMO)
    want = "engine was closed before the request ended - submit it again to another engine\n"
    assert (result.returncode, result.stdout, result.stderr) == (0, want, "")
