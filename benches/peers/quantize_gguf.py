"""Quantizes a GGUF file with llama.cpp; the target's name says to what: quantize_gguf.py SOURCE TARGET."""

import sys
from pathlib import Path

import llama_cpp

source, target = Path(sys.argv[1]), Path(sys.argv[2])
settings = llama_cpp.llama_model_quantize_default_params()
settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{target.stem}")
settings.nthread = 0
code = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), settings)
if code != 0:
    sys.exit(f"llama_model_quantize: {code}")
