"""The command `lm_eval`, which knows the model `qwen2_rs` as well.

python -m qwen2_rs.evaluation --model qwen2_rs --model_args pretrained=PATH,quantize=q8 --tasks hellaswag
"""

from __future__ import annotations

import sys

from qwen2_rs import _extras


def main() -> int:
    """Runs the harness with the arguments of this process."""
    try:
        try:
            from lm_eval.__main__ import cli_evaluate
        except ImportError as error:
            raise _extras.missing(error, "lm_eval", "this command", "'qwen2-rs[evaluation]'") from error
    except ImportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    from qwen2_rs.evaluation import harness  # noqa: F401 registers the model

    cli_evaluate()
    return 0


if __name__ == "__main__":
    sys.exit(main())
