"""Prints an answer as it comes.

python examples/stream.py [MODEL [QUESTION]]
"""

import sys

from qwen2_rs import Model


def run(directory: str = "examples/demo-model", question: str = "Count from 3 to 9.") -> None:
    model = Model.load(directory)
    # Leaving the block stops the generation; stream.cancel() does so from another thread.
    with model.chat([{"role": "user", "content": question}], max_new_tokens=64, stream=True) as stream:
        for piece in stream:
            print(piece, end="", flush=True)
    print()
    print("ended by", stream.finish().finish_reason, file=sys.stderr)


run(*sys.argv[1:])
