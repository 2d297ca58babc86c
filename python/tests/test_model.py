"""The model handle: loading, prompts, options, results."""

from __future__ import annotations

import inspect
import pickle
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import qwen2_rs
from conftest import COUNTING, DEMO, QUESTION, fixture_directory
from qwen2_rs import (
    ContextOverflowError,
    Generation,
    InvalidArgumentError,
    Model,
    Prompt,
    Session,
    TokenStream,
    quantize,
)


def test_a_question_is_answered(demo: Model) -> None:
    answer = demo.chat(QUESTION, temperature=0, repetition_penalty=1)
    assert "42" in answer.text
    assert str(answer) == answer.text
    assert answer.finish_reason == "stop"
    assert answer.stop_match is not None
    assert (answer.stop_match.kind, answer.stop_match.text) == ("eos", None)
    assert answer.tokens[-1] == answer.stop_match.token
    assert answer.usage.completion_tokens == len(answer.tokens)
    assert answer.usage.prompt_tokens == len(demo.tokenizer.encode_chat(QUESTION, add_generation_prompt=True))
    assert answer.usage.cached_tokens == 0
    assert answer.timings.prefill_s > 0
    assert answer.timings.decode_tokens_per_s > 0
    assert answer.seed is None


def test_a_prompt_is_text_tokens_or_messages(demo: Model) -> None:
    tokens = demo.tokenizer.encode_chat(QUESTION, add_generation_prompt=True)
    answers = [
        demo.generate(QUESTION, temperature=0),
        demo.chat(QUESTION, temperature=0),
        demo.generate(tokens, temperature=0),
        demo.generate(tuple(tokens), temperature=0),
        demo.generate(cast(Any, np.array(tokens)), temperature=0),
    ]
    assert len({answer.text for answer in answers}) == 1
    text = demo.generate("What is", temperature=0, max_new_tokens=3)
    assert text.usage.prompt_tokens == len(demo.tokenizer.encode("What is"))


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        ("", InvalidArgumentError, "prompt is empty"),
        ([], InvalidArgumentError, "prompt is empty"),
        ([-1], InvalidArgumentError, "no such token: tokens: -1"),
        ([10**30], InvalidArgumentError, "no such token"),
        ([1_000_000], InvalidArgumentError, "no such token: tokens: 1000000, the vocabulary has"),
        ([1.5], TypeError, "a prompt is a str"),
        (["a"], TypeError, "a prompt is a str"),
        (b"bytes", TypeError, "found bytes"),
        (7, TypeError, "a prompt is a str"),
        (None, TypeError, "a prompt is a str"),
        ({"role": "user", "content": "x"}, TypeError, "a prompt is a str"),
        ([{"role": "user"}], InvalidArgumentError, re.escape("messages[0]['content']")),
        ([{"role": "user", "content": 1}], TypeError, "is not a str"),
        (
            [{"role": "user", "content": "x", "name": "y"}],
            InvalidArgumentError,
            re.escape("unknown key of a message: messages[0]['name']"),
        ),
        ([{"role": "user", "content": "x"}, 3], TypeError, re.escape("messages[1]")),
        ("\ud800", UnicodeEncodeError, "surrogates"),
    ],
)
def test_a_prompt_of_another_kind_is_refused(
    demo: Model, prompt: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        demo.generate(prompt, max_new_tokens=1)


def test_no_messages_are_an_error(demo: Model) -> None:
    with pytest.raises(InvalidArgumentError, match="no messages"):
        demo.chat([])
    with pytest.raises(TypeError, match="sequence of messages"):
        demo.chat(cast(Any, "hello"))
    with pytest.raises(TypeError, match="sequence of messages"):
        demo.chat(cast(Any, {"role": "user", "content": "x"}))


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("temperature", -0.1, "option out of range: temperature: expected 0 to 100, found -0.1"),
        ("temperature", float("nan"), "option out of range: temperature: expected 0 to 100, found NaN"),
        ("temperature", 1e300, "option out of range: temperature: expected 0 to 100, found inf"),
        ("top_k", 0, "option out of range: top_k: expected 1 or more, found 0"),
        ("top_k", -1, "option out of range: top_k: expected 1 or more, found -1"),
        ("top_p", 0.0, "option out of range: top_p: expected above 0 to 1, found 0"),
        ("min_p", 1.5, "option out of range: min_p: expected 0 to 1, found 1.5"),
        (
            "repetition_penalty",
            0.0,
            "option out of range: repetition_penalty: expected above 0 and finite, found 0",
        ),
        ("max_new_tokens", 0, "option out of range: max_new_tokens: expected 1 or more, found 0"),
        ("max_new_tokens", -5, "option out of range: max_new_tokens: expected 1 or more, found -5"),
        ("seed", -1, "option out of range: seed: expected 0 to 18446744073709551615, found -1"),
        ("stop", "", "option out of range: stop[0]: expected 1 to 4096 bytes, found 0 bytes"),
        ("stop_token_ids", [-1], "no such token: tokens: -1"),
    ],
)
def test_an_option_out_of_range_is_a_value_error_that_names_it(
    demo: Model, option: str, value: Any, message: str
) -> None:
    verbs: list[Callable[..., Any]] = [demo.generate, demo.chat, demo.stream]
    for verb in verbs:
        with pytest.raises(ValueError, match=re.escape(message)) as caught:
            verb(QUESTION, **{option: value})
        assert isinstance(caught.value, InvalidArgumentError)
        assert str(caught.value) == message
        assert caught.value.help


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("temperature", "warm"),
        ("top_k", 1.5),
        ("max_new_tokens", "8"),
        ("stop", 3),
        ("stop", [3]),
        ("seed", 0.5),
    ],
)
def test_an_option_of_the_wrong_type_is_a_type_error(demo: Model, option: str, value: Any) -> None:
    with pytest.raises(TypeError):
        cast(Any, demo).generate("x", **{option: value})


