#!/usr/bin/env python3
"""Times qwen2 and its peers on one random checkpoint, in alternation, and prints medians and ratios.

    python3 benches/peers/run.py --rounds 5

Every peer lives in a virtual environment of its own under --work, made from PyPI when it is missing
(candle is built from crates.io, for this machine), and runs in a process of its own: load, one warm-up, a
prompt of --prompt tokens, --new tokens after it. The engines take turns within a round, so that a machine
whose memory is slower for a while is slow for all of them; only ratios of one run count. Needs Python 3.10
with venv, a Rust toolchain, a C++ compiler with cmake (llama-cpp-python is built here) and 8 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SHAPES = {
    "0.5b": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
    },
    "1.5b": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
    },
}
PACKAGES = {
    "transformers": ["torch", "transformers"],
    "llama.cpp": ["llama-cpp-python"],
    "openvino": ["openvino-genai", "optimum-intel[openvino]"],
    "ctranslate2": ["ctranslate2", "torch", "transformers"],
    "onnxruntime": ["onnxruntime-genai", "onnx", "onnx-ir", "torch", "transformers"],
}


CANDLE = "candle"


@dataclass(frozen=True)
class Engine:
    """One row of the table."""

    name: str
    bits: str
    venv: str | None  # None: our own command; CANDLE: the program beside this script
    arguments: tuple[str, ...]


def engines(work: Path, shape: str) -> list[Engine]:
    """All rows; ours first within each precision."""
    model = work / shape

    def ours(bits: str, directory: str, *more: str) -> Engine:
        return Engine("qwen2", bits, None, (str(model / directory), *more))

    def llama(name: str, bits: str) -> Engine:
        return Engine("llama.cpp " + name, bits, "llama.cpp", (str(model / f"{name}.gguf"),))

    def candle(name: str, bits: str) -> Engine:
        return Engine("candle " + name, bits, CANDLE, (str(model / f"{name}.gguf"),))

    def openvino(name: str, bits: str) -> Engine:
        return Engine("OpenVINO " + name, bits, "openvino", (str(model / f"openvino-{name}"),))

    return [
        ours("bf16", "checkpoint", "--activations", "bf16"),
        llama("BF16", "bf16"),
        openvino("fp16", "bf16"),
        Engine("transformers bf16", "bf16", "transformers", (str(model / "checkpoint"),)),
        Engine("candle f32", "bf16", CANDLE, (str(model / "checkpoint"),)),
        ours("q8", "q8"),
        llama("Q8_0", "q8"),
        openvino("int8", "q8"),
        Engine("CTranslate2 int8", "q8", "ctranslate2", (str(model / "ctranslate2-int8"),)),
        candle("Q8_0", "q8"),
        ours("q4", "q4"),
        llama("Q4_0", "q4"),
        llama("Q4_K_M", "q4"),
        openvino("int4", "q4"),
        Engine("onnxruntime-genai int4", "q4", "onnxruntime", (str(model / "onnxruntime-int4"),)),
        candle("Q4_0", "q4"),
        candle("Q4_K_M", "q4"),
    ]


def main() -> None:
    arguments = parse()
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    chosen = [
        e
        for e in engines(work, arguments.shape)
        if any(word in f"{e.name} {e.bits}" for word in arguments.only)
    ]
    prepare(work, arguments.shape, chosen)
    runs: dict[Engine, list[dict[str, float]]] = {engine: [] for engine in chosen}
    for number in range(arguments.rounds):
        for engine in chosen:
            print(f"round {number + 1}: {engine.name} {engine.bits}", file=sys.stderr, flush=True)
            runs[engine].append(run(engine, work, arguments))
    report(runs, arguments)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="0.5b")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--new", type=int, default=128, help="tokens to produce")
    parser.add_argument(
        "--only", nargs="+", default=[""], metavar="WORD", help="rows whose name has one of these"
    )
    parser.add_argument(
        "--work", type=Path, default=ROOT / "target" / "peers", help="for environments and models"
    )
    parser.add_argument("--json", action="store_true", help="all figures of all rounds")
    return parser.parse_args()


def python(work: Path, venv: str) -> Path:
    return work / "venv" / venv / "bin" / "python"


def prepare(work: Path, shape: str, chosen: list[Engine]) -> None:
    """Makes what is missing: environments, the checkpoint, its conversions, our command."""
    checkpoint = work / shape / "checkpoint"
    venvs = {"transformers"} | {engine.venv for engine in chosen if engine.venv}
    if CANDLE in venvs:
        venvs = venvs - {CANDLE} | {"llama.cpp"}  # which quantizes its files
        build = ["cargo", "build", "--release", "--quiet", "--manifest-path", HERE / "candle" / "Cargo.toml"]
        native = {**os.environ, "RUSTFLAGS": "-C target-cpu=native"}  # as candle's README has it
        subprocess.run([*build, "--target-dir", work / CANDLE], env=native, check=True)
    for venv in sorted(venvs):
        if not python(work, venv).exists():
            subprocess.run([sys.executable, "-m", "venv", work / "venv" / venv], check=True)
            subprocess.run(
                [python(work, venv), "-m", "pip", "install", "--quiet", *PACKAGES[venv]], check=True
            )
    if not (checkpoint / "model.safetensors").exists():
        config = json.dumps(SHAPES[shape])
        subprocess.run([python(work, "transformers"), HERE / "checkpoint.py", config, checkpoint], check=True)
    subprocess.run(["cargo", "build", "--release", "--quiet", "-p", "qwen2-cli"], cwd=ROOT, check=True)
    for engine in chosen:
        target = Path(engine.arguments[0])
        if not target.exists():
            convert(work, engine, checkpoint, target)


def convert(work: Path, engine: Engine, checkpoint: Path, target: Path) -> None:
    if engine.venv is None:
        subprocess.run([command(), "quantize", checkpoint, target, "--precision", target.name], check=True)
    elif engine.venv in ("llama.cpp", CANDLE):
        source = target.with_name("BF16.gguf")
        if not source.exists():
            subprocess.run([command(), "convert", checkpoint, source], check=True)
        if not target.exists():
            subprocess.run([python(work, "llama.cpp"), HERE / "quantize_gguf.py", source, target], check=True)
    elif engine.venv == "onnxruntime":
        build = [python(work, "onnxruntime"), "-m", "onnxruntime_genai.models.builder"]
        subprocess.run([*build, "-i", checkpoint, "-o", target, "-p", "int4", "-e", "cpu"], check=True)
    elif engine.venv == "ctranslate2":
        converter = python(work, "ctranslate2").with_name("ct2-transformers-converter")
        form = target.name.removeprefix("ctranslate2-")
        words = ["--model", checkpoint, "--output_dir", target, "--quantization", form]
        subprocess.run([converter, *words], check=True)
    else:
        export = [
            python(work, "openvino").with_name("optimum-cli"),
            "export",
            "openvino",
            "--model",
            checkpoint,
        ]
        form = target.name.removeprefix("openvino-")
        task = "text-generation-with-past"
        subprocess.run([*export, "--task", task, "--weight-format", form, target], check=True)


def command() -> Path:
    return Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "release" / "qwen2"


def run(engine: Engine, work: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """prefill and decode in tokens a second, load in seconds, peak resident memory in MB."""
    threads, prompt, new = (str(n) for n in (arguments.threads, arguments.prompt, arguments.new))
    if engine.venv is None:
        sizes = ["--threads", threads, "--prompt", prompt, "--new", new]
        words = [command(), "bench", *engine.arguments, *sizes, "--repeat", "1", "--json"]
        found = output(words, threads)
        return {
            "load": found["load_s"],
            "prefill": found["prefill_tokens_per_s"],
            "decode": found["decode_tokens_per_s"],
            "memory": found["resident_bytes"] / 1e6,
            "share": found["decode_bandwidth_share"],
        }
    sizes = [threads, prompt, new]
    if engine.venv == CANDLE:
        return output([work / CANDLE / "release" / "engine-candle", *engine.arguments, *sizes], threads)
    script = HERE / f"engine_{engine.venv.replace('.', '_')}.py"
    return output([python(work, engine.venv), script, *engine.arguments, *sizes], threads)


def output(words: list[str | Path], threads: str) -> dict[str, float]:
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "RAYON_NUM_THREADS": threads}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, words))}\n{done.stderr}")
    return (
        json.loads(done.stdout.strip().splitlines()[-1]) if words[1] != "bench" else json.loads(done.stdout)
    )


def report(runs: dict[Engine, list[dict[str, float]]], arguments: argparse.Namespace) -> None:
    if arguments.json:
        rows = [{"engine": e.name, "bits": e.bits, "runs": found} for e, found in runs.items()]
        print(json.dumps(rows))
        return

    def median(engine: Engine, key: str) -> float:
        return statistics.median(found[key] for found in runs[engine])

    def ratio(engine: Engine, key: str) -> float:
        """Ours over this one's, the median of the ratios of the rounds."""
        ours = next((e for e in runs if e.venv is None and e.bits == engine.bits), engine)
        pairs = zip(runs[ours], runs[engine], strict=True)
        return statistics.median(mine[key] / other[key] for mine, other in pairs)

    print("| engine | bits | prefill tok/s | ours is | decode tok/s | ours is | load s | memory MB |")
    print("|---|---|---|---|---|---|---|---|")
    for e in runs:
        cells = [f"{median(e, 'prefill'):.0f}", f"{ratio(e, 'prefill'):.2f}×"]
        cells += [f"{median(e, 'decode'):.1f}", f"{ratio(e, 'decode'):.2f}×"]
        cells += [f"{median(e, 'load'):.2f}", f"{median(e, 'memory'):.0f}"]
        print(f"| {e.name} | {e.bits} | {' | '.join(cells)} |")
    shares = [f"{e.bits} {100 * median(e, 'share'):.0f} %" for e in runs if e.venv is None]
    print(f"\nOurs, decode over the memory's speed: {', '.join(shares)}.")


if __name__ == "__main__":
    main()
