"""Writes a Qwen2 checkpoint of a given shape with random bf16 weights: checkpoint.py CONFIG DIRECTORY."""

import json
import sys
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

shape, directory = json.loads(sys.argv[1]), Path(sys.argv[2])
torch.manual_seed(0)
config = Qwen2Config(
    vocab_size=151936,
    num_key_value_heads=2,
    max_position_embeddings=32768,
    rms_norm_eps=1e-6,
    tie_word_embeddings=True,
    bos_token_id=151643,
    eos_token_id=151645,
    rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    **shape,
)
Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)

# A tokenizer that every engine can read: the 256 bytes of byte-level BPE; the runs take token ids anyway.
printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
others = [byte for byte in range(256) if byte not in printable]
letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
vocab = {letters[byte]: byte for byte in range(256)}
tokenizer = {
    "version": "1.0",
    "added_tokens": [
        {
            "id": number,
            "content": content,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for number, content in [(256, "<|endoftext|>"), (257, "<|im_start|>"), (258, "<|im_end|>")]
    ],
    "normalizer": None,
    "pre_tokenizer": {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": True,
    },
    "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True},
    "post_processor": None,
    "truncation": None,
    "padding": None,
    "model": {"type": "BPE", "vocab": vocab, "merges": [], "unk_token": None},
}
settings = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": "<|im_end|>",
    "pad_token": "<|endoftext|>",
}
(directory / "tokenizer.json").write_text(json.dumps(tokenizer))
(directory / "tokenizer_config.json").write_text(json.dumps(settings))