def test_a_typo_in_an_option_is_a_type_error(demo: Model) -> None:
    anything = cast(Any, demo)
    calls: list[Callable[[], object]] = [
        lambda: anything.generate("x", max_tokens=3),
        lambda: anything.stream("x", temprature=1),
        lambda: anything.chat(QUESTION, n=2),
        lambda: anything.generate_batch(["x"], max_tokens=3),
        lambda: anything.session().generate(max_tokens=3),
        lambda: anything.generate("x", 3),
        lambda: anything.load(DEMO, "cpu"),
        lambda: anything.load(DEMO, n_ctx=512),
    ]
    for call in calls:
        with pytest.raises(TypeError):
            call()


def test_an_unknown_option_is_named(demo: Model) -> None:
    with pytest.raises(TypeError, match=r"stream\(\) got an unexpected keyword argument 'temprature'"):
        cast(Any, demo).stream("x", temprature=1)
    with pytest.raises(TypeError, match="argument 'temperature'"):
        cast(Any, demo).stream("x", temperature="warm")


def test_options_are_listed_in_the_signature_of_every_verb_and_all_are_taken(demo: Model) -> None:
    verbs: list[Callable[..., Any]] = [Model.generate, Model.stream, Model.chat, Model.generate_batch]
    verbs += [Session.generate, Session.stream]
    listed = []
    for verb in verbs:
        parameters = inspect.signature(verb).parameters.values()
        assert not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
        options = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
        listed.append({k: v for k, v in options.items() if k not in {"stream", "return_exceptions"}})
    assert "repetition_penalty" in listed[0]
    assert all(options == listed[0] for options in listed)
    cast(Any, demo).stream("x", **listed[0])


def test_a_seed_makes_sampling_repeatable(demo: Model) -> None:
    def draw(seed: int | None) -> Generation:
        return demo.generate("What", temperature=2, seed=seed, max_new_tokens=24, top_k=1000, top_p=1)

    first = draw(7)
    assert first.seed == 7
    assert draw(7).tokens == first.tokens
    assert draw(8).tokens != first.tokens
    assert draw(2**64 - 1).seed == 2**64 - 1
    assert isinstance(draw(None).seed, int)


