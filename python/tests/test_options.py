"""What the options of a generation do to it: biases, bans, log-probabilities, processors; embeddings."""

from __future__ import annotations

import gc
import weakref
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest
from conftest import COUNTING, QUESTION, fixture_directory, vectors
from qwen2_rs import InvalidArgumentError, Model

Tokens = npt.NDArray[np.uint32]
Logits = npt.NDArray[np.float32]


def test_bad_words_are_not_produced(demo: Model) -> None:
    plain = demo.chat(COUNTING, temperature=0)
    assert "12" in plain.text
    assert "12" not in demo.chat(COUNTING, temperature=0, bad_words=["12"]).text
    pair = plain.tokens[1:3]
    without = demo.chat(COUNTING, temperature=0, bad_words=["zzz", pair, cast(Any, np.array([5]))]).tokens
    assert all(without[i : i + 2] != pair for i in range(len(without)))


def test_a_bias_decides_and_min_new_tokens_puts_the_end_off(demo: Model) -> None:
    assert demo.generate("x", temperature=0, logit_bias={77: 100}, max_new_tokens=3).tokens == [77] * 3
    short = demo.chat(QUESTION, temperature=0)
    longer = demo.chat(QUESTION, temperature=0, min_new_tokens=len(short.tokens) + 3)
    assert len(longer.tokens) >= len(short.tokens) + 3


