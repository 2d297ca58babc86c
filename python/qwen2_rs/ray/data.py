"""Batch inference: a model answers a column of a dataset of Ray Data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from qwen2_rs import _extras
from qwen2_rs._batch import in_order
from qwen2_rs._qwen2 import Model, Qwen2Error

if TYPE_CHECKING:
    from ray.data import Dataset

    from qwen2_rs._types import Prompt

Batch = dict[str, npt.NDArray[Any]]


class Answers:
    """The callable of Dataset.map_batches: a model and its engine, loaded once in each actor.

    A batch gets the columns `answer`, `finish_reason`, `prompt_tokens` and `completion_tokens`.
    """

    def __init__(
        self,
        source: str,
        *,
        column: str = "prompt",
        load: Mapping[str, Any] | None = None,
        options: Mapping[str, Any] | None = None,
        max_sequences: int = 8,
        errors: str | None = None,
    ) -> None:
        """`source`: as of Model.load, to be found on every node. `column`: the prompts, texts or lists of
        messages. `load`: more for Model.load; `options`: for Model.generate. `max_sequences`: prompts that
        are computed together. `errors`: a column for the failures of single prompts, which are raised without
        one.
        """
        self.column = column
        self.options = dict(options or {})
        self.max_sequences = max_sequences
        self.errors = errors
        self.engine = Model.load(source, **(load or {})).engine(max_sequences=max_sequences)

    def __call__(self, batch: Batch) -> Batch:
        """The batch with its answers."""
        if self.column not in batch:
            raise KeyError(f"no column {self.column!r}: there are {', '.join(batch)}")
        prompts = [prompt_of(value) for value in batch[self.column]]
        requests = ((prompt, self.options) for prompt in prompts)
        rows: list[tuple[str, str, int, int]] = []
        failures: list[str] = []
        for answer in in_order(self.engine, requests, self.max_sequences):
            if not isinstance(answer, Qwen2Error):
                usage = answer.usage
                rows.append((answer.text, answer.finish_reason, usage.prompt_tokens, usage.completion_tokens))
                failures.append("")
            elif self.errors is None:
                raise answer
            else:
                rows.append(("", "error", 0, 0))
                failures.append(str(answer))
        texts, reasons, read, written = zip(*rows, strict=True) if rows else ((), (), (), ())
        answered = {
            **batch,
            self.column: column_of(prompts),
            "answer": np.array(texts, dtype=object),
            "finish_reason": np.array(reasons, dtype=object),
            "prompt_tokens": np.array(read, dtype=np.int64),
            "completion_tokens": np.array(written, dtype=np.int64),
        }
        if self.errors is not None:
            answered[self.errors] = np.array(failures, dtype=object)
        return answered


def prompt_of(value: Any) -> Prompt:
    """A cell of a column of prompts. Arrow gives every message all keys that any of them has, with None for
    those it had not.
    """
    if isinstance(value, str):
        return value
    return [
        {key: given for key, given in message.items() if given is not None}
        if isinstance(message, Mapping)
        else message
        for message in value
    ]


def column_of(values: Sequence[Any]) -> npt.NDArray[Any]:
    """A column that holds lists as they are: numpy would make an array of arrays of them."""
    column = np.empty(len(values), dtype=object)
    column[:] = values
    return column


def generate(
    dataset: Dataset,
    source: str,
    *,
    actors: int | tuple[int, int] = 1,
    num_cpus: int = 1,
    num_gpus: float | None = None,
    batch_size: int = 64,
    column: str = "prompt",
    load: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    max_sequences: int = 8,
    errors: str | None = None,
) -> Dataset:
    """The dataset with the answers to a column of prompts; nothing is computed until it is read.

    `actors`: how many, or the least and the most. `num_cpus`: cores of each, and its threads unless `load`
    says otherwise; leave some to the tasks that read and write. `batch_size`: rows that an actor takes at a
    time. The rest is as of Answers.
    """
    try:
        from ray.data import ActorPoolStrategy
    except ImportError as error:
        raise _extras.missing(error, "ray", __name__, "'qwen2-rs[ray]'") from error

    least, most = (actors, actors) if isinstance(actors, int) else actors
    return dataset.map_batches(
        Answers,
        fn_constructor_args=[source],
        fn_constructor_kwargs={
            "column": column,
            "load": {"threads": num_cpus, **(load or {})},
            "options": options,
            "max_sequences": max_sequences,
            "errors": errors,
        },
        compute=ActorPoolStrategy(min_size=least, max_size=most),
        batch_size=batch_size,
        num_cpus=num_cpus,
        num_gpus=num_gpus,
    )