def test_stop_takes_one_string_or_several(demo: Model) -> None:
    whole = demo.chat(COUNTING, temperature=0).text
    assert "9" in whole
    for stop in ["9", ["9"], ("zzz", "9")]:
        answer = demo.chat(COUNTING, temperature=0, stop=stop)
        assert answer.text == whole[: whole.index("9")]
        assert answer.finish_reason == "stop"
        assert answer.stop_match is not None
        assert (answer.stop_match.kind, answer.stop_match.text) == ("text", "9")


def test_stop_token_ids_and_ignore_eos(demo: Model) -> None:
    tokens = demo.chat(COUNTING, temperature=0).tokens
    answer = demo.chat(COUNTING, temperature=0, stop_token_ids=[tokens[3]])
    assert answer.tokens == tokens[: tokens.index(tokens[3]) + 1]
    assert answer.stop_match is not None
    assert answer.stop_match.kind == "token"
    longer = demo.chat(COUNTING, temperature=0, ignore_eos=True, max_new_tokens=len(tokens) + 5)
    assert longer.tokens[: len(tokens)] == tokens
    assert longer.finish_reason == "length"
    assert len(longer.tokens) == len(tokens) + 5


def test_prompt_and_new_tokens_beyond_the_context_are_an_error_before_any_work(demo: Model) -> None:
    room = demo.context_length - 1
    assert demo.generate([1], max_new_tokens=room, stop_token_ids=range(demo.config["vocab_size"]))
    with pytest.raises(ContextOverflowError, match="exceed the context") as caught:
        demo.stream([1], max_new_tokens=room + 1)
    assert isinstance(caught.value, ValueError)
    with pytest.raises(ContextOverflowError):
        demo.generate([1] * (demo.context_length + 1))


def test_chat_returns_a_stream_when_asked(demo: Model) -> None:
    stream = demo.chat(QUESTION, temperature=0, stream=True)
    assert isinstance(stream, TokenStream)
    assert "".join(map(str, stream)) == demo.chat(QUESTION, temperature=0).text


def test_a_batch_keeps_its_order(demo: Model) -> None:
    prompts = [QUESTION, COUNTING, QUESTION]
    answers = demo.generate_batch(prompts, temperature=0)
    assert [answer.text for answer in answers] == [demo.chat(p, temperature=0).text for p in prompts]
    assert demo.generate_batch([]) == []


def test_a_failure_in_a_batch_is_raised_or_stands_in_its_place(demo: Model) -> None:
    prompts: list[Prompt] = ["x", [], "y"]
    with pytest.raises(InvalidArgumentError, match="prompt is empty"):
        demo.generate_batch(prompts, max_new_tokens=2)
    first, failed, last = demo.generate_batch(prompts, max_new_tokens=2, return_exceptions=True)
    assert isinstance(first, Generation)
    assert isinstance(last, Generation)
    assert isinstance(failed, InvalidArgumentError)


def test_logits_and_scores_are_arrays(demo: Model) -> None:
    tokens = demo.tokenizer.encode("What is 1 plus 1?")
    logits = demo.logits(tokens)
    assert logits.dtype == np.float32
    assert logits.shape == (len(tokens), demo.config["vocab_size"])
    shifted = logits[:-1].astype(np.float64)
    expected = shifted[np.arange(len(tokens) - 1), tokens[1:]] - np.log(np.exp(shifted).sum(axis=1))
    score = demo.score(np.array(tokens))
    assert score.dtype == np.float32
    # Sums in another order, on values around 10.
    np.testing.assert_allclose(score, expected, atol=1e-4)
    for verb in (demo.logits, demo.score):
        with pytest.raises(InvalidArgumentError, match="no tokens given"):
            verb([])
        with pytest.raises(InvalidArgumentError, match="no such token"):
            verb([10**6])


def test_a_warmup_changes_no_answer(demo: Model) -> None:
    before = demo.generate("What is 1 plus 1?", max_new_tokens=8, temperature=0).tokens
    demo.warmup()
    assert demo.generate("What is 1 plus 1?", max_new_tokens=8, temperature=0).tokens == before


