"""The models of an OpenCompass config: `Qwen2` for base checkpoints, `Qwen2Chat` for instruct ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from qwen2_rs import _extras
from qwen2_rs._qwen2 import InvalidArgumentError, Model, Tokenizer
from qwen2_rs.evaluation.scoring import MAX_SEQUENCES, Evaluator, perplexity_score, stops

try:
    from opencompass.models.base import BaseModel
    from opencompass.models.base_api import APITemplateParser
except ImportError as error:
    raise _extras.missing(error, "opencompass", __name__, "opencompass") from error

if TYPE_CHECKING:
    import torch

    from qwen2_rs._types import MessageDict

ROLES = {"HUMAN": "user", "BOT": "assistant", "SYSTEM": "system"}
# As OpenCompass' own: what tasks say as the system is said by the user.
CHAT_TEMPLATE = {
    "round": [
        {"role": "HUMAN", "api_role": "HUMAN"},
        {"role": "SYSTEM", "api_role": "HUMAN"},
        {"role": "BOT", "api_role": "BOT", "generate": True},
    ]
}


class Qwen2(BaseModel):
    """A checkpoint that goes on with texts, with the numbers of OpenCompass' HuggingFaceBaseModel."""

    def __init__(
        self,
        path: str,
        max_seq_len: int | None = None,
        tokenizer_only: bool = False,
        meta_template: Mapping[str, Any] | None = None,
        generation_kwargs: Mapping[str, Any] | None = None,
        sync_rank: bool = False,
        *,
        stop_words: Sequence[str] = (),
        max_sequences: int = MAX_SEQUENCES,
        device: str = "auto",
        dtype: str = "auto",
        quantize: str | None = None,
        kv_cache: str | None = None,
        adapter: str | None = None,
        threads: int | None = None,
    ) -> None:
        """`generation_kwargs`: options of Model.generate; without any the answers are greedy. `stop_words`:
        texts that end an answer. `max_sequences`: prompts that are computed together. The rest is as in
        Model.load, `path` as its source.
        """
        self.stop_words = list(stop_words)
        self._evaluator: Evaluator | None = None
        if tokenizer_only:
            self.tokenizer = Tokenizer.load(path)
        else:
            model = Model.load(
                path,
                device=device,
                dtype=dtype,
                quantize=quantize,
                kv_cache=kv_cache,
                adapter=adapter,
                threads=threads,
            )
            self.tokenizer = model.tokenizer
            self._evaluator = Evaluator(model, max_length=max_seq_len, max_sequences=max_sequences)
            max_seq_len = self._evaluator.max_length
        super().__init__(
            path=path,
            max_seq_len=2048 if max_seq_len is None else max_seq_len,
            tokenizer_only=tokenizer_only,
            meta_template=meta_template,
            generation_kwargs={"temperature": 0.0, **(generation_kwargs or {})},
            sync_rank=sync_rank,
        )

    @property
    def evaluator(self) -> Evaluator:
        """The model."""
        if self._evaluator is None:
            raise InvalidArgumentError(f"{self.path} was opened with tokenizer_only and computes nothing")
        return self._evaluator

    def generate(
        self,
        inputs: Sequence[Any],
        max_out_len: int,
        min_out_len: int | None = None,
        stopping_criteria: Sequence[str] = (),
        **kwargs: Any,
    ) -> list[str]:
        """The answers to prompts."""
        options = {
            **self.generation_kwargs,
            **kwargs,
            **stops(self.tokenizer, [*self.stop_words, *stopping_criteria]),
            "max_new_tokens": max_out_len,
            "min_new_tokens": min_out_len,
        }
        if options.pop("do_sample", None) is False:
            options["temperature"] = 0.0
        evaluator = self.evaluator
        prompts = (evaluator.fitted(self._tokens(prompt), max_out_len) for prompt in inputs)
        return list(evaluator.answers((prompt, options) for prompt in prompts))

    def get_ppl(
        self, inputs: Sequence[Any], mask_length: Sequence[int] | None = None
    ) -> npt.NDArray[np.float64]:
        """The mean negative log-likelihood of texts, without their first mask_length tokens; an array, as
        PPLInferencer wants it.
        """
        masks = [None] * len(inputs) if mask_length is None else list(mask_length)
        found = self.evaluator.logprobs(self._tokens(text) for text in inputs)
        scores = [
            perplexity_score([entry.logprob for entry in entries], masked)
            for entries, masked in zip(found, masks, strict=True)
        ]
        return np.array(scores)

    def get_loglikelihood(
        self, inputs: Sequence[str], conts: Sequence[str], mask_length: Sequence[int] | None = None
    ) -> npt.NDArray[np.float64]:
        """How likely each of `conts` is, which its input ends in."""
        if mask_length is not None:
            raise InvalidArgumentError("get_loglikelihood knows no mask_length")
        pairs = []
        for text, continuation in zip(inputs, conts, strict=True):
            whole = self._tokens(text)
            context = self._tokens(text.replace(continuation, ""))
            pairs.append((whole[: len(context)], whole[len(context) :]))
        return np.array([likelihood.logprob for likelihood in self.evaluator.likelihoods(pairs)])

    def encode(self, prompt: str) -> torch.Tensor:
        """The tokens of a text."""
        import torch

        return torch.tensor(self._tokens(prompt))

    def decode(self, tokens: torch.Tensor) -> str:
        """The text of tokens."""
        return self.tokenizer.decode(tokens.tolist())

    def get_token_len(self, prompt: str) -> int:
        """How many tokens a prompt has."""
        return len(self._tokens(prompt))

    def _tokens(self, prompt: Any) -> list[int]:
        text = prompt if isinstance(prompt, str) else "".join(item["prompt"] for item in prompt)
        return self.tokenizer.encode_with_special_tokens(text)


class Qwen2Chat(Qwen2):
    """A checkpoint that answers conversations, which go through its chat template; control tokens spelled in
    them stay plain text.
    """

    def __init__(self, path: str, *, meta_template: Mapping[str, Any] | None = None, **options: Any) -> None:
        """As of Qwen2; `meta_template` is one for an API."""
        super().__init__(path, **options)
        self.template_parser = APITemplateParser(meta_template or CHAT_TEMPLATE)

    def get_ppl(self, *_: Any, **__: Any) -> npt.NDArray[np.float64]:
        """Refused: an answer is no likelihood."""
        raise InvalidArgumentError("Qwen2Chat answers; tasks that compare likelihoods are for Qwen2")

    def get_loglikelihood(self, *_: Any, **__: Any) -> npt.NDArray[np.float64]:
        """Refused, as get_ppl."""
        return self.get_ppl()

    def _tokens(self, prompt: Any) -> list[int]:
        return self.tokenizer.encode_chat(messages_of(prompt), add_generation_prompt=True)


def messages_of(prompt: Any) -> list[MessageDict]:
    """A prompt of OpenCompass as messages; neighbours of one role become one."""
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    messages: list[MessageDict] = []
    for item in prompt:
        if not item["prompt"]:
            continue
        role, content = ROLES[item["role"]], item["prompt"]
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += "\n" + content
        else:
            messages.append({"role": role, "content": content})
    return messages
