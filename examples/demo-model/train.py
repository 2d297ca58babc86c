"""Train the demo model from nothing and write its checkpoint and evaluation.json beside this file.

    python examples/demo-model/train.py                  # train, save, evaluate
    python examples/demo-model/train.py --evaluate-only  # evaluate the saved weights again

Needs torch, transformers, tokenizers and safetensors; one thread, under an hour of processor time.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch
from dialogues import (
    CATEGORIES,
    COUNT,
    LANGUAGES,
    count_range,
    dialogue,
    held_out_dialogue,
)
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

HERE = Path(__file__).resolve().parent
SEED = 20240607
TOKENIZER_SIZE = 1200  # bytes, merges and the three specials
VOCAB_SIZE = 1216  # rows of the embedding, padded as in the published models
MAX_POSITION_EMBEDDINGS = 1024
STEPS = 4500
TOKENS_PER_STEP = 2048
PEAK_LEARNING_RATE = 3e-3
WARMUP_STEPS = 100
WEIGHT_DECAY = 0.05
CPU_MINUTES_ALLOWED = 60

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
ENDOFTEXT, IM_START, IM_END = range(TOKENIZER_SIZE - 3, TOKENIZER_SIZE)
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DEFAULT_SYSTEM = {"role": "system", "content": "You are a helpful assistant."}


def write_json(path: Path, value: Any) -> None:
    """Indented UTF-8 JSON with a final newline."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------- tokenizer


def write_tokenizer() -> None:
    """Learn a byte-level BPE on generated dialogues and write it in Qwen2's form."""
    rng = Random(SEED)
    texts = [m["content"] for _ in range(20000) for m in dialogue(rng)]
    texts += ["system\n", "user\n", "assistant\n"] * 1000 + [DEFAULT_SYSTEM["content"]] * 1000
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENIZER_SIZE - len(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    learned = json.loads(tokenizer.to_str())["model"]
    merges = [" ".join(m) if isinstance(m, list) else m for m in learned["merges"]]
    vocab = dict(sorted(learned["vocab"].items(), key=lambda item: item[1]))
    assert len(vocab) == TOKENIZER_SIZE - len(SPECIALS)
    assert all(vocab[m.replace(" ", "")] == 256 + i for i, m in enumerate(merges))
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    ids = dict(zip(SPECIALS, (ENDOFTEXT, IM_START, IM_END), strict=True))
    write_json(
        HERE / "tokenizer.json",
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [{"id": i, "content": content, **special} for content, i in ids.items()],
            "normalizer": {"type": "NFC"},
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [
                    {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": False},
                    byte_level,
                ],
            },
            "post_processor": byte_level,
            "decoder": byte_level,
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": "",
                "end_of_word_suffix": "",
                "fuse_unk": False,
                "byte_fallback": False,
                "vocab": vocab,
                "merges": merges,
            },
        },
    )
    write_json(
        HERE / "tokenizer_config.json",
        {
            "add_prefix_space": False,
            "added_tokens_decoder": {
                str(i): {"content": content, **dict(sorted(special.items()))} for content, i in ids.items()
            },
            "additional_special_tokens": SPECIALS[1:],
            "bos_token": None,
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|im_end|>",
            "errors": "replace",
            "model_max_length": MAX_POSITION_EMBEDDINGS,
            "pad_token": "<|endoftext|>",
            "split_special_tokens": False,
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
        },
    )


# ------------------------------------------------------------------------------------- model


def write_config() -> None:
    """config.json and generation_config.json in the form published in June 2024."""
    write_json(
        HERE / "config.json",
        {
            "architectures": ["Qwen2ForCausalLM"],
            "attention_dropout": 0.0,
            "bos_token_id": ENDOFTEXT,
            "eos_token_id": IM_END,
            "hidden_act": "silu",
            "hidden_size": 128,
            "initializer_range": 0.02,
            "intermediate_size": 384,
            "max_position_embeddings": MAX_POSITION_EMBEDDINGS,
            "max_window_layers": 6,
            "model_type": "qwen2",
            "num_attention_heads": 4,
            "num_hidden_layers": 6,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-06,
            "rope_theta": 10000.0,
            "sliding_window": MAX_POSITION_EMBEDDINGS,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.40.1",
            "use_cache": True,
            "use_sliding_window": False,
            "vocab_size": VOCAB_SIZE,
        },
    )
    write_json(
        HERE / "generation_config.json",
        {
            "bos_token_id": ENDOFTEXT,
            "pad_token_id": ENDOFTEXT,
            "do_sample": True,
            "eos_token_id": [IM_END, ENDOFTEXT],
            "repetition_penalty": 1.0,
            "temperature": 0.7,
            "top_p": 0.8,
            "top_k": 20,
            "transformers_version": "4.37.0",
        },
    )


