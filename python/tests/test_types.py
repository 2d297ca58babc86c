"""The type stubs say what the compiled module does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import qwen2_rs
from conftest import ROOT

pytest.importorskip("mypy")


def check(*command: str, cwd: Path) -> None:
    arguments = [sys.executable, "-m", *command]
    result = subprocess.run(arguments, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


# What needs packages of others, which are seldom installed where tests run.
OTHERS = ["evaluation.harness", "evaluation.opencompass", "ray.data.Dataset", "ray.serve"]


@pytest.mark.timeout(300)
def test_stubs_equal_the_module(tmp_path: Path) -> None:
    allowed = tmp_path / "allowed"
    allowed.write_text("".join(f"qwen2_rs.{name}\n" for name in OTHERS))
    check(
        "mypy.stubtest",
        "qwen2_rs",
        f"--mypy-config-file={ROOT / 'pyproject.toml'}",
        f"--allowlist={allowed}",
        "--ignore-unused-allowlist",
        cwd=tmp_path,
    )


@pytest.mark.timeout(300)
def test_examples_and_tests_type_check(tmp_path: Path) -> None:
    files = [*(ROOT / "examples").glob("*.py"), *(ROOT / "python" / "tests").glob("*.py")]
    options = ["--strict", f"--config-file={ROOT / 'pyproject.toml'}", f"--cache-dir={tmp_path}"]
    for file in files:
        if file.parent.name == "examples":
            check("mypy", *options, str(file), cwd=tmp_path)
    check(
        "mypy",
        *options,
        *map(str, (ROOT / "python" / "tests").glob("*.py")),
        cwd=tmp_path,
    )
    assert (Path(qwen2_rs.__file__).parent / "py.typed").exists()
