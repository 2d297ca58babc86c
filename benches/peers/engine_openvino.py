"""Times OpenVINO GenAI: engine_openvino.py DIRECTORY THREADS PROMPT NEW; one line of JSON."""

import json
import resource
import sys
import time

import numpy
import openvino
import openvino_genai

threads, prompt, new = (int(word) for word in sys.argv[2:])
start = time.perf_counter()
pipeline = openvino_genai.LLMPipeline(sys.argv[1], "CPU", INFERENCE_NUM_THREADS=threads)
load = time.perf_counter() - start
tokens = numpy.array([[(i * 7919) % 50000 + 300 for i in range(prompt)]])


def generate(ids: numpy.ndarray, count: int) -> openvino_genai.PerfMetrics:
    settings = openvino_genai.GenerationConfig(max_new_tokens=count, ignore_eos=True, do_sample=False)
    return pipeline.generate(openvino.Tensor(ids), settings).perf_metrics


generate(tokens[:, :16], 2)
metrics = generate(tokens, new + 1)
prefill = prompt / (metrics.get_ttft().mean / 1e3)
decode = 1e3 / metrics.get_tpot().mean
memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
print(json.dumps({"load": load, "prefill": prefill, "decode": decode, "memory": memory}))
