"""Our GGUF files in llama.cpp, and its own in ours: the same tokens, logits as near as rounding allows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import qwen2_rs
from conftest import DEMO

llama_cpp = pytest.importorskip(
    "llama_cpp", reason="llama-cpp-python is not installed; see scripts/ecosystem"
)

TEXT = "<|im_start|>user\nWhat is 12 plus 30?<|im_end|>\n<|im_start|>assistant\n12 + 30 = 42.<|im_end|>"
# Of types that llama.cpp makes of a file: what ours reads of it is to be what llama.cpp reads.
TYPES = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "BF16", "F16"]

Array = npt.NDArray[np.float32]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model as we convert it."""
    path = tmp_path_factory.mktemp("gguf") / "demo.gguf"
    qwen2_rs.convert(DEMO, path, "f32")
    return path


@pytest.fixture(params=["f32", "bf16", "f16", "q8", "q4"])
def ours(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / f"{request.param}.gguf"
    if request.param.startswith("q"):
        qwen2_rs.quantize(DEMO, path, request.param)
    else:
        qwen2_rs.convert(DEMO, path, request.param)
    return path


def theirs(path: Path) -> tuple[list[int], Array]:
    """Tokens of the text and the logits of each, by llama.cpp."""
    model: Any = llama_cpp.Llama(str(path), n_ctx=256, n_threads=2, logits_all=True, verbose=False)
    tokens = model.tokenize(TEXT.encode(), add_bos=False, special=True)
    model.eval(tokens)
    return tokens, np.array(model.scores[: len(tokens)], dtype=np.float32)


def compare(path: Path) -> None:
    tokens, want = theirs(path)
    model = qwen2_rs.Model.load(path, device="cpu", kv_cache="f32")
    assert model.tokenizer.encode_with_special_tokens(TEXT) == tokens
    got = model.logits(tokens)[:, : want.shape[1]]
    # It rounds activations to eight bits in front of quantized weights, and to bf16 and f16 in front of
    # those, each in blocks of its own: measured 0.02 % (f32) to 1.6 % of the logits' deviation.
    share = float(np.abs(got - want).mean() / want.std())
    agree = float((got.argmax(1) == want.argmax(1)).mean())
    print(f"{path.name}: off by {100 * share:.2f} % of their deviation, {100 * agree:.0f} % choose alike")
    assert share < 0.03
    assert agree > 0.95


def test_llama_cpp_loads_what_we_write(ours: Path) -> None:
    compare(ours)


@pytest.mark.parametrize("name", TYPES)
def test_we_load_what_llama_cpp_writes(name: str, whole: Path, tmp_path: Path) -> None:
    path = tmp_path / f"{name}.gguf"
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name}")
    assert llama_cpp.llama_model_quantize(str(whole).encode(), str(path).encode(), settings) == 0
    compare(path)
