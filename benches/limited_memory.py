"""A mixture of experts with less memory than its weights: limited_memory.py DIRECTORY [--limit MB].

Writes a checkpoint with layers of the 57B-A14B shape and random bf16 weights into DIRECTORY, unless one is
there, and runs it twice: with all memory, and in a control group (Linux, root) with a limit.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import time
from pathlib import Path
from random import Random
from typing import Any

CONFIG = {
    "model_type": "qwen2_moe",
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18_944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 2560,
    "shared_expert_intermediate_size": 20_480,
    "max_position_embeddings": 32_768,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 32_768,  # 151,936 in the published model, whose head no expert depends on
}
V1, V2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")


def shapes(layers: int) -> dict[str, list[int]]:
    """The tensors of the checkpoint."""
    hidden, vocab = CONFIG["hidden_size"], CONFIG["vocab_size"]
    found = {"model.embed_tokens.weight": [vocab, hidden], "lm_head.weight": [vocab, hidden]}

    def mlp(prefix: str, width: int) -> None:
        found[f"{prefix}.gate_proj.weight"] = found[f"{prefix}.up_proj.weight"] = [width, hidden]
        found[f"{prefix}.down_proj.weight"] = [hidden, width]

    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[f"{prefix}.{norm}.weight"] = [hidden]
        for name, rows in [("q", hidden), ("k", 512), ("v", 512)]:
            found[f"{prefix}.self_attn.{name}_proj.weight"] = [rows, hidden]
            found[f"{prefix}.self_attn.{name}_proj.bias"] = [rows]
        found[f"{prefix}.self_attn.o_proj.weight"] = [hidden, hidden]
        found[f"{prefix}.mlp.gate.weight"] = [CONFIG["num_experts"], hidden]
        found[f"{prefix}.mlp.shared_expert_gate.weight"] = [1, hidden]
        for expert in range(CONFIG["num_experts"]):
            mlp(f"{prefix}.mlp.experts.{expert}", CONFIG["moe_intermediate_size"])
        mlp(f"{prefix}.mlp.shared_expert", CONFIG["shared_expert_intermediate_size"])
    return found | {"model.norm.weight": [hidden]}


def write(directory: Path, layers: int) -> None:
    """Numbers between 0.008 and 0.03 of either sign; norms are 1."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": layers}))
    root = Path(__file__).resolve().parents[1]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_bytes((root / "conformance/models/tied" / name).read_bytes())
    header, end = {}, 0
    for name, shape in shapes(layers).items():
        start, end = end, end + 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header)
    text += " " * (-(len(text) + 8) % 64)  # the numbers begin at a multiple of 64
    numbers, signs = Random(0), bytes(0x3C if byte % 2 else 0xBC for byte in range(256))
    block = bytearray(64 << 20)
    block[0::2] = numbers.randbytes(32 << 20)
    block[1::2] = numbers.randbytes(32 << 20).translate(signs)
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text.encode())
        for name, entry in header.items():
            left = entry["data_offsets"][1] - entry["data_offsets"][0]
            if name.endswith("norm.weight"):
                file.write(b"\x80\x3f" * (left // 2))
                continue
            at = 2 * numbers.randrange(1 << 20)
            while left:
                left -= file.write(block[at : at + min(left, len(block) - at)])
                at = 0


def forget(directory: Path) -> None:
    """Takes the weights out of the page cache, so that whoever reads them is charged for them."""
    with (directory / "model.safetensors").open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class Group:
    """A control group with a limit of memory, of version 1 or 2."""

    def __init__(self, limit: int) -> None:
        """`limit` in bytes."""
        self.is_v1 = V1.is_dir()
        self.path = (V1 if self.is_v1 else V2) / "qwen2-limited"
        self.path.mkdir()
        self._file("memory.limit_in_bytes", "memory.max").write_text(str(limit))

    def _file(self, v1: str, v2: str) -> Path:
        return self.path / (v1 if self.is_v1 else v2)

    def enter(self) -> None:
        """Moves this process into the group."""
        (self.path / "cgroup.procs").write_text(str(os.getpid()))

    def peak(self) -> int:
        """Bytes, the page cache included."""
        return int(self._file("memory.max_usage_in_bytes", "memory.peak").read_text())

    def remove(self) -> None:
        """Only when nothing runs in it."""
        self.path.rmdir()


def run(qwen2: Path, directory: Path, options: list[str], group: Group | None) -> dict[str, Any]:
    """The bench's figures, and the tokens that the model goes on with from a prompt."""

    def output(command: list[Any]) -> dict[str, Any]:
        enter = group.enter if group else None
        done = subprocess.run(command, preexec_fn=enter, stdout=subprocess.PIPE, check=True)
        return json.loads(done.stdout)

    forget(directory)
    start = time.monotonic()
    generate = [qwen2, "generate", directory, "A mixture", "--greedy", "--max-new-tokens", "24", "--json"]
    tokens = output(generate)["tokens"]
    seconds = time.monotonic() - start
    figures = output([qwen2, "bench", directory, "--repeat", "1", "--json", *options])
    return {"generate_s": seconds, "tokens": tokens, **figures}


def main() -> None:
    """Prints a line for each run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--limit", type=int, default=2048, help="megabytes")
    parser.add_argument("--qwen2", type=Path, default=Path("target/release/qwen2"))
    parser.add_argument("--prompt", default="64")
    parser.add_argument("--new", default="32")
    options = parser.parse_args()
    if not options.directory.exists():
        write(options.directory, options.layers)
    size = (options.directory / "model.safetensors").stat().st_size
    bench = ["--prompt", options.prompt, "--new", options.new]
    whole = run(options.qwen2, options.directory, bench, None)
    group = Group(options.limit << 20)
    try:
        limited = run(options.qwen2, options.directory, bench, group)
        peak = group.peak()
    finally:
        group.remove()
    assert limited["tokens"] == whole["tokens"], "other tokens with less memory"
    for name, figures in [("all memory", whole), (f"{options.limit} MB", limited)]:
        print(
            f"{name:<12} weights {size / 1e9:.2f} GB, "
            f"prefill {figures['prefill_tokens_per_s']:.2f} tokens/s, "
            f"decode {figures['decode_tokens_per_s']:.2f} tokens/s, 24 tokens from a cold start "
            f"{figures['generate_s']:.1f} s"
        )
    print(f"peak of the group {peak / 1e9:.2f} GB, the same tokens")


if __name__ == "__main__":
    main()
