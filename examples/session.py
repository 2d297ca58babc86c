"""A conversation of two turns: the second one only reads what is new.

python examples/session.py [MODEL]
"""

import sys

from qwen2_rs import Model

model = Model.load(sys.argv[1] if len(sys.argv) > 1 else "examples/demo-model")
session = model.session()
for question in ["What is 2 + 3?", "What is 7 - 4?"]:
    session.append([{"role": "user", "content": question}])
    answer = session.generate(max_new_tokens=24, temperature=0, repetition_penalty=1)
    print(f"> {question}\n{answer}")
    print(f"({answer.usage.cached_tokens} of {answer.usage.prompt_tokens} tokens were read before)")
