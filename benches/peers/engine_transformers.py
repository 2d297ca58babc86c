"""Times transformers in bf16: engine_transformers.py DIRECTORY THREADS PROMPT NEW; one line of JSON."""

import json
import resource
import sys
import time

import torch
from transformers import AutoModelForCausalLM

threads, prompt, new = (int(word) for word in sys.argv[2:])
torch.set_num_threads(threads)
start = time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
load = time.perf_counter() - start
tokens = torch.tensor([[(i * 7919) % 50000 + 300 for i in range(prompt)]])
with torch.inference_mode():
    model(tokens[:, :16], logits_to_keep=1)
    start = time.perf_counter()
    out = model(tokens, use_cache=True, logits_to_keep=1)
    token = out.logits[:, -1:].argmax(-1)
    prefill = prompt / (time.perf_counter() - start)
    start = time.perf_counter()
    for _ in range(new):
        out = model(token, past_key_values=out.past_key_values, use_cache=True)
        token = out.logits[:, -1:].argmax(-1)
    decode = new / (time.perf_counter() - start)
memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
print(json.dumps({"load": load, "prefill": prefill, "decode": decode, "memory": memory}))
