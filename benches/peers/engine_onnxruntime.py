"""Times onnxruntime-genai: engine_onnxruntime.py DIRECTORY THREADS PROMPT NEW; one line of JSON."""

import json
import resource
import sys
import time

import onnxruntime_genai as og

threads, prompt, new = (int(word) for word in sys.argv[2:])
start = time.perf_counter()
config = og.Config(sys.argv[1])
options = {"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}
config.overlay(json.dumps(options))
model = og.Model(config)
load = time.perf_counter() - start
tokens = [(i * 7919) % 50000 + 300 for i in range(prompt)]


def generator(length: int) -> og.Generator:
    settings = og.GeneratorParams(model)
    settings.set_search_options(max_length=length, min_length=length, do_sample=False)
    return og.Generator(model, settings)


warm = generator(32)
warm.append_tokens(tokens[:16])
warm.generate_next_token()
del warm

run = generator(prompt + new + 1)
start = time.perf_counter()
run.append_tokens(tokens)
run.generate_next_token()
prefill = prompt / (time.perf_counter() - start)
start = time.perf_counter()
for _ in range(new):
    run.generate_next_token()
decode = new / (time.perf_counter() - start)
memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
print(json.dumps({"load": load, "prefill": prefill, "decode": decode, "memory": memory}))