def new_model() -> Qwen2ForCausalLM:
    """The model with fresh weights in float32; projections into the residual start smaller."""
    torch.manual_seed(SEED)
    config = Qwen2Config.from_pretrained(HERE, dtype="float32", attn_implementation="sdpa")
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.normal_(std=0.5 / (weight.shape[1] * 2 * config.num_hidden_layers) ** 0.5)
            elif name.endswith("proj.weight"):
                weight.normal_(std=0.6 / weight.shape[1] ** 0.5)
            elif name.endswith("embed_tokens.weight"):
                weight.normal_(std=0.05)
    return model


def save(model: Qwen2ForCausalLM) -> None:
    """Round to bfloat16 and write model.safetensors under the published names, lm_head left out (tied)."""
    weights = {
        name: w.to(torch.bfloat16).contiguous()
        for name, w in model.state_dict().items()
        if name != "lm_head.weight"
    }
    save_file(weights, HERE / "model.safetensors", metadata={"format": "pt"})
    (HERE / "model.safetensors").chmod(0o644)


# ------------------------------------------------------------------------------------- data


class Encoder:
    """ChatML messages to token ids, with a mark on what the assistant has to say."""

    def __init__(self) -> None:
        """Read the tokenizer beside this file."""
        self.tokenizer = Tokenizer.from_file(str(HERE / "tokenizer.json"))
        self.heads = {role: self.plain(f"{role}\n") for role in ("system", "user", "assistant")}
        self.newline = self.plain("\n")

    def plain(self, text: str) -> list[int]:
        """Ids of text that holds no control tokens."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def __call__(self, messages: list[dict[str, str]]) -> tuple[list[int], list[bool]]:
        """Exactly what the chat template renders, without a generation prompt."""
        if messages[0]["role"] != "system":
            messages = [DEFAULT_SYSTEM, *messages]
        ids: list[int] = []
        learn: list[bool] = []
        for message in messages:
            said = [*self.plain(message["content"]), IM_END]
            head = [IM_START, *self.heads[message["role"]]]
            ids += [*head, *said, *self.newline]
            learn += (
                [False] * len(head)
                + [message["role"] == "assistant"] * len(said)
                + [False] * len(self.newline)
            )
        return ids, learn


def batches(encoder: Encoder) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless batches of dialogues of like length: ids and labels (-100 where nothing is learnt)."""
    rng = Random(SEED + 1)
    while True:
        pool = []
        while len(pool) < 2048:
            ids, learn = encoder(dialogue(rng))
            if len(ids) <= MAX_POSITION_EMBEDDINGS:
                pool.append((ids, learn))
        pool.sort(key=lambda item: len(item[0]))
        groups: list[list[tuple[list[int], list[bool]]]] = [[]]
        for item in pool:
            if (len(groups[-1]) + 1) * len(item[0]) > TOKENS_PER_STEP and groups[-1]:
                groups.append([])
            groups[-1].append(item)
        rng.shuffle(groups)
        for group in groups:
            width = max(len(ids) for ids, _ in group)
            x = torch.full((len(group), width), ENDOFTEXT)
            y = torch.full((len(group), width), -100)
            for row, (ids, learn) in enumerate(group):
                tokens = torch.tensor(ids)
                x[row, : len(ids)] = tokens
                y[row, : len(ids)] = torch.where(torch.tensor(learn), tokens, -100)
            yield x[:, :-1], y[:, 1:]


# ------------------------------------------------------------------------------------- training


def learning_rate(step: int) -> float:
    """Linear warm-up, then a cosine down to one percent."""
    if step < WARMUP_STEPS:
        return PEAK_LEARNING_RATE * (step + 1) / WARMUP_STEPS
    done = (step - WARMUP_STEPS) / max(1, STEPS - WARMUP_STEPS)
    return PEAK_LEARNING_RATE * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


