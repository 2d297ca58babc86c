"""Makes fuzz/corpus: small valid inputs of every target, and the shapes that they are damaged from."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
CONFORMANCE = HERE.parent / "conformance"
BREAK = b"\n%%%%\n"  # between the files of one input: src/sections.rs

Shapes = dict[str, tuple[str, list[int]]]
SIZES = {"F32": 4, "F16": 2, "BF16": 2, "I32": 4, "U8": 1}


def main() -> None:
    """Writes all of them."""
    for target, make in TARGETS.items():
        directory = HERE / "corpus" / target
        directory.mkdir(parents=True, exist_ok=True)
        for old in directory.iterdir():
            old.unlink()
        for name, contents in make().items():
            (directory / name).write_bytes(contents)


def dump(value: Any) -> bytes:
    """Short JSON."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def noise(size: int) -> bytes:
    """Contents of a tensor."""
    return bytes(place % 61 for place in range(size))


def safetensors(shapes: Shapes, contents: Callable[[str, int], bytes] | None = None) -> bytes:
    """A file of these tensors; `contents` makes the bytes of one by name and size."""
    header, data = {}, b""
    for name, (dtype, shape) in shapes.items():
        size = SIZES[dtype]
        for dim in shape:
            size *= dim
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + size]}
        data += contents(name, size) if contents else noise(size)
    text = dump(header)
    return struct.pack("<Q", len(text)) + text + data


# ------------------------------------------------------------------------------------- models


def model_config(**changes: Any) -> dict[str, Any]:
    """A model of one layer, 4 wide."""
    sizes = {
        "hidden_size": 4,
        "intermediate_size": 4,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 4,
    }
    return {"model_type": "qwen2", **sizes, "tie_word_embeddings": True, **changes}


def layer(hidden: int, kv: int, dtype: str) -> Shapes:
    """Norms and attention."""
    prefix = "model.layers.0"
    shapes: Shapes = {
        f"{prefix}.{norm}.weight": (dtype, [hidden])
        for norm in ("input_layernorm", "post_attention_layernorm")
    }
    for name, rows in [("q", hidden), ("k", kv), ("v", kv)]:
        shapes[f"{prefix}.self_attn.{name}_proj.weight"] = (dtype, [rows, hidden])
        shapes[f"{prefix}.self_attn.{name}_proj.bias"] = (dtype, [rows])
    shapes[f"{prefix}.self_attn.o_proj.weight"] = (dtype, [hidden, hidden])
    return shapes


def mlp(prefix: str, hidden: int, width: int, dtype: str) -> Shapes:
    """Three matrices."""
    return {
        f"{prefix}.gate_proj.weight": (dtype, [width, hidden]),
        f"{prefix}.up_proj.weight": (dtype, [width, hidden]),
        f"{prefix}.down_proj.weight": (dtype, [hidden, width]),
    }


def outside(hidden: int, vocab: int, dtype: str) -> Shapes:
    """The table and the last norm."""
    return {
        "model.embed_tokens.weight": (dtype, [vocab, hidden]),
        "model.norm.weight": (dtype, [hidden]),
    }


def dense(dtype: str) -> Shapes:
    """The tensors of `model_config`."""
    return {**outside(4, 4, dtype), **layer(4, 2, dtype), **mlp("model.layers.0.mlp", 4, 4, dtype)}


