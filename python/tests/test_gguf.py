"""Files that we write, read by the gguf package: names, shapes, types, numbers and metadata."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import qwen2_rs
from conftest import DEMO, fixture_directory

Floats = npt.NDArray[np.float32]

ARCHITECTURES = {"qwen2": gguf.MODEL_ARCH.QWEN2, "qwen2_moe": gguf.MODEL_ARCH.QWEN2MOE}


def checkpoint(directory: Path) -> tuple[dict[str, Any], dict[str, Floats]]:
    """config.json and all tensors as f32, read without our code."""
    config: dict[str, Any] = json.loads((directory / "config.json").read_text())
    tensors: dict[str, Floats] = {}
    for file in directory.glob("*.safetensors"):
        data = file.read_bytes()
        size = 8 + int.from_bytes(data[:8], "little")
        for name, entry in json.loads(data[8:size]).items():
            if name == "__metadata__":
                continue
            start, end = entry["data_offsets"]
            part = data[size + start : size + end]
            if entry["dtype"] == "BF16":
                values = (np.frombuffer(part, np.uint16).astype(np.uint32) << 16).view(np.float32)
            else:
                values = np.frombuffer(part, {"F32": np.float32, "F16": np.float16}[entry["dtype"]])
            tensors[name] = values.astype(np.float32).reshape(entry["shape"])
    return config, tensors


def expected(directory: Path) -> dict[str, Floats]:
    """The tensors under the names that the package has for them, experts in stacks."""
    config, tensors = checkpoint(directory)
    names = gguf.get_tensor_name_map(ARCHITECTURES[config["model_type"]], config["num_hidden_layers"])
    for layer in range(config["num_hidden_layers"]):
        for proj in ("gate_proj", "up_proj", "down_proj"):
            prefix = f"model.layers.{layer}.mlp.experts"
            each = [f"{prefix}.{i}.{proj}.weight" for i in range(config.get("num_experts", 0))]
            if each:
                tensors[f"{prefix}.{proj}.weight"] = np.stack([tensors.pop(name) for name in each])
    renamed: dict[str, Floats] = {}
    for name, values in tensors.items():
        new = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert new is not None, name
        # One row is a vector for llama.cpp.
        renamed[new] = values[0] if name.endswith("shared_expert_gate.weight") else values
    return renamed


def numbers(tensor: gguf.ReaderTensor) -> Floats:
    """What a tensor stands for, in the shape of the checkpoint."""
    values: Floats = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    return values.reshape([int(dim) for dim in reversed(tensor.shape)])


def field(reader: gguf.GGUFReader, key: str) -> Any:
    found = reader.get_field(key)
    assert found is not None, key
    return found.contents()


@pytest.mark.parametrize("name", ["demo", "untied", "f16", "bf16_shards", "head_dim_explicit", "moe"])
def test_a_converted_checkpoint_has_the_tensors_of_the_package(name: str, tmp_path: Path) -> None:
    source = DEMO if name == "demo" else fixture_directory(name)
    qwen2_rs.convert(source, tmp_path / "model.gguf")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    want = expected(source)
    got = {tensor.name: tensor for tensor in reader.tensors}
    assert len(got) == len(reader.tensors)
    assert got.keys() == want.keys()
    stored = {"f16": "F16", "untied": "F32", "head_dim_explicit": "F32", "moe": "F32"}.get(name, "BF16")
    for key, tensor in got.items():
        kind = "F32" if want[key].ndim == 1 else stored
        assert tensor.tensor_type.name == kind, key
        assert tensor.data_offset % reader.alignment == 0
        np.testing.assert_array_equal(numbers(tensor), want[key], err_msg=key)


@pytest.mark.parametrize(("precision", "kind"), [("q8", "Q8_0"), ("q4", "Q4_0")])
def test_a_quantized_file_stands_for_numbers_near_the_checkpoints(
    precision: str, kind: str, tmp_path: Path
) -> None:
    qwen2_rs.quantize(DEMO, tmp_path / "model.gguf", precision)
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    want = expected(DEMO)
    assert {tensor.name for tensor in reader.tensors} == want.keys()
    for tensor in reader.tensors:
        values, exact = numbers(tensor), want[tensor.name]
        if exact.ndim == 1:
            assert tensor.tensor_type.name == "F32"
            np.testing.assert_array_equal(values, exact)
            continue
        # The table is the head as well, and stays in eight bits.
        eight = precision == "q8" or tensor.name == "token_embd.weight"
        assert tensor.tensor_type.name == ("Q8_0" if eight else kind)
        blocks = exact.reshape(-1, 32)
        step = np.abs(blocks).max(1, keepdims=True) / (127 if eight else 8)
        error = np.abs(values.reshape(-1, 32) - blocks)
        # A scale is fitted to all of its block, so single numbers are off by more than half a step.
        assert (error <= step).all(), tensor.name
        assert math.sqrt((error**2).mean() / (blocks**2).mean()) < (0.006 if eight else 0.1), tensor.name


@pytest.mark.parametrize("name", ["untied", "moe"])
def test_the_metadata_is_the_config_and_the_tokenizer(name: str, tmp_path: Path) -> None:
    source = fixture_directory(name)
    qwen2_rs.convert(source, tmp_path / "model.gguf")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    config = json.loads((source / "config.json").read_text())
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    settings = json.loads((source / "tokenizer_config.json").read_text())
    architecture = config["model_type"].replace("_", "")
    assert field(reader, gguf.Keys.General.ARCHITECTURE) == architecture
    rope = config.get("rope_parameters") or config
    want = {
        gguf.Keys.LLM.BLOCK_COUNT: config["num_hidden_layers"],
        gguf.Keys.LLM.CONTEXT_LENGTH: config["max_position_embeddings"],
        gguf.Keys.LLM.EMBEDDING_LENGTH: config["hidden_size"],
        gguf.Keys.LLM.FEED_FORWARD_LENGTH: config["intermediate_size"],
        gguf.Keys.Attention.HEAD_COUNT: config["num_attention_heads"],
        gguf.Keys.Attention.HEAD_COUNT_KV: config["num_key_value_heads"],
        gguf.Keys.Attention.LAYERNORM_RMS_EPS: pytest.approx(config["rms_norm_eps"]),
        gguf.Keys.Rope.FREQ_BASE: rope["rope_theta"],
    }
    if name == "moe":
        want |= {
            gguf.Keys.LLM.EXPERT_COUNT: config["num_experts"],
            gguf.Keys.LLM.EXPERT_USED_COUNT: config["num_experts_per_tok"],
            gguf.Keys.LLM.EXPERT_FEED_FORWARD_LENGTH: config["moe_intermediate_size"],
            gguf.Keys.LLM.EXPERT_SHARED_FEED_FORWARD_LENGTH: config["shared_expert_intermediate_size"],
        }
    for key, value in want.items():
        assert field(reader, key.format(arch=architecture)) == value, key
    tokens = field(reader, gguf.Keys.Tokenizer.LIST)
    kinds = field(reader, gguf.Keys.Tokenizer.TOKEN_TYPE)
    assert len(tokens) == len(kinds) == config["vocab_size"]
    for token, number in tokenizer["model"]["vocab"].items():
        assert (tokens[number], kinds[number]) == (token, gguf.TokenType.NORMAL)
    for added in tokenizer["added_tokens"]:
        assert (tokens[added["id"]], kinds[added["id"]]) == (added["content"], gguf.TokenType.CONTROL)
    assert field(reader, gguf.Keys.Tokenizer.MERGES) == tokenizer["model"]["merges"]
    assert field(reader, gguf.Keys.Tokenizer.CHAT_TEMPLATE) == settings["chat_template"]
    assert tokens[field(reader, gguf.Keys.Tokenizer.EOS_ID)] == settings["eos_token"]
    assert field(reader, gguf.Keys.Tokenizer.PRE) == "qwen2"


def test_yarn_is_under_the_keys_of_the_package(tmp_path: Path) -> None:
    qwen2_rs.convert(fixture_directory("yarn5"), tmp_path / "model.gguf")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    rope = json.loads((fixture_directory("yarn5") / "config.json").read_text())["rope_parameters"]
    own = 0.1 * math.log(rope["factor"]) + 1
    want = {
        gguf.Keys.Rope.SCALING_TYPE: "yarn",
        gguf.Keys.Rope.SCALING_FACTOR: rope["factor"],
        gguf.Keys.Rope.SCALING_ORIG_CTX_LEN: rope["original_max_position_embeddings"],
        gguf.Keys.Rope.SCALING_ATTN_FACTOR: pytest.approx(rope["attention_factor"] / own),
        gguf.Keys.Rope.SCALING_YARN_BETA_FAST: pytest.approx(rope["beta_fast"]),
        gguf.Keys.Rope.SCALING_YARN_BETA_SLOW: pytest.approx(rope["beta_slow"]),
    }
    for key, value in want.items():
        assert field(reader, key.format(arch="qwen2")) == value, key
