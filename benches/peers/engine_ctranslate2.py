"""Times CTranslate2: engine_ctranslate2.py DIRECTORY THREADS PROMPT NEW; one line of JSON."""

import json
import resource
import sys
import time
from pathlib import Path

import ctranslate2

threads, prompt, new = (int(word) for word in sys.argv[2:])
directory = Path(sys.argv[1])
start = time.perf_counter()
model = ctranslate2.Generator(str(directory), device="cpu", inter_threads=1, intra_threads=threads)
load = time.perf_counter() - start
vocabulary = json.loads((directory / "vocabulary.json").read_text())
tokens = [vocabulary[(i * 7919) % 50000 + 300] for i in range(prompt)]


def seconds(tokens: list[str], n: int) -> float:
    """Until the last of `n` new tokens."""
    start = time.perf_counter()
    found = model.generate_batch(
        [tokens], max_length=n, min_length=n, sampling_topk=1, include_prompt_in_result=False
    )
    assert len(found[0].sequences_ids[0]) == n
    return time.perf_counter() - start


seconds(tokens[:16], 1)
first = seconds(tokens, 1)
decode = new / (seconds(tokens, new + 1) - first)
memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
print(json.dumps({"load": load, "prefill": prompt / first, "decode": decode, "memory": memory}))
