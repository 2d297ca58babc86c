"""Needle in a haystack: does a model find one sentence anywhere in a long text?

python -m qwen2_rs.needle MODEL --lengths 4k,32k,128k --depths 0,25,50,75,100

Every cell of the table is the share of needles that were found: sentences with a number of seven digits,
put at a depth of a text of so many tokens, which the model is asked for (as in arXiv:2404.06654).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle, product
from pathlib import Path
from random import Random

from qwen2_rs._qwen2 import Model, Qwen2Error, Tokenizer
from qwen2_rs._types import MessageDict

Prompt = str | list[MessageDict]
Answer = Callable[[Prompt, int], str]

CITIES = ("Lisbon", "Nairobi", "Oslo", "Lima", "Kyoto", "Cairo", "Quito", "Perth", "Riga", "Hanoi")
NEEDLE = "The special magic number for {city} is {number}."
QUESTION = "What is the special magic number for {city} that the text mentions? Answer with the number alone."
COMPLETION = "The special magic number for {city} that the text mentions is"
MAX_NEW_TOKENS = 32


@dataclass(frozen=True)
class Result:
    """One needle: where it was, and whether it was found."""

    length: int  # tokens that were asked for, answer included
    prompt_tokens: int
    depth: float  # percent of the text before the needle
    number: str
    answer: str
    found: bool


def filler(rng: Random) -> Iterable[str]:
    """Sentences without end that no needle looks like."""
    who = ("The gardener", "A traveller", "Her neighbour", "The old clerk", "Their teacher", "A sailor")
    did = ("walked past", "wrote about", "dreamed of", "painted", "sold", "remembered", "looked for")
    what = ("the harbour", "a wooden bridge", "the market", "three lamps", "the station", "an orchard")
    when = ("before noon", "in the rain", "without a word", "once again", "late in autumn", "that evening")
    while True:
        parts = (rng.choice(who), rng.choice(did), rng.choice(what), rng.choice(when))
        yield " ".join(parts) + "."


def sentences_of(text: str) -> list[str]:
    """A text cut behind its full stops."""
    pieces = text.replace("\n", " ").split(". ")
    return [piece.strip().rstrip(".") + "." for piece in pieces if piece.strip(" .")]


class Haystack:
    """Sentences with their tokens, from which texts of any length are cut."""

    def __init__(self, tokenizer: Tokenizer, sentences: Iterable[str]) -> None:
        """`sentences` may be without end; those that are not begin again."""
        self._tokenizer = tokenizer
        self._source = cycle(sentences)
        self._sentences: list[str] = []
        self._counts: list[int] = []

    def _tokens_of(self, index: int) -> int:
        while len(self._sentences) <= index:
            sentence = next(self._source, None)
            if sentence is None:
                raise ValueError("the haystack has no sentence")
            self._sentences.append(sentence)
            self._counts.append(self._tokenizer.count(" " + sentence))
        return self._counts[index]

    def prompt(self, length: int, depth: float, city: str, number: str) -> tuple[Prompt, int]:
        """The longest prompt of at most `length` tokens with the needle at `depth` percent of its text,
        and its tokens.
        """
        room, sentences = length, 0
        while True:
            sentences = self._fitting(room)
            prompt = self._assemble(sentences, depth, city, number)
            tokens = self._count(prompt)
            if tokens <= length:
                return prompt, tokens
            if sentences == 0:
                raise ValueError(f"{length} tokens are too few for question and needle: they take {tokens}")
            # Scaffold, question and needle, and what merges across sentences.
            room -= tokens - length

    def _fitting(self, room: int) -> int:
        sentences = 0
        while (room := room - self._tokens_of(sentences)) >= 0:
            sentences += 1
        return sentences

    def _assemble(self, sentences: int, depth: float, city: str, number: str) -> Prompt:
        before, total = 0, sum(self._counts[:sentences])
        passed = 0
        while before < sentences and passed < total * depth / 100:
            passed += self._counts[before]
            before += 1
        needle = NEEDLE.format(city=city, number=number)
        text = " ".join([*self._sentences[:before], needle, *self._sentences[before:sentences]])
        if self._tokenizer.chat_template is None:
            return f"{text}\n\n{COMPLETION.format(city=city)}"
        return [{"role": "user", "content": f"{text}\n\n{QUESTION.format(city=city)}"}]

    def _count(self, prompt: Prompt) -> int:
        if isinstance(prompt, str):
            return self._tokenizer.count(prompt)
        return len(self._tokenizer.encode_chat(prompt, add_generation_prompt=True))


def evaluate(
    haystack: Haystack,
    answer: Answer,
    places: Iterable[tuple[int, float]],
    rng: Random,
    report: Callable[[Result], None] | None = None,
) -> list[Result]:
    """Asks `answer` for a needle at every place, a length with a depth; `report` sees each result when it
    is there.
    """
    results = []
    for length, depth in places:
        city, number = rng.choice(CITIES), str(rng.randrange(1_000_000, 10_000_000))
        prompt, tokens = haystack.prompt(length - MAX_NEW_TOKENS, depth, city, number)
        said = answer(prompt, MAX_NEW_TOKENS)
        result = Result(length, tokens, depth, number, said, found(number, said))
        results.append(result)
        if report is not None:
            report(result)
    return results


def found(number: str, answer: str) -> bool:
    """Whether the answer has the number, be it with commas or spaces between its digits."""
    digits = "".join(c for c in answer if c not in ", _\u00a0\u202f")
    runs = "".join(c if c.isascii() and c.isdigit() else " " for c in digits).split()
    return number in runs


def table(results: Sequence[Result]) -> str:
    """Lengths down, depths across, in percent."""
    depths = sorted({result.depth for result in results})
    lines = ["tokens " + "".join(f"{depth:>7g} %" for depth in depths)]
    for length in sorted({result.length for result in results}):
        cells = []
        for depth in depths:
            cell = [result.found for result in results if (result.length, result.depth) == (length, depth)]
            cells.append(f"{100 * sum(cell) / len(cell):>9.0f}" if cell else " " * 9)
        lines.append(f"{length:<7}" + "".join(cells))
    return "\n".join(lines)


def tokens(text: str) -> int:
    """`32k` is 32,768."""
    number, unit = (text[:-1], 1024) if text[-1:] in ("k", "K") else (text, 1)
    if not number.isdigit() or int(number) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of tokens, as 4096 or 32k")
    return int(number) * unit


def percent(text: str) -> float:
    """0 to 100."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 100:  # noqa: PLR2004
        raise argparse.ArgumentTypeError(f"{text!r} is not within 0 and 100")
    return value


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m qwen2_rs.needle", description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a directory, a GGUF file, or an id of the hub")
    parser.add_argument("--lengths", default="4k", help="tokens with the answer, by commas; default 4k")
    parser.add_argument("--depths", default="0,25,50,75,100", help="percent; default 0,25,50,75,100")
    parser.add_argument("--trials", type=int, default=1, help="needles for each length and depth; default 1")
    parser.add_argument("--haystack", type=Path, help="a text of your own; by default one is made up")
    parser.add_argument("--seed", type=int, default=0, help="of the needles and of the text; default 0")
    parser.add_argument("--json", action="store_true", help="one object a line for each needle")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--quantize", choices=["q8", "q4"])
    parser.add_argument("--kv-cache", choices=["f32", "f16", "bf16", "q8", "q4"])
    parser.add_argument("--long-context", default="yarn", choices=["yarn", "yarn_when_needed", "dual_chunk"])
    parser.add_argument("--threads", type=int)
    options = parser.parse_args(argv)
    try:
        options.lengths = [tokens(text) for text in options.lengths.split(",")]
        options.depths = [percent(text) for text in options.depths.split(",")]
    except argparse.ArgumentTypeError as error:
        parser.error(str(error))
    if options.trials < 1:
        parser.error("--trials is at least 1")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; 0 unless something failed, whatever the model found."""
    options = arguments(argv)

    def print_one(result: Result) -> None:
        print(json.dumps(asdict(result), ensure_ascii=False), flush=True)

    try:
        model = Model.load(
            options.model,
            device=options.device,
            quantize=options.quantize,
            kv_cache=options.kv_cache,
            long_context=options.long_context,
            context_length=max(options.lengths),
            threads=options.threads,
        )
        own = options.haystack and sentences_of(options.haystack.read_text(encoding="utf-8"))
        haystack = Haystack(model.tokenizer, own or filler(Random(options.seed)))  # noqa: S311

        def answer(prompt: Prompt, max_new_tokens: int) -> str:
            return model.generate(prompt, max_new_tokens=max_new_tokens, temperature=0).text

        places = product(options.lengths, options.depths, range(options.trials))
        results = evaluate(
            haystack,
            answer,
            ((length, depth) for length, depth, _ in places),
            Random(options.seed),  # noqa: S311
            print_one if options.json else None,
        )
    except (Qwen2Error, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if not options.json:
        print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
