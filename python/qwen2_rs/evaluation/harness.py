"""The model `qwen2_rs` of EleutherAI's lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qwen2_rs import _extras
from qwen2_rs._qwen2 import InvalidArgumentError, Model
from qwen2_rs.evaluation.scoring import MAX_SEQUENCES, Evaluator, Tokens, stops

try:
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from tqdm import tqdm
except ImportError as error:
    raise _extras.missing(error, "lm_eval", __name__, "'qwen2-rs[evaluation]'") from error

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

SAMPLING = {"temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "seed"}
"""What a task may set of the sampler, under the same names here."""


@register_model("qwen2_rs")
class Qwen2LM(TemplateLM):
    """A checkpoint of Qwen2, with the tokens, windows and stops of the harness' own backend `hf`."""

    def __init__(
        self,
        pretrained: str,
        *,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        dtype: str = "auto",
        quantize: str | None = None,
        kv_cache: str | None = None,
        activations: str = "f32",
        adapter: str | None = None,
        context_length: int | None = None,
        long_context: str = "yarn",
        threads: int | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
    ) -> None:
        """`batch_size`: prompts that are computed together, "auto" for 8 or `max_batch_size`. `max_length`:
        tokens of prompt and answer. The rest is as in Model.load, `pretrained` as its source, where cuda:0 is
        auto.
        """
        super().__init__()
        model = Model.load(
            pretrained,
            # The command's own default, which it never says it was not asked for.
            device="auto" if device in (None, "cuda:0") else device,
            dtype=dtype,
            quantize=quantize,
            kv_cache=kv_cache,
            activations=activations,
            adapter=adapter,
            context_length=context_length,
            long_context=long_context,
            threads=threads,
        )
        self.evaluator = Evaluator(
            model, max_length=max_length, max_sequences=sequences(batch_size, max_batch_size)
        )
        self.tokenizer = model.tokenizer  # TemplateLM reads its chat template
        self.max_gen_toks = max_gen_toks
        self._name = pretrained

    @property
    def max_length(self) -> int:
        """Tokens of prompt and answer."""
        return self.evaluator.max_length

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text, and stands before one that nothing precedes."""
        token = self.tokenizer.eos_token_id
        if token is None:
            raise InvalidArgumentError(f"the tokenizer of {self._name} names no eos_token")
        return token

    @property
    def tokenizer_name(self) -> str:
        """What the harness tells caches of requests apart by."""
        return self._name.replace("/", "__")

    def apply_chat_template(
        self, chat_history: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        """The text of a conversation; without the generation prompt its last message stays open, to be
        continued.
        """
        text = self.tokenizer.apply_chat_template(chat_history, add_generation_prompt=add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"]
        if last not in text:  # the template trims
            last = last.strip()
        return text[: text.rindex(last) + len(last)]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The tokens of a text. `add_special_tokens` changes nothing: Qwen2 puts none before a text."""
        del add_special_tokens
        return self.evaluator.encode(string)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, Tokens, Tokens]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        found = self.evaluator.likelihoods((context, continuation) for _, context, continuation in requests)
        bar = tqdm(found, total=len(requests), disable=disable_tqdm, desc="Running loglikelihood requests")
        results = []
        for (texts, _context, _continuation), likelihood in zip(requests, bar, strict=True):
            result = (likelihood.logprob, likelihood.greedy)
            results.append(result)
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, result)
        return results

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """How likely whole texts are: each token is foretold from as much as the context holds."""
        owners: list[int] = []

        def windows() -> Iterator[tuple[Tokens, Tokens]]:
            for index, request in enumerate(requests):
                rolling = utils.get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0]),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.evaluator.max_scored - 1,
                    context_len=1,
                )
                for window in map(utils.make_disjoint_window, rolling):
                    owners.append(index)
                    yield window

        totals = [0.0] * len(requests)
        found = self.evaluator.likelihoods(windows())
        bar = tqdm(found, disable=disable_tqdm, desc="Running loglikelihood_rolling windows")
        for index, likelihood in enumerate(bar):
            totals[owners[index]] += likelihood.logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """The answers to texts, each up to one of its stops."""
        answers = self.evaluator.answers(self._request(*request.args) for request in requests)
        bar = tqdm(answers, total=len(requests), disable=disable_tqdm, desc="Running generate_until requests")
        results = []
        for request, text in zip(requests, bar, strict=True):
            results.append(text)
            self.cache_hook.add_partial("generate_until", request.args, text)
        return results

    def _request(self, context: str, gen_kwargs: Mapping[str, Any]) -> tuple[list[int], dict[str, Any]]:
        given = dict(normalize_gen_kwargs(dict(gen_kwargs), self.max_gen_toks))
        until, most, sample = given.pop("until"), given.pop("max_gen_toks"), given.pop("do_sample")
        if not sample:
            given["temperature"] = 0.0
        unknown = sorted(given.keys() - SAMPLING)
        if unknown:
            raise InvalidArgumentError(f"unknown generation_kwargs: {', '.join(unknown)}")
        options = {**given, **stops(self.tokenizer, until), "max_new_tokens": most}
        # Like any text, one of no token begins behind the prefix.
        tokens = self.tok_encode(context) or [self.prefix_token_id]
        return self.evaluator.fitted(tokens, most), options


def sequences(batch_size: int | str | None, max_batch_size: int | None) -> int:
    """How many prompts are computed together for the harness' two options."""
    if batch_size is None or (isinstance(batch_size, str) and batch_size.startswith("auto")):
        return max_batch_size or MAX_SEQUENCES
    return int(batch_size)
