"""The needle in a haystack: where it lies, what counts as found, and the command on the demo model.

The demo model cannot look anything up (it was trained on one-sentence tasks), so a reader with a known fault
stands in for a model where finding is judged; the demo model is asked for the mechanics alone.
"""

from __future__ import annotations

import json
import re
from random import Random

import pytest
from conftest import DEMO
from qwen2_rs import Tokenizer, needle
from qwen2_rs.needle import Haystack, Prompt, Result


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(DEMO)


@pytest.fixture
def haystack(tokenizer: Tokenizer) -> Haystack:
    return Haystack(tokenizer, needle.filler(Random(0)))


def text_of(prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else prompt[0]["content"]


@pytest.mark.parametrize("length", [120, 500, 992])
@pytest.mark.parametrize("depth", [0, 25, 50, 75, 100])
def test_the_needle_is_once_at_its_depth_in_a_prompt_of_the_length(
    tokenizer: Tokenizer, haystack: Haystack, length: int, depth: float
) -> None:
    prompt, tokens = haystack.prompt(length, depth, "Oslo", "1234567")
    assert not isinstance(prompt, str)
    assert tokens == len(tokenizer.encode_chat(prompt, add_generation_prompt=True)) <= length
    assert tokens > length - 40  # a sentence less than would fit, at most two
    text = text_of(prompt).split("\n\n")[0]
    sentence = needle.NEEDLE.format(city="Oslo", number="1234567")
    before, after = text.split(sentence)
    share = 100 * len(before) / max(1, len(before) + len(after))
    assert abs(share - depth) <= 100 * 60 / max(60, len(before) + len(after))


def test_a_model_without_a_template_completes_a_sentence(
    haystack: Haystack, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Base:
        """A tokenizer of a base model."""

        chat_template = None

        def count(self, text: str) -> int:
            return len(text.split())

    monkeypatch.setattr(haystack, "_tokenizer", Base())
    prompt, tokens = haystack.prompt(200, 50, "Riga", "7654321")
    assert isinstance(prompt, str)
    assert prompt.endswith("The special magic number for Riga that the text mentions is")
    assert 180 < tokens <= 200


def test_a_reader_of_the_first_half_finds_what_lies_there(haystack: Haystack) -> None:
    def first_half(prompt: Prompt, max_new_tokens: int) -> str:
        assert max_new_tokens == needle.MAX_NEW_TOKENS
        text = text_of(prompt)
        numbers = re.findall(r"magic number for \w+ is (\d{7})", text[: len(text) // 2])
        return f"It is {numbers[0]}." if numbers else "The text mentions no number."

    places = [(length, depth) for length in (300, 900) for depth in (0, 25, 75, 100)] * 2
    seen: list[Result] = []
    results = needle.evaluate(haystack, first_half, places, Random(0), seen.append)
    assert seen == results
    assert [(result.length, result.depth) for result in results] == places
    assert all(result.found == (result.depth < 50) for result in results)
    assert len({result.number for result in results}) > 10
    assert needle.table(results).splitlines() == [
        "tokens       0 %     25 %     75 %    100 %",
        "300          100      100        0        0",
        "900          100      100        0        0",
    ]
    assert needle.evaluate(haystack, first_half, places, Random(0)) == results


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("1234567", True),
        ("The number is 1,234,567.", True),
        ("1 234 567", True),
        ("**1234567**", True),
        ("11234567", False),
        ("12345678", False),
        ("1234568", False),
        ("", False),
    ],
)
def test_only_the_whole_number_counts(answer: str, found: bool) -> None:
    assert needle.found("1234567", answer) is found


def test_the_command_asks_the_demo_model_at_its_trained_length(capsys: pytest.CaptureFixture[str]) -> None:
    command = [str(DEMO), "--lengths", "512,1k", "--depths", "0,100", "--json", "--threads", "2"]
    assert needle.main(command) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    places = [(line["length"], line["depth"]) for line in lines]
    assert places == [(512, 0), (512, 100), (1024, 0), (1024, 100)]
    for line in lines:
        assert line["length"] - 72 < line["prompt_tokens"] <= line["length"] - needle.MAX_NEW_TOKENS
        assert line["found"] == needle.found(line["number"], line["answer"])
    config = json.loads((DEMO / "config.json").read_text())
    assert config["max_position_embeddings"] == places[-1][0]


def test_a_text_of_ones_own_begins_again_where_it_ends(tokenizer: Tokenizer) -> None:
    sentences = needle.sentences_of("One hat.  Two cats\nsat. Three")
    assert sentences == ["One hat.", "Two cats sat.", "Three."]
    prompt, _ = Haystack(tokenizer, sentences).prompt(300, 100, "Lima", "1111111")
    assert text_of(prompt).startswith("One hat. Two cats sat. Three. One hat.")


@pytest.mark.parametrize(
    "wrong",
    [["--lengths", "4q"], ["--lengths", "0"], ["--depths", "101"], ["--depths", "a"], ["--trials", "0"]],
)
def test_wrong_arguments_are_usage_errors(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        needle.main([str(DEMO), *wrong])
    assert stopped.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_what_cannot_be_asked_is_an_error_and_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert needle.main(["/no/such/model"]) == 1
    assert needle.main([str(DEMO), "--lengths", "64"]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert errors[0].startswith("error: no such model: /no/such/model")
    assert errors[1].startswith("error: 32 tokens are too few")