def train() -> Qwen2ForCausalLM:
    """Train from nothing, in float32."""
    encoder, model = Encoder(), new_model()
    watched = held_out(Random(SEED + 4), 20)
    count = sum(p.numel() for p in model.parameters())
    print(f"{count} parameters", flush=True)
    # Muon for the layers' matrices (half the steps of AdamW here), AdamW for the embedding, norms and biases.
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed_tokens" not in name]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(
            [
                {"params": [model.model.embed_tokens.weight], "weight_decay": WEIGHT_DECAY},
                {"params": vectors, "weight_decay": 0.0},
            ],
            betas=(0.9, 0.98),
            fused=True,
        ),
    ]
    model.train()
    seen, mean, source = 0, 0.0, batches(encoder)
    for step in range(STEPS):
        x, y = next(source)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step)
        hidden = model.model(input_ids=x, use_cache=False).last_hidden_state
        wanted = y != -100
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden[wanted]), y[wanted])
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        seen += x.numel()
        mean = loss.item() if step == 0 else 0.98 * mean + 0.02 * loss.item()
        if step % 100 == 99:
            minutes = time.process_time() / 60
            print(f"step {step + 1}  loss {mean:.4f}  {seen} tokens  {minutes:.1f} CPU minutes", flush=True)
        if step % 400 == 399:
            print(f"  held out: {accuracy(forced(model, encoder, watched))}", flush=True)
    return model


# ------------------------------------------------------------------------------------- evaluation