def test_what_a_model_says_of_itself(demo: Model) -> None:
    assert demo.name == "demo-model"
    assert demo.device == "cpu"
    assert demo.dtype == "bf16"
    assert demo.threads == 2
    assert demo.context_length == 1024
    assert demo.config["model_type"] == "qwen2"
    assert demo.config["num_key_value_heads"] == 2
    assert demo.generation_config["eos_token_ids"]
    assert demo.memory.weights == pytest.approx(2 * 1_338_496, rel=0.01)
    # Its embedding table is the head, too.
    assert demo.memory.weights_per_token == demo.memory.weights
    assert demo.memory.cache_full == demo.memory.cache_per_token * demo.context_length
    assert demo.config is not demo.config
    assert repr(demo) == 'Model("demo-model", 1.3M, bf16, device="cpu", context_length=1024)'


def test_a_decode_step_reads_no_table_that_is_not_the_head() -> None:
    model = Model.load(fixture_directory("untied"), device="cpu")
    assert model.dtype == "f32"
    table = 4 * model.config["vocab_size"] * model.config["hidden_size"]
    assert model.memory.weights_per_token == model.memory.weights - table


def test_results_show_what_they_hold(demo: Model) -> None:
    answer = demo.chat(QUESTION, temperature=0)
    assert repr(answer).startswith(f"Generation(text={answer.text!r}, finish_reason='stop', tokens=")
    assert repr(answer.usage).startswith("Usage(prompt_tokens=")
    assert repr(answer.timings).startswith("Timings(prefill_s=")
    assert repr(answer.stop_match).startswith("StopMatch(kind='eos', token=")
    assert repr(next(demo.stream("x"))).startswith("Piece(text=")
    memory = demo.memory
    numbers = f"weights={memory.weights}, weights_per_token={memory.weights_per_token}, cache_per_token="
    assert repr(memory).startswith(f"Memory({numbers}")
    assert repr(demo.tokenizer) == f"Tokenizer(vocab_size={demo.tokenizer.vocab_size})"


def test_settings_of_loading() -> None:
    tied = fixture_directory("tied")
    model = Model.load(str(tied), device="cpu", dtype="bf16", context_length=64, threads=1)
    assert (model.dtype, model.context_length, model.threads) == ("bf16", 64, 1)
    packed = Model.load(DEMO, quantize="q8")
    assert ", q8, " in repr(packed)
    assert packed.memory.weights < Model.load(DEMO).memory.weights
    wide = Model.load(DEMO, kv_cache="f32", activations="bf16").memory.cache_per_token
    assert wide == 2 * Model.load(DEMO, kv_cache="f16").memory.cache_per_token
    answers = [
        Model.load(DEMO, preload=preload).generate("2 plus 3?", temperature=0) for preload in (False, True)
    ]
    assert answers[0].tokens == answers[1].tokens


def test_a_packed_cache_is_smaller_and_answers_alike() -> None:
    sizes = {}
    for kv_cache in ("f16", "q8", "q4"):
        model = Model.load(DEMO, kv_cache=kv_cache)
        sizes[kv_cache] = model.memory.cache_per_token
        assert "42" in model.chat(QUESTION, temperature=0).text
    assert sizes["f16"] > 1.8 * sizes["q8"] > 3.3 * sizes["q4"]


def test_contexts_beyond_the_trained_length() -> None:
    for by in ("yarn", "yarn_when_needed", "dual_chunk"):
        model = Model.load(DEMO, context_length=4096, long_context=by)
        assert model.context_length == 4096
        assert len(model.generate([1] * 1500, max_new_tokens=2, ignore_eos=True).tokens) == 2
    plain = Model.load(DEMO).chat(QUESTION, temperature=0).text
    assert model.chat(QUESTION, temperature=0).text == plain


