"""Answers a conversation and says what it took.

python examples/chat.py [MODEL [QUESTION]]
"""

import sys

from qwen2_rs import Model, Qwen2Error


def run(directory: str = "examples/demo-model", question: str = "What comes after Monday?") -> None:
    with Model.load(directory, progress=True) as model:
        messages = [
            {"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": question},
        ]
        answer = model.chat(messages, max_new_tokens=32, temperature=0)
    print(answer.text)
    usage, speed = answer.usage, answer.timings.decode_tokens_per_s
    took = f"{usage.prompt_tokens} tokens read, {usage.completion_tokens} written, {speed:.0f} tokens/s"
    print(took, file=sys.stderr)


try:
    run(*sys.argv[1:])
except Qwen2Error as error:
    sys.exit(f"{error}\nhelp: {error.help}")
