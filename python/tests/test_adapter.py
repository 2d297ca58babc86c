"""LoRA adapters beside the weights, and what a checkpoint and an adapter are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import qwen2_rs
from conftest import CONFORMANCE, DEMO, fixture_directory
from qwen2_rs import (
    AdapterInfo,
    CheckpointInfo,
    InvalidArgumentError,
    InvalidFileError,
    Model,
    NotFoundError,
)

ADAPTERS = CONFORMANCE / "adapters"


def reference(name: str) -> Any:
    return json.loads((ADAPTERS / name / "reference.json").read_text(encoding="utf-8"))


def base(name: str) -> Model:
    """The checkpoint that an adapter is for, without rounding."""
    return Model.load(
        fixture_directory(reference(name)["base"]), device="cpu", dtype="f32", kv_cache="f32", threads=1
    )


@pytest.mark.parametrize("name", ["plain", "patterns"])
def test_logits_equal_those_of_peft_and_the_model_stays_as_it_was(name: str) -> None:
    model, want = base(name), reference(name)
    before = model.logits(want["tokens"])
    adapted = model.with_adapter(ADAPTERS / name)
    # Both f32: the bound of the checkpoints, 1e-4 for logits up to 4.
    bound = 1e-4 * max(1.0, float(np.abs(want["logits"]).max()) / 4)
    np.testing.assert_allclose(adapted.logits(want["tokens"]), want["logits"], rtol=0, atol=bound)
    np.testing.assert_array_equal(model.logits(want["tokens"]), before)
    assert adapted.adapters == [ADAPTERS / name]
    assert model.adapters == []
    added = adapted.memory.weights - model.memory.weights
    assert added == qwen2_rs.inspect_adapter(ADAPTERS / name).memory


def test_adapters_add_up_and_outlive_the_model_they_were_added_to() -> None:
    tokens = reference("plain")["tokens"]
    with base("plain") as model:
        twice = model.with_adapter(str(ADAPTERS / "plain")).with_adapter(ADAPTERS / "plain")
    with pytest.raises(InvalidArgumentError, match="model is closed"):
        model.with_adapter(ADAPTERS / "plain")
    once = base("plain").with_adapter(ADAPTERS / "plain")
    assert twice.adapters == [ADAPTERS / "plain"] * 2
    assert np.abs(twice.logits(tokens) - once.logits(tokens)).max() > 0.01


def test_each_request_of_an_engine_has_its_own_adapter() -> None:
    model = base("plain")
    adapted = model.with_adapter(ADAPTERS / "plain")
    prompt = reference("plain")["tokens"]
    handles = [model, adapted, None, adapted] * 3
    with model.engine() as engine:
        streams = [
            engine.submit(prompt, model=handle, temperature=0, max_new_tokens=20, ignore_eos=True)
            for handle in handles
        ]
        got = [stream.finish().tokens for stream in streams]
        plain, changed = (
            handle.generate(prompt, temperature=0, max_new_tokens=20, ignore_eos=True).tokens
            for handle in (model, adapted)
        )
        assert got == [plain, changed] * 6
        assert plain != changed
        with pytest.raises(InvalidArgumentError, match="request is for another model") as caught:
            engine.submit(prompt, model=base("plain"))
        assert caught.value.key == "model"
        adapted.close()
        with pytest.raises(InvalidArgumentError, match="model is closed"):
            engine.submit(prompt, model=adapted)


def test_an_adapter_that_is_none_or_for_another_model_is_refused(demo: Model, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        demo.with_adapter(tmp_path / "none")
    with pytest.raises(InvalidFileError):
        demo.with_adapter(ADAPTERS / "plain")
    with pytest.raises(NotFoundError):
        qwen2_rs.inspect_adapter(tmp_path)


def test_inspect_adapter_tells_what_peft_saved() -> None:
    for name in ("plain", "patterns"):
        info = qwen2_rs.inspect_adapter(ADAPTERS / name)
        assert isinstance(info, AdapterInfo)
        config = json.loads((ADAPTERS / name / "adapter_config.json").read_text())
        assert info.base_model == (config["base_model_name_or_path"] or None)
        assert set(info.modules) <= set(config["target_modules"])
        assert config["r"] in info.ranks
        assert info.scales[0] <= info.scales[1]
        # f32
        assert info.memory == 4 * info.parameters
        assert repr(info).startswith(f"AdapterInfo(matrices={info.matrices}")


def test_inspect_tells_what_loading_would_give(demo: Model, tmp_path: Path) -> None:
    info = qwen2_rs.inspect(DEMO)
    assert isinstance(info, CheckpointInfo)
    assert (info.config, info.generation_config) == (demo.config, demo.generation_config)
    assert (info.context_length, info.dtype) == (demo.context_length, demo.dtype)
    # Vectors are kept in f32, which memory does not count.
    assert info.weight_bytes == pytest.approx(demo.memory.weights, rel=0.01)
    assert info.container == "safetensors"
    assert sum(info.formats.values()) == info.stored_bytes
    assert repr(info).startswith("CheckpointInfo(container='safetensors', parameters=")
    packed = tmp_path / "packed.gguf"
    qwen2_rs.quantize(DEMO, packed, "q8")
    info = qwen2_rs.inspect(str(packed), progress=lambda _done, _total: None)
    assert info.container == "gguf"
    assert "Q8_0" in info.formats
    assert info.weight_bytes < demo.memory.weights
    with pytest.raises(NotFoundError):
        qwen2_rs.inspect(tmp_path / "none")


def test_what_progress_raises_stops_the_inspection() -> None:
    class EnoughError(Exception):
        pass

    def stop(_done: int, _total: int) -> None:
        raise EnoughError

    with pytest.raises(EnoughError):
        qwen2_rs.inspect(DEMO, progress=stop)
    with pytest.raises(TypeError, match="progress"):
        qwen2_rs.inspect(DEMO, progress=3)  # type: ignore[arg-type]
