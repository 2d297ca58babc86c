"""Writes a checkpoint's bf16 weights as GGUF, as llama.cpp's converter does: to_gguf.py DIRECTORY FILE."""

import json
import sys
from pathlib import Path

import gguf
import torch
from safetensors.torch import load_file

directory, target = Path(sys.argv[1]), Path(sys.argv[2])
config = json.loads((directory / "config.json").read_text())
writer = gguf.GGUFWriter(target, "qwen2")
writer.add_block_count(config["num_hidden_layers"])
writer.add_context_length(config["max_position_embeddings"])
writer.add_embedding_length(config["hidden_size"])
writer.add_feed_forward_length(config["intermediate_size"])
writer.add_head_count(config["num_attention_heads"])
writer.add_head_count_kv(config["num_key_value_heads"])
writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
writer.add_rope_freq_base(1e6)
writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
writer.add_tokenizer_model("gpt2")
writer.add_tokenizer_pre("qwen2")
vocab = json.loads((directory / "tokenizer.json").read_text())["model"]["vocab"]
texts = {token: text for text, token in vocab.items()}
writer.add_token_list([texts.get(token, f"[{token}]") for token in range(config["vocab_size"])])
kinds = [
    gguf.TokenType.NORMAL if token in texts else gguf.TokenType.UNUSED
    for token in range(config["vocab_size"])
]
writer.add_token_types(kinds)
writer.add_token_merges(["! !"])
writer.add_eos_token_id(config["eos_token_id"])
names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config["num_hidden_layers"])
for name, tensor in load_file(directory / "model.safetensors").items():
    new = names.get_name(name, try_suffixes=(".weight", ".bias"))
    if tensor.dim() == 1:
        writer.add_tensor(new, tensor.float().numpy())
    else:
        words = tensor.contiguous().view(torch.int16).numpy().view("uint8")
        writer.add_tensor(new, words, raw_dtype=gguf.GGMLQuantizationType.BF16)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
