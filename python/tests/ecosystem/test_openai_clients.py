"""LangChain and LlamaIndex on the server, word for word as docs/server.md shows them."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator

import pytest
from conftest import DEMO, ROOT
from serving import Server, serving

pytest.importorskip("langchain_openai", reason="langchain-openai is not installed; see scripts/ecosystem")
pytest.importorskip("llama_index", reason="llama-index is not installed; see scripts/ecosystem")

SHOWN_AT = "http://127.0.0.1:8000"


def shown(of: str) -> str:
    """The block of Python that speaks of a package."""
    text = (ROOT / "docs" / "server.md").read_text()
    blocks = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if of in block]
    assert len(blocks) == 1, blocks
    return str(blocks[0])


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(DEMO) as server:
        yield server


@pytest.mark.parametrize("package", ["openai", "langchain_openai", "llama_index"])
def test_the_example_of_the_documentation_answers(server: Server, package: str) -> None:
    code = shown(f"from {package}")
    assert SHOWN_AT in code
    # Another process, so that what these packages leave behind is not in the way of other tests.
    done = subprocess.run(
        [sys.executable, "-c", code.replace(SHOWN_AT, server.url)],
        check=False,  # its output tells more
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "12 + 30 = 42." in done.stdout
    if package != "openai":
        assert "5, 6, 7, 8" in done.stdout, done.stdout
