"""The example programs, the README's lines and the command."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from conftest import DEMO, ROOT

COMMAND = Path(sysconfig.get_path("scripts")) / "qwen2"


def run(*command: str | Path, text: str | None = None) -> subprocess.CompletedProcess[str]:
    arguments = [str(part) for part in command]
    return subprocess.run(
        arguments,
        cwd=ROOT,
        input=text,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("hello", r"2 \+ 3 = 5"),
        ("chat", "Tuesday"),
        ("engine", r"(?s)(?=.*3, 4, 5)(?=.*2 \+ 3 = 5).*Tuesday"),
        ("stream", "3.*4.*5.*6.*7.*8.*9"),
        ("session", r"2 \+ 3 = 5(.|\n)*7 - 4 = 3(.|\n)*tokens were read before"),
    ],
)
def test_an_example_runs(name: str, expected: str) -> None:
    result = run(sys.executable, ROOT / "examples" / f"{name}.py")
    assert result.returncode == 0, result.stderr
    if name not in {"hello", "stream"}:  # those sample, as the checkpoint says
        assert re.search(expected, result.stdout), result.stdout
    assert result.stdout.strip()


def test_an_example_reports_an_error_with_the_way_out() -> None:
    result = run(sys.executable, ROOT / "examples" / "chat.py", ROOT / "examples")
    assert result.returncode == 1
    assert "help: " in result.stderr
    assert "Traceback" not in result.stderr


def test_the_readme_can_be_pasted() -> None:
    blocks = re.findall(
        r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S
    )
    assert blocks, "README.md shows no Python"
    for block in blocks:
        result = run(sys.executable, "-W", "error", "-c", block)
        assert result.returncode == 0, result.stderr
        assert "42" in result.stdout


@pytest.mark.parametrize("command", [[COMMAND], [sys.executable, "-m", "qwen2_rs"]], ids=["qwen2", "-m"])
def test_the_command_is_installed(command: list[str | Path]) -> None:
    result = run(*command, "generate", DEMO, "What is", "--json", "--max-new-tokens", "3")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["usage"]["completion_tokens"] == 3
    assert run(*command, "--version").stdout.startswith("qwen2 ")
    wrong = run(*command, "no-such-command")
    assert (wrong.returncode, wrong.stdout) == (2, "")
