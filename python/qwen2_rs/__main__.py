"""The command `qwen2`, also as `python -m qwen2_rs`."""

import signal
import sys

from qwen2_rs._qwen2 import run_cli


def main() -> int:
    """Runs the command with the arguments of this process."""
    # The command takes Ctrl-C over; Python's handler would raise KeyboardInterrupt once it has ended.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    return run_cli(["qwen2", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
