"""What the tests share: the repository's checkpoints and vectors."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from qwen2_rs import Model

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "examples" / "demo-model"
CONFORMANCE = ROOT / "conformance"

QUESTION = [{"role": "user", "content": "What is 12 plus 30?"}]
COUNTING = [{"role": "user", "content": "Count from 5 to 15."}]


def vectors(name: str) -> Any:
    """One of the files that all languages are tested with."""
    return json.loads((CONFORMANCE / name).read_text(encoding="utf-8"))


def fixture_directory(name: str) -> Path:
    """A tiny checkpoint with random weights."""
    return CONFORMANCE / "models" / name


def shared_tokenizer() -> Path:
    """The published tokenizer, which is not part of the repository."""
    folder = Path(os.environ.get("QWEN2_SHARED", ROOT.parent / "shared")) / "tokenizer"
    if not folder.is_dir():
        why = f"{folder} is not there; set QWEN2_SHARED"
        if os.environ.get("QWEN2_REQUIRE_SHARED") == "1":
            pytest.fail(why)
        pytest.skip(why)
    return folder


def run_python(code: str, *arguments: str | Path, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """Runs a program in a fresh interpreter, which has to end well."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


@pytest.fixture(scope="session")
def demo() -> Model:
    """The demo model."""
    return Model.load(DEMO, device="cpu", threads=2)


@pytest.fixture(scope="session")
def long_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model with a context of 200,000 tokens, for generations that take long."""
    directory = tmp_path_factory.mktemp("models") / "long"
    directory.mkdir()
    for name in ["generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"]:
        shutil.copy(DEMO / name, directory)
    config = json.loads((DEMO / "config.json").read_text())
    config["max_position_embeddings"] = 200_000
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="session")
def long_model(long_directory: Path) -> Model:
    """A model that can be kept busy for minutes."""
    return Model.load(long_directory, device="cpu", threads=2)
