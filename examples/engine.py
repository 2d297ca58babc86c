"""Answers several questions at once, in one event loop.

python examples/engine.py [MODEL [QUESTION ...]]
"""

import asyncio
import sys

from qwen2_rs import Engine, Model

QUESTIONS = ("Count from 3 to 9.", "What is 2 plus 3?", "What day comes after Monday?")


async def answer(engine: Engine, question: str) -> None:
    messages = [{"role": "user", "content": question}]
    text = ""
    # Other tasks run between two pieces; a task that is cancelled ends its own request.
    async for piece in engine.chat(messages, max_new_tokens=64, temperature=0, stream=True):
        text += piece.text
    print(f"{question} {text}")


async def answer_all(engine: Engine, questions: tuple[str, ...]) -> None:
    await asyncio.gather(*(answer(engine, question) for question in questions))


def run(directory: str = "examples/demo-model", *questions: str) -> None:
    with Model.load(directory).engine() as engine:
        asyncio.run(answer_all(engine, questions or QUESTIONS))
        stats = engine.stats
        print(f"{stats.completion_tokens} tokens in {stats.steps} steps", file=sys.stderr)


run(*sys.argv[1:])
