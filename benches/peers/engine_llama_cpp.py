"""Times llama.cpp: engine_llama_cpp.py FILE THREADS PROMPT NEW; one line of JSON."""

import json
import resource
import sys
import time

from llama_cpp import Llama

threads, prompt, new = (int(word) for word in sys.argv[2:])
start = time.perf_counter()
model = Llama(
    sys.argv[1],
    n_ctx=prompt + new + 64,
    n_threads=threads,
    n_threads_batch=threads,
    n_batch=512,
    logits_all=False,
    verbose=False,
)
load = time.perf_counter() - start
tokens = [(i * 7919) % 50000 + 300 for i in range(prompt)]
model.eval(tokens[:16])
model.reset()
start = time.perf_counter()
model.eval(tokens)
token = model.sample(temp=0.0)
prefill = prompt / (time.perf_counter() - start)
start = time.perf_counter()
for _ in range(new):
    model.eval([token])
    token = model.sample(temp=0.0)
decode = new / (time.perf_counter() - start)
memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
print(json.dumps({"load": load, "prefill": prefill, "decode": decode, "memory": memory}))