def test_a_packed_directory_is_a_model_like_others(tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    quantize(DEMO, tmp_path / "packed", "q8", progress=lambda done, total: steps.append((done, total)))
    assert steps
    assert steps[-1][0] == steps[-1][1]
    answer = Model.load(tmp_path / "packed").chat(QUESTION, temperature=0)
    assert "42" in answer.text
    with pytest.raises(InvalidArgumentError, match="destination exists"):
        quantize(DEMO, tmp_path / "packed")
    with pytest.raises(InvalidArgumentError, match="unknown quantization"):
        quantize(DEMO, tmp_path / "other", "q3")
    assert [path.name for path in tmp_path.iterdir()] == ["packed"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device": "gpu"}, "unknown device: device: `gpu`"),
        ({"dtype": "int8"}, "unknown dtype: dtype: int8"),
        ({"kv_cache": "q3"}, "unknown kind of cache: kv_cache: q3"),
        ({"activations": "q3"}, "unknown dtype: dtype: q3"),
        ({"long_context": "ntk"}, "unknown kind of long context: long_context: ntk"),
        ({"quantize": "q3"}, "unknown quantization: quantize: `q3`"),
        ({"context_length": 0}, "setting is out of range: context_length: 0"),
        ({"context_length": -1}, "setting is out of range: context_length: -1"),
        ({"context_length": 10**6}, "context is longer than the model's"),
        ({"threads": -2}, "setting is out of range: threads: -2"),
    ],
)
def test_a_wrong_setting_is_a_value_error(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        Model.load(DEMO, **settings)
    assert isinstance(caught.value, InvalidArgumentError)
    assert caught.value.help


def test_progress_is_told_to_a_function_of_this_thread() -> None:
    import threading  # noqa: PLC0415

    seen: list[tuple[int, int, int]] = []
    Model.load(DEMO, progress=lambda done, total: seen.append((done, total, threading.get_ident())))
    assert {thread for _, _, thread in seen} == {threading.get_ident()}
    done = [done for done, _, _ in seen]
    assert done == sorted(done)
    total = seen[-1][1]
    assert done[-1] == total > 2_000_000


def test_what_progress_raises_stops_the_loading() -> None:
    class Enough(Exception):  # noqa: N818
        pass

    def stop(*_progress: int) -> None:
        raise Enough

    with pytest.raises(Enough):
        Model.load(DEMO, progress=stop)
    with pytest.raises(TypeError, match="progress is a bool or a function"):
        Model.load(DEMO, progress=cast(Any, 3))


def test_progress_true_draws_a_bar_on_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    Model.load(DEMO, progress=False)
    assert capfd.readouterr() == ("", "")
    Model.load(DEMO, progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("\rloading [")
    assert err.endswith("] 100% of 3 MB\n")


def test_a_closed_model_raises_value_error() -> None:
    with Model.load(DEMO) as model:
        stream = model.stream("What", max_new_tokens=4)
        tokenizer = model.tokenizer
        assert model.generate("x", max_new_tokens=1)
    uses: list[Callable[[], object]] = [
        lambda: model.generate("x"),
        lambda: model.stream("x"),
        lambda: model.chat(QUESTION),
        lambda: model.generate_batch(["x"]),
        model.session,
        lambda: model.logits([1]),
        lambda: model.score([1]),
        model.warmup,
        lambda: model.config,
        lambda: model.device,
        lambda: model.tokenizer,
        lambda: model.memory,
    ]
    for use in uses:
        with pytest.raises(ValueError, match="model is closed"):
            use()
    assert repr(model) == "Model(closed)"
    model.close()  # again
    # What was open goes on.
    assert len(list(stream)) == 4
    assert tokenizer.encode("x")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/maps")
def test_close_frees_the_weights(tmp_path: Path) -> None:
    directory = shutil.copytree(fixture_directory("untied"), tmp_path / "model")
    weights = str(directory / "model.safetensors")
    model = Model.load(directory, dtype="f32")
    assert weights in Path("/proc/self/maps").read_text()
    model.close()
    assert weights not in Path("/proc/self/maps").read_text()


def test_handles_cannot_be_pickled_or_made_by_hand(demo: Model) -> None:
    for thing in [demo, demo.session(), demo.stream("x"), demo.tokenizer]:
        with pytest.raises(TypeError, match="cannot pickle a"):
            pickle.dumps(thing)
    answer = demo.generate("x", max_new_tokens=1)
    for result in [answer, answer.usage, answer.timings]:
        with pytest.raises(TypeError, match="cannot pickle"):
            pickle.dumps(result)
    with pytest.raises(TypeError):
        Model()


def test_the_package_says_what_it_is() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", qwen2_rs.__version__)
    assert "cpu" in qwen2_rs.devices()
    assert all(hasattr(qwen2_rs, name) for name in qwen2_rs.__all__)
    assert Model.__module__ == "qwen2_rs"
