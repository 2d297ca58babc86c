#!/usr/bin/env python3
"""What models take in memory, as the table of docs/formats.md: sizes.py QWEN2 CONFIG.json…"""

import json
import subprocess
import sys

CONTEXTS = (32768, 131072)
CACHES = ("f16", "q8", "q4")


def info(program: str, config: str, *options: str) -> dict:
    command = [program, "info", config, "--device", "cpu", "--json", *options]
    return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)


def gb(n_bytes: int) -> str:
    gigabytes = n_bytes / 1e9
    return f"{gigabytes:.2f}" if gigabytes < 10 else f"{gigabytes:.1f}"


def row(program: str, config: str) -> str:
    plain = info(program, config)
    cells = [plain["name"], f"{plain['parameters'] / 1e9:.2f}"]
    cells += [gb(plain["weight_bytes"])]
    cells += [gb(info(program, config, "--quantize", kind)["weight_bytes"]) for kind in ("q8", "q4")]
    for context in CONTEXTS:
        caches = info(program, config, "--context-length", str(context))["cache_bytes_by_type"]
        cells += [" / ".join(gb(caches[kind]) for kind in CACHES)]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    program, *configs = sys.argv[1:]
    print("| model | parameters, 10⁹ | bf16 | q8 | q4 | 32K: f16 / q8 / q4 | 128K: f16 / q8 / q4 |")
    print("|---|---|---|---|---|---|---|")
    for config in configs:
        print(row(program, config))


if __name__ == "__main__":
    main()
