"""Likelihoods and answers of many prompts: what every harness asks a model for.

Texts are encoded as transformers' backends of the harnesses do, with `<|im_end|>` a control token: templates
come as text. Evaluate on texts that you trust.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qwen2_rs._batch import all_answered
from qwen2_rs._qwen2 import InvalidArgumentError, Model, Tokenizer

if TYPE_CHECKING:
    from qwen2_rs._qwen2 import Logprobs
    from qwen2_rs._types import Prompt

Tokens = Sequence[int]

MAX_SEQUENCES = 8
"""Prompts that are computed together where nobody says otherwise."""


@dataclass(frozen=True)
class Likelihood:
    """How likely a continuation is."""

    logprob: float  # natural logarithm
    greedy: bool  # whether each of its tokens is the likeliest one


class Evaluator:
    """A model and its engine, for prompts by the thousand."""

    def __init__(
        self, model: Model, *, max_length: int | None = None, max_sequences: int = MAX_SEQUENCES
    ) -> None:
        """`max_length`: tokens of prompt and answer, by default the model's context. `max_sequences`: prompts
        that are computed together.
        """
        self.model = model
        self.max_length = model.context_length if max_length is None else max_length
        if not 1 < self.max_length <= model.context_length:
            raise InvalidArgumentError(
                f"option out of range: max_length: expected 2 to {model.context_length}, found {max_length}"
            )
        self.max_sequences = max_sequences
        self.engine = model.engine(max_sequences=max_sequences)

    @property
    def max_scored(self) -> int:
        """Tokens that a likelihood is of, those it is given included.

        A window of the harnesses is one token longer than `max_length`, as the model need not read its last
        one. Here that one is read and one more is chosen, and both have to fit the context.
        """
        return min(self.max_length + 1, self.model.context_length - 1)

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, control tokens among them."""
        return self.model.tokenizer.encode_with_special_tokens(text)

    def logprobs(self, sequences: Iterable[Tokens]) -> Iterator[list[Logprobs]]:
        """What the model thinks of every token but the first; longer sequences lose their beginning."""
        options = {"max_new_tokens": 1, "temperature": 0.0, "prompt_logprobs": 1}
        requests = ((list(tokens)[-self.max_scored :], options) for tokens in sequences)
        for answer in all_answered(self.engine, requests, self.max_sequences):
            yield answer.prompt_logprobs

    def likelihoods(self, pairs: Iterable[tuple[Tokens, Tokens]]) -> Iterator[Likelihood]:
        """How likely each continuation is behind its context, which has a token at least."""
        counts: list[int] = []

        def sequences() -> Iterator[Tokens]:
            for context, continuation in pairs:
                if not context or len(continuation) >= self.max_scored:
                    raise InvalidArgumentError(
                        f"cannot score {len(continuation)} tokens behind {len(context)}: there must be one "
                        f"before them, and {self.max_scored} in all at most"
                    )
                counts.append(len(continuation))
                yield [*context, *continuation]

        for index, found in enumerate(self.logprobs(sequences())):
            # The slice from -0 would be all of them.
            own = found[len(found) - counts[index] :]
            yield Likelihood(
                sum(entry.logprob for entry in own), all(entry.top[0].token == entry.token for entry in own)
            )

    def answers(self, requests: Iterable[tuple[Prompt, Mapping[str, Any]]]) -> Iterator[str]:
        """The text for each prompt with its options."""
        for answer in all_answered(self.engine, requests, self.max_sequences):
            yield answer.text

    def fitted(self, tokens: Tokens, max_new_tokens: int) -> list[int]:
        """The end of a prompt that leaves room for its answer."""
        room = self.max_length - max_new_tokens
        if room < 1:
            raise InvalidArgumentError(
                f"option out of range: max_new_tokens: expected 1 to {self.max_length - 1}, less than "
                f"max_length, found {max_new_tokens}"
            )
        return list(tokens)[-room:]


def stops(tokenizer: Tokenizer, texts: Iterable[str]) -> dict[str, Any]:
    """The options by which a generation ends at any of `texts`, and at the tokenizer's own end."""
    strings: list[str] = []
    tokens: list[int] = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for text in texts:
        token = tokenizer.token_to_id(text)
        if token is not None and tokenizer.is_special(token):
            tokens.append(token)  # it is never part of a text
        elif text:
            strings.append(text)
    return {"stop": strings or None, "stop_token_ids": sorted(set(tokens)) or None}


def perplexity_score(logprobs: Sequence[float], masked: int | None) -> float:
    """OpenCompass' "ppl" of a text from the log-probabilities of its tokens behind the first: their mean,
    negated, over all tokens of the text that are not among the first `masked`.
    """
    counted = logprobs if masked is None else logprobs[max(masked - 1, 0) :]
    return -sum(counted) / (len(logprobs) + 1 - (masked or 0))