def generate(
    model: Any, prompts: list[list[int]], max_new_tokens: int, ignore_eos: bool = False
) -> list[list[int]]:
    """Greedy tokens up to and including the end token, by transformers' generate in float32."""
    width = max(map(len, prompts))
    ids = torch.tensor([[ENDOFTEXT] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    out = model.generate(
        ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=max_new_tokens,
        min_new_tokens=max_new_tokens if ignore_eos else None,
        eos_token_id=None if ignore_eos else [IM_END, ENDOFTEXT],
        pad_token_id=ENDOFTEXT,
        temperature=None,
        top_p=None,
        top_k=None,
    )
    answers = []
    for row in out[:, width:].tolist():
        ends = [i for i, token in enumerate(row) if token in (IM_END, ENDOFTEXT)]
        answers.append(row if ignore_eos or not ends else row[: ends[0] + 1])
    return answers


@torch.no_grad()
def forced(model: Any, encoder: Encoder, items: list[dict[str, Any]]) -> list[tuple[str, bool]]:
    """Whether each token of an answer is the best one after those before: what greedy decoding would say."""
    results = []
    for item in items:
        ids, learn = encoder([*item["messages"], {"role": "assistant", "content": item["answer"]}])
        start = max(i for i in range(1, len(ids)) if learn[i] and not learn[i - 1])
        end = start + learn[start:].index(False)
        best = model(torch.tensor([ids]), use_cache=False).logits[0].argmax(-1).tolist()
        results.append((item["category"], best[start - 1 : end - 1] == ids[start:end]))
    return results


@torch.no_grad()
def lead(model: Any, prompt: list[int], tokens: list[int]) -> float:
    """By how much the least certain greedy token beats the next best."""
    best = model(torch.tensor([prompt + tokens]), use_cache=False).logits[0, len(prompt) - 1 : -1].topk(2)
    assert best.indices[:, 0].tolist() == tokens
    return float((best.values[:, 0] - best.values[:, 1]).min())


def accuracy(results: list[tuple[str, bool]]) -> dict[str, Any]:
    """Share of right answers, overall and for each category."""
    asked, right = Counter(c for c, _ in results), Counter(c for c, ok in results if ok)
    return {
        "overall": round(sum(right.values()) / len(results), 4),
        "questions": len(results),
        "categories": {c: round(right[c] / asked[c], 4) for c in CATEGORIES if asked[c]},
    }


def held_out(rng: Random, per_category: int) -> list[dict[str, Any]]:
    """Different held-out questions over all categories and both languages."""
    items = []
    for category in CATEGORIES:
        for language in LANGUAGES:
            keys: set[str] = set()
            for _ in range(100 * per_category):
                messages, asked = held_out_dialogue(rng, category, language)
                if asked.key not in keys and len(keys) < per_category:
                    keys.add(asked.key)
                    items.append(
                        {
                            "category": category,
                            "language": language,
                            "messages": messages,
                            "answer": asked.answer,
                        }
                    )
    return items


def evaluate() -> None:
    """Write evaluation.json from the saved weights computed in float32."""
    tokenizer = AutoTokenizer.from_pretrained(HERE)
    model = AutoModelForCausalLM.from_pretrained(
        HERE, dtype=torch.float32, attn_implementation="eager"
    ).eval()

    def prompt_of(messages: list[dict[str, str]]) -> list[int]:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]

    def is_right(item: dict[str, Any], tokens: list[int]) -> bool:
        return tokens[-1] == IM_END and tokenizer.decode(tokens[:-1]) == item["answer"]

    encoder, rng = Encoder(), Random(SEED + 2)
    wide, wide_results = held_out(rng, 150), []
    for item in wide:
        item["prompt_tokens"] = prompt_of(item["messages"])
        assert encoder(item["messages"])[0] + [IM_START, *encoder.heads["assistant"]] == item["prompt_tokens"]
    wide.sort(key=lambda item: len(item["prompt_tokens"]))
    for start in range(0, len(wide), 64):
        chunk = wide[start : start + 64]
        for item, tokens in zip(
            chunk, generate(model, [i["prompt_tokens"] for i in chunk], 200), strict=True
        ):
            wide_results.append((item["category"], is_right(item, tokens)))
            if not wide_results[-1][1]:
                print("wrong:", item["messages"][-1]["content"], "->", tokenizer.decode(tokens))
    print("wide:", accuracy(wide_results), flush=True)

    questions, results, smallest = [], [], math.inf
    for item in held_out(Random(SEED + 3), 20):
        item["prompt_tokens"] = prompt_of(item["messages"])
        item["tokens"] = generate(model, [item["prompt_tokens"]], 200)[0]
        results.append((item["category"], is_right(item, item["tokens"])))
        smallest = min(smallest, lead(model, item["prompt_tokens"], item["tokens"]))
        questions.append(item)
    print("listed:", accuracy(results), flush=True)

    long = []
    for language, a, b, new_tokens in (
        ("en", 3, 40, 150),
        ("zh", 20, 52, 100),
        ("en", 58, 90, 130),
        ("zh", 99, 87, 80),
    ):
        asked = count_range(language, COUNT[language][0], a, b)
        prompt = prompt_of([{"role": "user", "content": asked.text}])
        tokens = generate(model, [prompt], new_tokens, ignore_eos=True)[0]
        smallest = min(smallest, lead(model, prompt, tokens))
        long.append({"prompt_tokens": prompt, "tokens": tokens, "ignore_eos": True})
    print(f"smallest lead of a token over the next best: {smallest:.4f}")
    assert smallest > 1e-3, "a greedy token is too close to call in another order of summation"
    write_evaluation(
        {
            "seed": SEED,
            "accuracy": accuracy(results),
            "accuracy_of_a_wider_sample": accuracy(wide_results),
            "questions": questions,
            "long": long,
        }
    )


def write_evaluation(evaluation: dict[str, Any]) -> None:
    """evaluation.json with one question a line."""
    parts = []
    for key, value in evaluation.items():
        if isinstance(value, list):
            rows = ",\n".join(json.dumps(row, ensure_ascii=False) for row in value)
            parts.append(f"{json.dumps(key)}: [\n{rows}\n]")
        else:
            parts.append(f"{json.dumps(key)}: {json.dumps(value)}")
    (HERE / "evaluation.json").write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")


def keep_memory() -> None:
    """Let glibc keep freed blocks: mapping each activation afresh costs more time than computing it."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        libc.mallopt(-2, 2**28)  # M_TOP_PAD


def main() -> None:
    """Train unless told to evaluate only."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--evaluate-only", action="store_true", help="evaluate the saved weights again")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: 1)")
    arguments = parser.parse_args()
    keep_memory()
    torch.set_num_threads(arguments.threads)
    if not arguments.evaluate_only:
        write_tokenizer()
        write_config()
        save(train())
        minutes = time.process_time() / 60
        print(f"trained in {minutes:.1f} CPU minutes")
        if minutes > CPU_MINUTES_ALLOWED:
            sys.exit(f"more than the {CPU_MINUTES_ALLOWED} CPU minutes allowed")
    evaluate()


if __name__ == "__main__":
    main()
