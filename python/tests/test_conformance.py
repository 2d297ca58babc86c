"""The numbers of Hugging Face transformers, from the fixtures that all languages share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import CONFORMANCE, DEMO, fixture_directory
from qwen2_rs import InvalidArgumentError, Model, NotFoundError, Tokenizer, convert, merge_lora

MODELS = sorted(path.name for path in (CONFORMANCE / "models").iterdir())


def reference(name: str) -> Any:
    return json.loads((fixture_directory(name) / "reference.json").read_text())


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_greedy_tokens_equal_the_reference(name: str) -> None:
    vectors = reference(name)
    model = Model.load(fixture_directory(name), device="cpu", kv_cache="f32")
    logits = model.logits(vectors["tokens"])
    # The project's bound for float32 arithmetic on logits of size about 4.
    np.testing.assert_allclose(logits, np.array(vectors["logits"], np.float32), rtol=0, atol=1e-4)
    want = vectors["greedy"]
    answer = model.generate(
        vectors["greedy_prompt"],
        temperature=0,
        repetition_penalty=1,
        ignore_eos=True,
        max_new_tokens=len(want),
    )
    assert answer.tokens == want


def test_a_prompt_of_several_chunks_is_read_as_one(long_model: Model) -> None:
    # Prefill takes 512 tokens at once; logits of all rows and those of generate come different ways.
    tokens = [token % 1000 for token in range(7, 1600)]
    likeliest = int(long_model.logits(tokens)[-1].argmax())
    assert long_model.generate(tokens, temperature=0, repetition_penalty=1, max_new_tokens=1).tokens == [
        likeliest
    ]


@pytest.mark.parametrize("case", json.loads((CONFORMANCE / "perplexity.json").read_text())["cases"])
def test_perplexity_equals_the_reference(case: dict[str, Any]) -> None:
    model = Model.load(fixture_directory(case["model"]), device="cpu", kv_cache="f32")
    window = min(case["window"], model.context_length)
    got = model.perplexity(case["tokens"], window=window, stride=case["stride"])
    assert got == pytest.approx(case["perplexity"], rel=1e-4)


def test_an_adapter_gives_what_peft_gives(tmp_path: Path) -> None:
    vectors = json.loads((CONFORMANCE / "adapters" / "plain" / "reference.json").read_text())
    base = fixture_directory(vectors["base"])
    model = Model.load(base, device="cpu", kv_cache="f32", adapter=CONFORMANCE / "adapters" / "plain")
    want = np.array(vectors["logits"], np.float32)
    np.testing.assert_allclose(model.logits(vectors["tokens"]), want, rtol=0, atol=3e-4)
    merge_lora(base, CONFORMANCE / "adapters" / "plain", tmp_path / "merged")
    merged = Model.load(tmp_path / "merged", device="cpu", kv_cache="f32")
    np.testing.assert_array_equal(merged.logits(vectors["tokens"]), model.logits(vectors["tokens"]))
    with pytest.raises(NotFoundError, match="nowhere"):
        Model.load(base, device="cpu", adapter="nowhere")


def test_a_gguf_file_gives_what_its_checkpoint_gives(tmp_path: Path) -> None:
    tokens = reference("moe")["tokens"]
    want = Model.load(fixture_directory("moe"), device="cpu").logits(tokens)
    convert(fixture_directory("moe"), tmp_path / "moe.gguf")
    convert(tmp_path / "moe.gguf", tmp_path / "back")
    for place in (CONFORMANCE / "gguf" / "moe.gguf", tmp_path / "moe.gguf", tmp_path / "back"):
        model = Model.load(place, device="cpu")
        np.testing.assert_array_equal(model.logits(tokens), want)
        assert Tokenizer.load(place).encode("Hello") == model.tokenizer.encode("Hello")
    with pytest.raises(InvalidArgumentError, match="destination exists"):
        convert(fixture_directory("moe"), tmp_path / "moe.gguf")


def test_the_demo_model_gives_transformers_tokens(demo: Model) -> None:
    evaluation = json.loads((DEMO / "evaluation.json").read_text(encoding="utf-8"))
    right = 0
    questions = evaluation["questions"]
    for question in questions:
        answer = demo.chat(question["messages"], temperature=0, repetition_penalty=1, max_new_tokens=100)
        assert answer.tokens == question["tokens"], question["messages"]
        right += answer.text == question["answer"]
    assert right / len(questions) >= 0.95