def checkpoints() -> dict[str, bytes]:
    """config.json, generation_config.json, index, first file, second file."""
    config, generation = dump(model_config()), dump({"eos_token_id": [2, 3], "top_k": 20})
    moe_keys = {
        "model_type": "qwen2_moe",
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 2,
        "shared_expert_intermediate_size": 4,
    }
    moe = {**outside(4, 4, "BF16"), **layer(4, 2, "BF16")}
    for expert in range(2):
        moe |= mlp(f"model.layers.0.mlp.experts.{expert}", 4, 2, "BF16")
    moe |= mlp("model.layers.0.mlp.shared_expert", 4, 4, "BF16")
    moe |= {
        "model.layers.0.mlp.gate.weight": ("BF16", [2, 4]),
        "model.layers.0.mlp.shared_expert_gate.weight": ("BF16", [1, 4]),
    }
    tensors = dense("F16")
    first = dict(list(tensors.items())[:6])
    second = dict(list(tensors.items())[6:])
    index = dict.fromkeys(first, "a.safetensors") | dict.fromkeys(second, "b.safetensors")
    return {
        "single": BREAK.join([config, generation, b"", safetensors(dense("F32"))]),
        "head": BREAK.join([config, b"", b"", safetensors(tensors | {"lm_head.weight": ("F16", [4, 4])})]),
        "shards": BREAK.join(
            [config, generation, dump({"weight_map": index}), safetensors(first), safetensors(second)]
        ),
        "experts": BREAK.join([dump(model_config(**moe_keys)), b"", b"", safetensors(moe)]),
        "packed": BREAK.join([dump(model_config(quantization_config=PACKED)), b"", b"", packed()]),
        "metadata": BREAK.join([config, dump({"eos_token_id": 2, "temperature": 0.7}), b"", with_metadata()]),
        "empty": BREAK.join([config, b"", b"", safetensors({})]),
        "nothing": BREAK.join([config, b"", b"", safetensors(tensors | {"extra": ("F32", [0, 3])})]),
    }


PACKED = {"quant_method": "qwen2-packed", "version": 1, "bits": 8}


def packed() -> bytes:
    """Matrices in panels of 16 rows, 64 columns and their scales; vectors in f32."""
    shapes = {
        name: ("U8", [1, 64 * 16 + 64]) if len(shape) > 1 else ("F32", shape)
        for name, (_, shape) in dense("F32").items()
    }
    return safetensors(shapes)


def with_metadata() -> bytes:
    """A header with free text, and padded as the format's own crate pads it."""
    file = safetensors(dense("BF16"))
    size = struct.unpack("<Q", file[:8])[0]
    header = {"__metadata__": {"format": "pt"}} | json.loads(file[8 : 8 + size])
    text = dump(header)
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + file[8 + size :]