def test_other_filters_and_penalties_are_taken(demo: Model) -> None:
    answer = demo.chat(
        QUESTION,
        temperature=0.5,
        typical_p=0.9,
        presence_penalty=0.1,
        frequency_penalty=-0.1,
        seed=1,
        max_new_tokens=8,
    )
    assert 1 <= len(answer.tokens) <= 8


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("typical_p", 0.0, "option out of range: typical_p: expected above 0 to 1, found 0"),
        ("presence_penalty", 3.0, "option out of range: presence_penalty: expected -2 to 2, found 3"),
        ("frequency_penalty", -3.0, "option out of range: frequency_penalty: expected -2 to 2, found -3"),
        ("logit_bias", {3: 101.0}, "option out of range: logit_bias[3]: expected -100 to 100, found 101"),
        ("logit_bias", {-1: 1.0}, "no such token: logit_bias: -1"),
        ("logit_bias", {10**6: 1.0}, "no such token: logit_bias: 1000000, the vocabulary has 1200"),
        ("bad_words", [""], "option out of range: bad_words[0]: expected 1 to 256 bytes, found 0 bytes"),
        ("bad_words", [[]], "option out of range: bad_words[0]: expected 1 to 256 tokens, found 0 tokens"),
        ("min_new_tokens", -1, "option out of range: min_new_tokens: expected 0 or more, found -1"),
        ("logprobs", 10**9, "option out of range: logprobs: expected 0 to 1024, found 1000000000"),
        ("prompt_logprobs", -1, "option out of range: prompt_logprobs: expected 0 to 1024, found -1"),
    ],
)
def test_an_option_out_of_range_names_itself(demo: Model, option: str, value: Any, message: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        cast(Any, demo).generate("x", **{option: value})
    assert str(caught.value).replace(str(demo.config["vocab_size"]), "1200") == message


@pytest.mark.parametrize(
    ("option", "value"),
    [("bad_words", "word"), ("bad_words", [3]), ("logit_bias", [1]), ("logprobs", 1.5), ("processor", 3)],
)
def test_an_option_of_the_wrong_type_is_a_type_error_that_names_it(
    demo: Model, option: str, value: Any
) -> None:
    with pytest.raises(TypeError, match=option):
        cast(Any, demo).generate("x", **{option: value})


def test_log_probabilities_are_those_of_score() -> None:
    model = Model.load(fixture_directory("tied"), device="cpu")
    prompt = list(range(10, 40))
    answer = model.generate(
        prompt, max_new_tokens=5, seed=1, temperature=1.5, logprobs=3, prompt_logprobs=0, ignore_eos=True
    )
    found = [entry.logprob for entry in answer.prompt_logprobs + answer.logprobs]
    np.testing.assert_allclose(found, model.score(prompt + answer.tokens), atol=1e-3)
    assert [entry.token for entry in answer.logprobs] == answer.tokens
    assert all(len(entry.top) == 3 for entry in answer.logprobs)
    assert not answer.prompt_logprobs[0].top
    first = answer.logprobs[0]
    assert first.top[0].logprob >= first.top[1].logprob
    assert repr(first).startswith("Logprobs(token=")
    assert repr(first.top[0]).startswith("TokenLogprob(token=")
    piece = next(model.stream(prompt, max_new_tokens=5, seed=1, temperature=1.5, logprobs=3))
    assert piece.logprobs is not None
    # The head multiplied thirty rows above and one here, which are summed in another order.
    assert piece.logprobs.logprob == pytest.approx(first.logprob, abs=1e-5)
    plain = model.generate(prompt, max_new_tokens=1)
    assert (plain.logprobs, plain.prompt_logprobs) == ([], [])


def test_embeddings_equal_transformers() -> None:
    for case in vectors("embed.json")["cases"]:
        model = Model.load(fixture_directory(case["model"]), device="cpu", kv_cache="f32")
        for pooling in ("mean", "last_token"):
            found = model.embed(case["tokens"], pooling=pooling)
            assert found.dtype == np.float32
            # Both f32 and of length 1.
            np.testing.assert_allclose(found, case[pooling], atol=1e-5)
    with pytest.raises(InvalidArgumentError, match="unknown pooling: pooling: max"):
        model.embed("x", pooling="max")
    with pytest.raises(InvalidArgumentError):
        model.embed("")


def test_a_processor_changes_logits_in_place_or_returns_others(demo: Model) -> None:
    seen: list[list[int]] = []

    def in_place(tokens: Tokens, logits: Logits) -> None:
        assert tokens.dtype == np.uint32
        assert logits.dtype == np.float32
        assert logits.shape == (demo.config["vocab_size"],)
        seen.append(tokens.tolist())
        logits[:] = -np.inf
        logits[77] = 0

    def returned(_tokens: Tokens, logits: Logits) -> npt.NDArray[Any]:
        others = np.full(len(logits), -1.0)  # float64 is taken, too
        others[78] = 1
        return others[::1]

    assert demo.generate([5, 6], temperature=0, max_new_tokens=3, processor=in_place).tokens == [77] * 3
    assert seen == [[5, 6], [5, 6, 77], [5, 6, 77, 77]]
    stream = demo.stream([5], temperature=0, max_new_tokens=3, processor=returned)
    assert [piece.token for piece in stream] == [78] * 3
    session = demo.session()
    session.append("x")
    assert session.generate(temperature=0, max_new_tokens=2, processor=in_place).tokens == [77] * 2
    with session.stream(temperature=0, max_new_tokens=2, processor=returned) as pieces:
        assert [piece.token for piece in pieces] == [78] * 2
    batch = demo.generate_batch(["x", "y"], temperature=0, max_new_tokens=2, processor=in_place)
    assert [answer.tokens for answer in batch] == [[77] * 2] * 2


def test_what_a_processor_raises_comes_out_as_it_is(demo: Model) -> None:
    class EnoughError(Exception):
        pass

    def raises(_tokens: Tokens, _logits: Logits) -> None:
        raise EnoughError("enough")

    for call in (
        lambda: demo.generate("x", processor=raises),
        lambda: demo.stream("x", processor=raises).finish(),
        lambda: next(demo.stream("x", processor=raises)),
    ):
        with pytest.raises(EnoughError, match="enough"):
            call()
    with pytest.raises(ValueError, match="processor returned 3 logits instead of"):
        demo.generate("x", processor=lambda _tokens, _logits: [1.0, 2.0, 3.0])
    with pytest.raises(TypeError, match="something else than None or a row"):
        demo.generate("x", processor=lambda _tokens, logits: logits[None])
    assert "42" in demo.chat(QUESTION, temperature=0).text


def test_a_processor_may_use_the_model_but_not_what_calls_it(demo: Model) -> None:
    session = demo.session()
    session.append("What is")
    other = demo.session()
    failures = []

    def comes_back(tokens: Tokens, logits: Logits) -> None:
        other.append("x")
        assert demo.score([*tokens.tolist(), 1]).shape == (len(tokens),)
        with pytest.raises(InvalidArgumentError, match="a processor uses what calls it") as caught:
            session.append("x")
        failures.append(caught.value)
        logits[9] = 100

    assert session.generate(temperature=0, max_new_tokens=2, processor=comes_back).tokens == [9, 9]
    assert len(failures) == 2

    def finishes(_tokens: Tokens, _logits: Logits) -> None:
        stream.finish()

    stream = demo.stream("x", max_new_tokens=2, processor=finishes)
    with pytest.raises(InvalidArgumentError, match="object is in use: stream"):
        next(stream)


def test_a_processor_is_let_go_with_its_stream(demo: Model) -> None:
    class Nothing:
        def __call__(self, _tokens: Tokens, _logits: Logits) -> None:
            pass

    processor = Nothing()
    alive = weakref.ref(processor)
    stream = demo.stream("x", max_new_tokens=2, processor=processor)
    next(stream)
    del processor, stream
    gc.collect()
    assert alive() is None
