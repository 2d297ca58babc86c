"""The command `qwen2`, also as `python -m qwen2_rs`."""

import sys

from qwen2_rs._qwen2 import run_cli


def main() -> int:
    """Runs the command with the arguments of this process."""
    return run_cli(["qwen2", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
