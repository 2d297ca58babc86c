"""transformers on a GPU, on random weights of a published shape: prefill and decode, eager and compiled."""

import argparse
import json
import statistics
import time

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, StaticCache

SHAPES = {
    "0.5b": (896, 4864, 24, 14, 2, 151936, True),
    "1.5b": (1536, 8960, 28, 12, 2, 151936, True),
    "7b": (3584, 18944, 28, 28, 4, 152064, False),
}


def copy_bandwidth() -> float:
    """Bytes read and written in a second by a copy of 4 GiB, the median of ten."""
    source = torch.empty(1 << 32, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = []
    for _ in range(12):
        torch.cuda.synchronize()
        start = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 2 * source.numel() / sorted(times[2:])[5]


def matrix_rate() -> float:
    """Operations in a second of a product of 8192 x 8192 matrices in bf16, the median of ten."""
    a = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
    times = []
    for _ in range(13):
        torch.cuda.synchronize()
        start = time.perf_counter()
        a @ a
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 2 * 8192**3 / sorted(times[3:])[5]


@torch.inference_mode()
def measure(shape: str, prompt: int, new: int, compiled: bool) -> dict[str, float]:
    hidden, intermediate, layers, heads, kv_heads, vocabulary, tied = SHAPES[shape]
    config = Qwen2Config(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        rope_theta=1e6,
        attn_implementation="sdpa",
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = Qwen2ForCausalLM(config).eval()
    tokens = torch.randint(0, vocabulary, (1, prompt), device="cuda")
    step = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True) if compiled else model.forward
    prefills, decodes = [], []
    for _ in range(4):  # the first compiles or loads kernels
        cache = StaticCache(config=config, max_cache_len=prompt + new)
        torch.cuda.synchronize()
        start = time.perf_counter()
        positions = torch.arange(prompt, device="cuda")
        logits = model(
            tokens,
            past_key_values=cache,
            cache_position=positions,
            position_ids=positions[None],
            logits_to_keep=1,
        ).logits
        token = logits[:, -1:].argmax(-1)
        torch.cuda.synchronize()
        prefills.append(prompt / (time.perf_counter() - start))
        start = time.perf_counter()
        for i in range(new):
            place = torch.full((1,), prompt + i, device="cuda")
            logits = step(token, past_key_values=cache, cache_position=place, position_ids=place[None]).logits
            token = logits[:, -1:].argmax(-1).clone()
        torch.cuda.synchronize()
        decodes.append(new / (time.perf_counter() - start))
    name = "transformers compiled" if compiled else "transformers eager"
    return {
        "engine": name,
        "shape": shape,
        "prefill_tokens_per_s": statistics.median(prefills[1:]),
        "decode_tokens_per_s": statistics.median(decodes[1:]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="*", default=["0.5b", "1.5b", "7b"])
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--compiled", action="store_true", help="torch.compile with CUDA graphs as well")
    args = parser.parse_args()
    print(
        json.dumps({"copy_bytes_per_s": copy_bandwidth(), "bf16_operations_per_s": matrix_rate()}), flush=True
    )
    for shape in args.shapes:
        for compiled in (False, True) if args.compiled else (False,):
            print(json.dumps(measure(shape, args.prompt, args.new, compiled)), flush=True)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
