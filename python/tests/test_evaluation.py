"""Likelihoods and answers for evaluation harnesses, without any harness; with them: ecosystem/."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import DEMO, run_python
from qwen2_rs import InvalidArgumentError, Model, Tokenizer, _batch
from qwen2_rs.evaluation import Evaluator
from qwen2_rs.evaluation.scoring import perplexity_score, stops

RECORDED: Any = json.loads((Path(__file__).parent / "data" / "evaluation.json").read_text(encoding="utf-8"))
QUESTIONS = [
    json.loads(line)
    for line in (DEMO.parent / "evaluation" / "demo.jsonl").read_text(encoding="utf-8").splitlines()
]


@pytest.fixture(scope="module")
def model() -> Model:
    return Model.load(DEMO, device="cpu", dtype="f32", threads=2)


@pytest.fixture(scope="module")
def evaluator(model: Model) -> Evaluator:
    return Evaluator(model)


def test_likelihoods_are_those_of_the_transformers_backend(evaluator: Evaluator) -> None:
    """What `hf` of lm-evaluation-harness said of the mini task; 1e-3, as in ecosystem/test_harness.py."""
    pairs, expected = [], []
    for question, said in zip(QUESTIONS, RECORDED["plain"]["said"]["demo_choice"], strict=True):
        context = evaluator.encode(question["question"])
        for choice, (logprob, greedy) in zip(question["choices"], said, strict=True):
            whole = evaluator.encode(question["question"] + choice)
            pairs.append((whole[: len(context)], whole[len(context) :]))
            expected.append((logprob, greedy))
    found = list(evaluator.likelihoods(pairs))
    assert len(found) == 4 * len(QUESTIONS)
    assert [likelihood.greedy for likelihood in found] == [greedy for _, greedy in expected]
    assert [likelihood.logprob for likelihood in found] == pytest.approx(
        [logprob for logprob, _ in expected], abs=1e-3, rel=0
    )


def test_answers_are_those_of_the_transformers_backend(model: Model, evaluator: Evaluator) -> None:
    options = {**stops(model.tokenizer, ["\n"]), "temperature": 0.0, "max_new_tokens": 48}
    chats = [[{"role": "user", "content": question["question"]}] for question in QUESTIONS]
    answers = list(evaluator.answers((chat, options) for chat in chats))
    assert [[answer] for answer in answers] == RECORDED["chat"]["said"]["demo_answer"]


def test_a_likelihood_is_the_sum_of_the_scores_and_greedy_where_the_model_would_say_it(
    model: Model, evaluator: Evaluator
) -> None:
    prompt = model.tokenizer.encode_chat([{"role": "user", "content": "2 + 3"}], add_generation_prompt=True)
    answer = model.generate(prompt, temperature=0).tokens
    wrong = [*answer[:-1], answer[0]]
    right, other, nothing = evaluator.likelihoods([(prompt, answer), (prompt, wrong), (prompt, [])])
    assert right.logprob == pytest.approx(model.score(prompt + answer)[-len(answer) :].sum(), abs=1e-4)
    assert (right.greedy, other.greedy) == (True, False)
    assert other.logprob < right.logprob - 1
    assert (nothing.logprob, nothing.greedy) == (0.0, True)


def test_a_context_that_is_too_long_loses_its_beginning(model: Model) -> None:
    short = Evaluator(model, max_length=32)
    tokens = short.encode("What is 2 plus 3? " * 40)
    (found,) = short.likelihoods([(tokens[:-5], tokens[-5:])])
    assert found.logprob == pytest.approx(model.score(tokens[-33:])[-5:].sum(), abs=1e-4)
    whole = Evaluator(model)
    # One token is read beyond what a window holds, and one more is chosen.
    assert (short.max_scored, whole.max_scored) == (33, model.context_length - 1)
    (last,) = whole.likelihoods([(tokens * 10, tokens[:1])])
    assert math.isfinite(last.logprob)
    assert short.fitted(tokens, 8) == tokens[-24:]


@pytest.mark.parametrize("length", [1, 1025])
def test_lengths_beyond_the_context_are_refused(model: Model, length: int) -> None:
    with pytest.raises(InvalidArgumentError, match="max_length"):
        Evaluator(model, max_length=length)


def test_what_has_no_likelihood_is_refused(evaluator: Evaluator) -> None:
    with pytest.raises(InvalidArgumentError, match="cannot score 1 tokens behind 0"):
        list(evaluator.likelihoods([([], [1])]))
    with pytest.raises(InvalidArgumentError, match="max_new_tokens"):
        evaluator.fitted([1], 1024)


def test_control_tokens_stop_as_tokens_and_texts_as_texts() -> None:
    tokenizer = Tokenizer.load(DEMO)
    end, start = tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|im_start|>")
    found = stops(tokenizer, ["\n\n", "", "<|im_start|>", "<|im_end|>"])
    assert end is not None
    assert start is not None
    assert found == {"stop": ["\n\n"], "stop_token_ids": sorted([start, end])}


def test_the_score_of_opencompass_counts_the_first_token_but_not_masked_ones() -> None:
    assert perplexity_score([-1.0, -2.0, -3.0], None) == 6 / 4
    assert perplexity_score([-1.0, -2.0, -3.0], 1) == 6 / 3
    assert perplexity_score([-1.0, -2.0, -3.0], 2) == 5 / 2


def test_answers_come_in_order_and_a_failure_stands_among_them(model: Model) -> None:
    prompts: list[str | list[int]] = ["What is", "What is " * 2000, [], "Count from"]
    options: dict[str, Any] = {"temperature": 0, "max_new_tokens": 4}
    answers = list(
        _batch.in_order(model.engine(max_sequences=2), ((prompt, options) for prompt in prompts), at_once=2)
    )
    assert [type(answer).__name__ for answer in answers] == [
        "Generation",
        "ContextOverflowError",
        "InvalidArgumentError",
        "Generation",
    ]
    assert str(answers[3]) == model.generate("Count from", **options).text


def test_whoever_stops_reading_ends_what_is_running(long_model: Model) -> None:
    taken = []

    def requests() -> Any:
        for number in range(1000):
            taken.append(number)
            yield (
                f"Count from {number}",
                {"max_new_tokens": 3 if number == 0 else 150_000, "ignore_eos": True},
            )

    answers = _batch.in_order(long_model.engine(max_sequences=2), requests(), at_once=2)
    assert getattr(next(answers), "finish_reason", None) == "length"
    # It would go on for minutes; the test's own limit is two of them.
    answers.close()
    assert len(taken) <= 5


@pytest.mark.parametrize(
    ("module", "package", "install"),
    [
        ("qwen2_rs.evaluation.harness", "lm_eval", "qwen2-rs[evaluation]"),
        ("qwen2_rs.evaluation.opencompass", "opencompass", "opencompass"),
        ("qwen2_rs.ray.serve", "ray", "qwen2-rs[ray]"),
    ],
)
def test_a_package_that_is_not_there_is_named_with_the_way_to_it(
    module: str, package: str, install: str
) -> None:
    # Names of modules that are None cannot be imported, be they installed or not.
    program = f"""
import importlib, sys
sys.modules[{package!r}] = None
try:
    importlib.import_module({module!r})
except ImportError as error:
    print(error.name, error)
"""
    done = run_python(program)
    name, said = done.stdout.split(maxsplit=1)
    assert name == package
    assert said.startswith(f"{package} is not installed: {module} needs it; help: pip install ")
    assert install in said


def test_the_command_says_what_it_lacks(tmp_path: Path) -> None:
    (tmp_path / "lm_eval.py").write_text("raise ModuleNotFoundError('no', name='lm_eval')")
    command = [sys.executable, "-m", "qwen2_rs.evaluation", "--model", "qwen2_rs"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, env={"PYTHONPATH": str(tmp_path)}
    )
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "error: lm_eval is not installed: this command needs it; help: pip install 'qwen2-rs[evaluation]'"
    ]
