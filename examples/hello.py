"""Loads a model and asks it one question.

python examples/hello.py [MODEL]
"""

import sys

from qwen2_rs import Model

model = Model.load(sys.argv[1] if len(sys.argv) > 1 else "examples/demo-model")
answer = model.chat([{"role": "user", "content": "What is 2 + 3?"}])
print(answer.text)