def groups() -> dict[str, bytes]:
    """`quantization_config` and the weights of a model 16 wide: src/entries.rs."""
    matrices = {
        "self_attn.q_proj": (16, 16),
        "self_attn.k_proj": (8, 16),
        "self_attn.v_proj": (8, 16),
        "self_attn.o_proj": (16, 16),
        "mlp.gate_proj": (24, 16),
        "mlp.up_proj": (24, 16),
        "mlp.down_proj": (16, 24),
    }
    inputs = {}
    for name, bits, order, settings in [
        ("gptq4", 4, False, {"quant_method": "gptq"}),
        ("gptq4_order", 4, True, {"quant_method": "gptq", "desc_act": True}),
        ("gptq8_v2", 8, False, {"quant_method": "gptq", "checkpoint_format": "gptq_v2"}),
        ("awq", 4, False, {"quant_method": "awq", "version": "gemm"}),
        ("gptq8_order", 8, True, {"quant_method": "gptq", "desc_act": True, "sym": False}),
        ("gptq4_biases", 4, False, {"quant_method": "gptq", "sym": True}),
    ]:
        per_word = 32 // bits
        shapes = {**outside(16, 8, "F16")}
        shapes |= {name: shape for name, shape in layer(16, 8, "F16").items() if "proj.weight" not in name}
        for matrix, (outputs, columns) in matrices.items():
            stem = f"model.layers.0.{matrix}"
            awq = settings["quant_method"] == "awq"
            packed = [columns, outputs // per_word] if awq else [columns // per_word, outputs]
            shapes[f"{stem}.qweight"] = ("I32", packed)
            shapes[f"{stem}.qzeros"] = ("I32", [columns // 8, outputs // per_word])
            shapes[f"{stem}.scales"] = ("F16", [columns // 8, outputs])
            if order:
                shapes[f"{stem}.g_idx"] = ("I32", [columns])
            if name.endswith("biases"):
                shapes[f"{stem}.bias"] = ("F16", [outputs])

        def contents(name: str, size: int) -> bytes:
            if not name.endswith("g_idx"):
                return noise(size)
            return b"".join(struct.pack("<i", place % (size // 32)) for place in range(size // 4))

        quantization = dump({**settings, "bits": bits, "group_size": 8})
        inputs[name] = quantization + BREAK + safetensors(shapes, contents)
    return inputs


# ------------------------------------------------------------------------------------- GGUF

UINT32, FLOAT32, BOOL, STRING, ARRAY, INT32 = 4, 6, 7, 8, 9, 5
GGML = {
    "F32": (0, 1, 4),
    "F16": (1, 1, 2),
    "Q4_0": (2, 32, 18),
    "Q4_1": (3, 32, 20),
    "Q5_0": (6, 32, 22),
    "Q5_1": (7, 32, 24),
    "Q8_0": (8, 32, 34),
    "Q2_K": (10, 256, 84),
    "Q3_K": (11, 256, 110),
    "Q4_K": (12, 256, 144),
    "Q5_K": (13, 256, 176),
    "Q6_K": (14, 256, 210),
    "IQ4_NL": (20, 32, 18),
    "BF16": (30, 1, 2),
}


def gguf_text(text: str) -> bytes:
    """A string with its length."""
    return struct.pack("<Q", len(text.encode())) + text.encode()


def gguf_value(value: Any) -> bytes:
    """A value with its type."""
    match value:
        case bool():
            return struct.pack("<IB", BOOL, value)
        case int():
            return struct.pack("<II", UINT32, value)
        case float():
            return struct.pack("<If", FLOAT32, value)
        case str():
            return struct.pack("<I", STRING) + gguf_text(value)
        case [str(), *_]:
            items = b"".join(map(gguf_text, value))
            return struct.pack("<IIQ", ARRAY, STRING, len(value)) + items
        case _:
            return struct.pack("<IIQ", ARRAY, INT32, len(value)) + struct.pack(f"<{len(value)}i", *value)


def gguf_file(keys: dict[str, Any], tensors: dict[str, tuple[str, list[int]]]) -> bytes:
    """A file of version 3; shapes as in a checkpoint, the longest stride first."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys))
    for key, value in keys.items():
        head += gguf_text(key) + gguf_value(value)
    data = b""
    for name, (kind, shape) in tensors.items():
        number, block, size = GGML[kind]
        for dim in shape:
            size *= dim
        data += bytes(-len(data) % 32)
        head += gguf_text(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape[::-1])
        head += struct.pack("<IQ", number, len(data))
        data += noise(size // block)
    return head + bytes(-len(head) % 32) + data


def ggufs() -> dict[str, bytes]:
    """A dense model and one of experts, 32 wide."""
    tokens = ["a", "b", "ab", "Ġ", "<|endoftext|>", "<|im_end|>"]

    def keys(architecture: str, **more: Any) -> dict[str, Any]:
        own = {
            "block_count": 1,
            "context_length": 64,
            "embedding_length": 32,
            "feed_forward_length": 32,
            "attention.head_count": 2,
            "attention.head_count_kv": 1,
            "attention.layer_norm_rms_epsilon": 1e-6,
            "rope.freq_base": 1e4,
            **more,
        }
        vocabulary = {
            "model": "gpt2",
            "pre": "qwen2",
            "tokens": tokens,
            "token_type": [1, 1, 1, 1, 3, 3],
            "merges": ["a b"],
            "eos_token_id": 5,
        }
        return {
            "general.architecture": architecture,
            **{f"{architecture}.{key}": value for key, value in own.items()},
            **{f"tokenizer.ggml.{key}": value for key, value in vocabulary.items()},
            "tokenizer.chat_template": "{{ messages[0].content }}",
        }

    def tensors(kind: str) -> dict[str, tuple[str, list[int]]]:
        shapes: dict[str, tuple[str, list[int]]] = {
            "token_embd.weight": (kind, [6, 32]),
            "output_norm.weight": ("F32", [32]),
            "blk.0.attn_norm.weight": ("F32", [32]),
            "blk.0.ffn_norm.weight": ("F32", [32]),
            "blk.0.attn_output.weight": (kind, [32, 32]),
        }
        for part, rows in [("q", 32), ("k", 16), ("v", 16)]:
            shapes[f"blk.0.attn_{part}.weight"] = (kind, [rows, 32])
            shapes[f"blk.0.attn_{part}.bias"] = ("F32", [rows])
        return shapes

    def feed_forward(kind: str, suffix: str) -> dict[str, tuple[str, list[int]]]:
        return {f"blk.0.ffn_{part}{suffix}.weight": (kind, [32, 32]) for part in ("gate", "up", "down")}

    experts = {f"blk.0.ffn_{part}_exps.weight": ("Q4_0", [2, 32, 32]) for part in ("gate", "up", "down")}
    routers = {
        "blk.0.ffn_gate_inp.weight": ("F32", [2, 32]),
        "blk.0.ffn_gate_inp_shexp.weight": ("F32", [32]),
    }
    yarn = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}
    all_of_yarn = {
        **yarn,
        "rope.scaling.original_context_length": 16,
        "rope.scaling.attn_factor": 1.1,
        "rope.scaling.yarn_ext_factor": 0.5,
        "rope.scaling.yarn_attn_factor": 1.0,
        "rope.scaling.yarn_beta_fast": 24.0,
        "rope.scaling.yarn_beta_slow": 2.0,
        "rope.scaling.finetuned": True,
    }
    olds = ["Q4_1", "Q5_0", "Q5_1"]
    # Blocks are 256 wide, so all else is narrow.
    wide = {"embedding_length": 256, "feed_forward_length": 2, "attention.key_length": 2}
    k_quants: dict[str, tuple[str, list[int]]] = {
        "token_embd.weight": ("Q6_K", [6, 256]),
        "output_norm.weight": ("F32", [256]),
        "blk.0.attn_norm.weight": ("F32", [256]),
        "blk.0.ffn_norm.weight": ("F32", [256]),
        "blk.0.attn_output.weight": ("F16", [256, 4]),
        "blk.0.ffn_gate.weight": ("Q2_K", [2, 256]),
        "blk.0.ffn_up.weight": ("Q3_K", [2, 256]),
        "blk.0.ffn_down.weight": ("F16", [256, 2]),
    }
    for part, kind, rows in [("q", "Q4_K", 4), ("k", "Q5_K", 2), ("v", "Q6_K", 2)]:
        k_quants[f"blk.0.attn_{part}.weight"] = (kind, [rows, 256])
        k_quants[f"blk.0.attn_{part}.bias"] = ("F32", [rows])
    moe = {"expert_count": 2, "expert_used_count": 1, "expert_feed_forward_length": 32}
    return {
        "q8": gguf_file(keys("qwen2"), tensors("Q8_0") | feed_forward("Q8_0", "")),
        "mixed": gguf_file(keys("qwen2", **yarn), tensors("Q4_0") | feed_forward("IQ4_NL", "")),
        "experts": gguf_file(
            keys("qwen2moe", **moe), tensors("Q4_0") | experts | routers | feed_forward("Q4_0", "_shexp")
        ),
        "vocabulary": gguf_file(keys("qwen2"), {"token_embd.weight": ("F16", [6, 4])}),
        "yarn": gguf_file(keys("qwen2", **all_of_yarn), tensors("BF16") | feed_forward("F16", "")),
        "old": gguf_file(
            keys("qwen2"),
            tensors("Q5_0")
            | {
                f"blk.0.ffn_{part}.weight": (kind, [32, 32])
                for part, kind in zip(("gate", "up", "down"), olds, strict=True)
            },
        ),
        "k_quants": gguf_file(keys("qwen2", **wide), k_quants),
        "part": gguf_file(
            keys("qwen2") | {"split.no": 0, "split.count": 2, "split.tensors.count": 2},
            {"token_embd.weight": ("Q8_0", [6, 32])},
        ),
    }


# ------------------------------------------------------------------------------------- texts


def configs() -> dict[str, bytes]:
    """config.json in both forms, and generation_config.json."""
    files = {
        name: CONFORMANCE / "models" / name / "config.json" for name in ("dual_chunk_yarn", "moe5", "yarn5")
    }
    files |= {"sliding": CONFORMANCE / "models/sliding5/config.json"}
    files |= {"grouped": CONFORMANCE / "grouped/gptq4/config.json"}
    files |= {"generation": CONFORMANCE / "models/tied/generation_config.json"}
    inputs = {name: dump(json.loads(path.read_text())) for name, path in files.items()}
    inputs["packed"] = dump(model_config(quantization_config=PACKED))
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    vllm = {"attn_factor": 1.1, "extrapolation_factor": 0.5, "apply_yarn_scaling": False, "truncate": False}
    mscale = {"mscale": 0.7, "mscale_all_dim": 1.0, "beta_fast": 24, "beta_slow": 2}
    awq = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
    for name, changes in [
        ("vllm", {"rope_scaling": yarn | vllm}),
        ("mscale", {"rope_scaling": yarn | mscale}),
        ("awq", {"quantization_config": awq}),
        ("nulls", {"head_dim": None, "rope_scaling": None, "sliding_window": None, "eos_token_id": None}),
        ("window", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}),
    ]:
        inputs[name] = dump(model_config(**changes))
    return inputs


def tokenizers() -> dict[str, bytes]:
    """tokenizer.json, tokenizer_config.json, chat_template.jinja, a text."""
    whole = json.loads((CONFORMANCE / "models/tied/tokenizer.json").read_text())
    whole["model"]["merges"] = whole["model"]["merges"][:8]
    config = {
        "eos_token": {"content": "<|im_end|>"},
        "pad_token": "<|endoftext|>",
        "chat_template": "{{ messages[0].content + eos_token }}",
        "added_tokens_decoder": {"294": {"content": "<|endoftext|>", "special": True}},
    }
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    small: dict[str, Any] = {
        "added_tokens": [{**whole["added_tokens"][0], "id": 4, "content": "<e>"}],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": level,
        "decoder": level,
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2, "Ġ": 3}, "merges": [["a", "b"]]},
    }
    sided = {**small["added_tokens"][0], "lstrip": True, "rstrip": True, "special": False}
    single = {**small["added_tokens"][0], "id": 5, "content": "<s>", "single_word": True, "normalized": True}
    flags = {**small, "added_tokens": [sided, single], "normalizer": None}
    split = {"type": "Split", "pattern": {"String": " "}, "behavior": "Isolated", "invert": False}
    sequence = {"type": "Sequence", "pretokenizers": [split, level]}
    pairs = {**small, "pre_tokenizer": sequence, "post_processor": level, "added_tokens": []}
    pairs["model"] = {**small["model"], "merges": ["a b"], "dropout": None, "fuse_unk": False}
    text = "Hello, wörld 123 <|im_end|>\n".encode()
    return {
        "whole": BREAK.join([dump(whole), dump(config), b"", text]),
        "small": BREAK.join([dump(small), b"", b"{{ messages[0].content }}", b"ab a <e>b"]),
        "flags": BREAK.join([dump(flags), b"", b"", b"ab  <e>  <s>b a<e>"]),
        "pairs": BREAK.join([dump(pairs), dump({"unk_token": None}), b"", b"ab\xffab \xe4\xbd\xa0"]),
    }


def templates() -> dict[str, bytes]:
    """A chat template, and messages line by line."""
    chatml = json.loads((CONFORMANCE / "models/tied/tokenizer_config.json").read_text())["chat_template"]
    macros = (
        "{% macro turn(m) %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>{% endmacro %}"
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{{ turn(m) }}"
        "{% if loop.last and not m.content.startswith('x') %}{{ m | tojson }}{% endif %}"
        "{% endfor %}{{ ns.n }}"
    )
    methods = (
        "{{ messages[0].content.split(' ') | join('-') }}"
        "{{ messages[-1]['content'].upper().replace('A', 'bb') }}"
        "{{ '%s' | format(bos_token) }}{{ strftime_now('%d %b %Y') }}{{ range(3) | list }}"
        "{% if messages | length > 5 %}{{ raise_exception('too many') }}{% endif %}"
    )
    tools = (
        "{%- if tools %}{{- '# Tools\n' }}{%- for tool in tools %}{{- '\n' ~ (tool | tojson(indent=2)) }}"
        "{%- endfor %}{%- endif %}{%- for m in messages[::-1] %}{%- set i = loop.revindex0 %}"
        "{%- if m.role in ['user', 'system'] and loop.index0 is even %}{{- m.content[:5] ~ i }}"
        "{%- elif m.tool_calls is defined %}{%- break %}{%- else %}{%- continue %}{%- endif %}{%- endfor %}"
        "{%- filter upper %}{{ messages | map(attribute='content') | join(',') }}{%- endfilter %}"
    )
    numbers = (
        "{% set ns = namespace(sum=0) %}{% for i in range(1, 9, 3) %}{% set ns.sum = ns.sum + i ** 2 %}"
        "{% endfor %}{{ ns.sum // 7 }} {{ 7.5 % 2 }} {{ messages | length * 'x' }} {{ [1, 2] + [3] }} "
        "{{ {'a': 1}.items() | list }} {{ 'b' in {'b': none} }} {{ messages | tojson | length }}"
    )
    messages = b"Hello there\nGood day <|im_end|>\nA third"
    return {
        name: template.encode() + BREAK + messages
        for name, template in [
            ("chatml", chatml),
            ("macros", macros),
            ("methods", methods),
            ("numbers", numbers),
            ("tools", tools),
        ]
    }


def adapters() -> dict[str, bytes]:
    """adapter_config.json and adapter_model.safetensors, for matrices of 4 by 8."""
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none"}
    shapes: Shapes = {}
    for name, rank in [("q", 2), ("v", 3)]:
        stem = f"base_model.model.model.layers.0.self_attn.{name}_proj"
        shapes[f"{stem}.lora_A.weight"] = ("F32", [rank, 8])
        shapes[f"{stem}.lora_B.weight"] = ("F32", [4, rank])
    patterns = {"rank_pattern": {"v_proj": 3}, "alpha_pattern": {r".*\.0\..*q_proj": 8}, "use_rslora": True}
    one = {name: shape for name, shape in shapes.items() if "q_proj" in name}
    halves = {name: ("BF16", shape) for name, (_, shape) in one.items()}
    whole = {"base_model.model.lm_head.weight": ("F16", [4, 8])}
    nulls = {
        "use_dora": False,
        "bias": "none",
        "modules_to_save": None,
        "rank_pattern": {},
        "fan_in_fan_out": False,
    }
    return {
        "halves": dump(settings | nulls | {"lora_alpha": 0.5}) + BREAK + safetensors(halves),
        "refused": dump(settings | {"use_dora": True}) + BREAK + safetensors(one | whole),
        "plain": dump(settings) + BREAK + safetensors(one),
        "patterns": dump(settings | patterns) + BREAK + safetensors(shapes),
    }


TARGETS = {
    "adapter": adapters,
    "checkpoint": checkpoints,
    "config": configs,
    "gguf": ggufs,
    "grouped": groups,
    "template": templates,
    "tokenizer": tokenizers,
}

if __name__ == "__main__":
    main()
