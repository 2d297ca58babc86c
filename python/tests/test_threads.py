"""Threads, forks and the end of the interpreter."""

from __future__ import annotations

import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import COUNTING, DEMO, QUESTION, run_python
from qwen2_rs import Model


@pytest.mark.parametrize("where", ["main", "thread"])
def test_other_threads_run_while_the_model_computes(long_model: Model, where: str) -> None:
    ticks = 0
    done = threading.Event()

    def tick() -> None:
        nonlocal ticks
        while not done.is_set():
            ticks += 1
            time.sleep(0.001)

    def work() -> float:
        start = time.perf_counter()
        long_model.generate([1, 2, 3], temperature=0, ignore_eos=True, max_new_tokens=1500)
        return time.perf_counter() - start

    ticker = threading.Thread(target=tick)
    ticker.start()
    if where == "main":
        seconds = work()
    else:
        with ThreadPoolExecutor(1) as pool:
            seconds = pool.submit(work).result()
    done.set()
    ticker.join()
    # A tick takes some milliseconds on a busy machine; with the lock held there would be one or two.
    assert ticks > max(5, seconds * 20), f"{ticks} ticks in {seconds:.2f} s"


def test_threads_use_one_model_at_once(demo: Model) -> None:
    questions = [QUESTION, COUNTING] * 8
    expected = [demo.chat(question, temperature=0).text for question in questions]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda question: demo.chat(question, temperature=0).text, questions))
    assert answers == expected


def test_threads_wait_for_each_other_at_a_session(demo: Model) -> None:
    session = demo.session()
    session.append([1, 2, 3])
    with ThreadPoolExecutor(4) as pool:
        answers = list(
            pool.map(lambda _: session.generate(temperature=0, ignore_eos=True, max_new_tokens=20), range(4))
        )
    assert sorted(answer.usage.prompt_tokens for answer in answers) == [3, 23, 43, 63]
    assert len(session.tokens) == 83


def test_loading_works_in_a_thread() -> None:
    with ThreadPoolExecutor(2) as pool:
        seen: list[int] = []
        loads = [pool.submit(Model.load, DEMO, progress=lambda done, _: seen.append(done)) for _ in range(2)]
        assert {load.result().name for load in loads} == {"demo-model"}
    assert seen


def test_closing_while_others_generate(long_directory: Path) -> None:
    model = Model.load(long_directory, threads=1)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(model.generate, [1], temperature=0, ignore_eos=True, max_new_tokens=500)
        time.sleep(0.02)
        model.close()
        assert len(answer.result().tokens) == 500


@pytest.mark.skipif(sys.platform == "win32", reason="no fork on Windows")
def test_a_fork_is_told_to_load_its_own_model() -> None:
    code = """
import os, sys, warnings
warnings.simplefilter("ignore")
from qwen2_rs import Model, UnsupportedError
model = Model.load(sys.argv[1])
stream = model.stream([1, 2], ignore_eos=True)
next(stream)
pid = os.fork()
if pid == 0:
    code = 1
    try:
        model.generate("x", max_new_tokens=1)
    except UnsupportedError as error:
        assert "does not survive a fork" in str(error), error
        assert "load the model in the process that uses it" == error.help
        try:
            next(stream)
        except UnsupportedError:
            own = Model.load(sys.argv[1])
            own.generate("x", max_new_tokens=1)
            code = 0
    finally:
        os._exit(code)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
model.generate("x", max_new_tokens=1)
print("ok")
"""
    result = run_python(code, DEMO)
    assert (result.returncode, result.stdout) == (0, "ok\n"), result.stderr


EXITS = {
    "a stream is half read": "stream = model.stream([1], ignore_eos=True); next(stream)",
    "a session's stream is half read": (
        "session = model.session()\nsession.append([1])\n"
        "stream = session.stream(ignore_eos=True)\nnext(stream)"
    ),
    "a daemon thread generates": (
        "import threading, time\n"
        "def work(): model.generate([1], ignore_eos=True)\n"
        "threading.Thread(target=work, daemon=True).start()\n"
        "time.sleep(0.3)"
    ),
    "a daemon thread reads a stream": (
        "import threading, time\n"
        "stream = model.stream([1], ignore_eos=True)\n"
        "threading.Thread(target=list, args=(stream,), daemon=True).start()\n"
        "time.sleep(0.3)"
    ),
    "an asynchronous stream is half read": (
        "import asyncio\n"
        "stream = model.stream([1], ignore_eos=True)\n"
        "async def first(): return await anext(stream)\n"
        "asyncio.run(first())"
    ),
    "sys.exit inside a loop": "import sys\nfor piece in model.stream([1], ignore_eos=True): sys.exit(0)",
}


@pytest.mark.parametrize("how", EXITS)
def test_the_interpreter_ends_well_while(how: str, long_directory: Path) -> None:
    code = (
        f"import sys\nfrom qwen2_rs import Model\nmodel = Model.load(sys.argv[1], threads=2)\n{EXITS[how]}\n"
    )
    result = run_python(code, long_directory)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
