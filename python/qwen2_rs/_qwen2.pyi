"""The compiled half of the Python package `qwen2_rs`."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, NoReturn, final, overload

import numpy as np
import numpy.typing as npt
from typing_extensions import Self

from qwen2_rs._types import JsonSchema, LogitsProcessor, Message, MessageDict, Prompt

__all__ = [
    "AdapterInfo",
    "CancelledError",
    "CheckpointInfo",
    "ContextOverflowError",
    "DeviceFailedError",
    "DeviceUnavailableError",
    "Engine",
    "EngineStats",
    "Generation",
    "InternalError",
    "InvalidArgumentError",
    "InvalidConstraintError",
    "InvalidFileError",
    "InvalidTemplateError",
    "IoError",
    "Logprobs",
    "Memory",
    "Model",
    "NetworkError",
    "NotFoundError",
    "OutOfMemoryError",
    "PermissionDeniedError",
    "Piece",
    "Qwen2Error",
    "RequestStream",
    "Session",
    "StopMatch",
    "Timings",
    "TokenLogprob",
    "TokenStream",
    "Tokenizer",
    "ToolCall",
    "UnsupportedError",
    "Usage",
    "__version__",
    "convert",
    "devices",
    "inspect",
    "inspect_adapter",
    "merge_lora",
    "quantize",
    "run_cli",
]

__version__: Final[str]

def devices() -> list[str]:
    """The devices that this build can compute on."""

def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    dtype: str | None = None,
    *,
    progress: bool | Callable[[int, int], object] | None = False,
) -> None:
    """Converts the checkpoint source into destination: a GGUF file if its name ends in .gguf, else a
    directory of safetensors.

    source: a directory with a checkpoint, a GGUF file, or the id of a checkpoint on a hub.
    destination: must not exist; it is there whole or not at all.
    dtype: f32, f16 or bf16; None: as stored, and blocks of a GGUF file as bf16.
    progress: as of Model.load.
    """

def inspect(
    source: str | os.PathLike[str],
    *,
    progress: bool | Callable[[int, int], object] | None = False,
) -> CheckpointInfo:
    """Tells what a checkpoint is, and checks that its tensors are those that its config calls for; the
    weights are not read. An id of a hub is downloaded first.

    source: a directory with a checkpoint, a GGUF file, or the id of a checkpoint on a hub.
    progress: as of Model.load.
    """

def inspect_adapter(path: str | os.PathLike[str]) -> AdapterInfo:
    """Tells what a LoRA adapter is.

    path: its directory, as PEFT saves it.
    """

def merge_lora(
    source: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    dtype: str | None = None,
    *,
    progress: bool | Callable[[int, int], object] | None = False,
) -> None:
    """As convert, with a LoRA adapter added to the weights.

    source: a directory with a checkpoint, a GGUF file, or the id of a checkpoint on a hub.
    adapter: a directory with an adapter, as PEFT saves it.
    destination: must not exist; it is there whole or not at all.
    dtype: f32, f16 or bf16; None: as stored, and blocks of a GGUF file as bf16.
    progress: as of Model.load.
    """

def quantize(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    precision: str = "q8",
    *,
    progress: bool | Callable[[int, int], object] | None = False,
) -> None:
    """Packs the checkpoint source into the new directory destination, which loads at once and takes
    less room; into a GGUF file if the name ends in .gguf.

    source: a directory with a checkpoint, or the id of one on a hub
        (`[modelscope:]org/name[@revision][:file]`).
    destination: must not exist; it is there whole or not at all.
    precision: q8 or q4.
    progress: as of Model.load.
    """

def run_cli(argv: Sequence[str]) -> int:
    """Runs the command `qwen2` and returns its exit code. For a process that is this command and
    nothing else: it takes Ctrl-C over.
    """

@final
class Model:
    """A loaded model; may be used from several threads at once."""

    @staticmethod
    def load(
        source: str | os.PathLike[str],
        *,
        device: str = "auto",
        dtype: str = "auto",
        quantize: str | None = None,
        kv_cache: str | None = None,
        activations: str = "f32",
        preload: bool = False,
        screened_head: bool = False,
        adapter: str | os.PathLike[str] | None = None,
        context_length: int | None = None,
        long_context: str = "yarn",
        threads: int | None = None,
        progress: bool | Callable[[int, int], object] | None = False,
    ) -> Model:
        """Loads a model.

        source: a directory with a checkpoint, or the id of one on a hub
            (`[modelscope:]org/name[@revision][:file]`).
        device: auto, cpu, wgpu, vulkan, metal, cuda, with an index for a GPU, as in cuda:1.
        dtype: auto (as stored), f32, f16 or bf16.
        quantize: q8 or q4 packs the matrices into fewer bits.
        kv_cache: f32, f16, bf16, q8 or q4, what keys and values are kept in; by default f32 for f32 weights,
            else f16.
        activations: f32, or bf16 for a faster prefill of bf16 weights that rounds them.
        preload: True copies the weights into memory of this process instead of using them from the
            file, which may then change or lie on a slow disk.
        screened_head: True ranks the tokens by a copy of the packed head in four bits, and computes only
            the best by the head itself; for greedy choice and top_k up to 64.
        adapter: a directory with a LoRA adapter of PEFT's, which is added to the weights.
        context_length: tokens that prompt and answer may have together; more than the model has
            stretches it.
        long_context: what a context beyond the trained length is reached by: yarn; yarn_when_needed, which
            leaves sequences up to the trained length as they are; or dual_chunk, attention in chunks.
        threads: on the processor; by default as many as the system allows.
        progress: True for a bar on stderr, or a function that gets the bytes done and in all; what
            it raises stops the loading.
        """

    def generate(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        typical_p: float | None = None,
        repetition_penalty: float | None = None,
        presence_penalty: float | None = None,
        frequency_penalty: float | None = None,
        logit_bias: dict[int, float] | None = None,
        bad_words: Sequence[str | Sequence[int]] | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        stop_token_ids: Sequence[int] | None = None,
        ignore_eos: bool = False,
        json_schema: JsonSchema | None = None,
        regex: str | None = None,
        grammar: str | None = None,
        choice: Sequence[str] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: Literal["auto", "none", "required"] | Mapping[str, Any] | None = None,
        tool_format: Literal["hermes", "qwen_agent"] | None = None,
        prompt_lookup: int | None = None,
        draft_tokens: int | None = None,
        timeout: float | None = None,
        on_prefill: Callable[[int, int], object] | None = None,
        min_new_tokens: int | None = None,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        processor: LogitsProcessor | None = None,
    ) -> Generation:
        """Answers a prompt: text, token ids or messages.

        An option that is not set is the checkpoint's own. They work in this order: logit_bias (added to the
        logits of tokens, -100 to 100); repetition_penalty (above 0, 1 is none, of prompt and output);
        presence_penalty and frequency_penalty (-2 to 2, of the output); bad_words (texts, or sequences of
        tokens, that are never produced); min_new_tokens (so many before an end token); processor (a function
        of tokens and logits, both arrays of numpy, that changes the logits or returns others; what it raises
        ends the generation); then, unless temperature is 0 or top_k 1: temperature (0 to 100), top_k (at
        least 1), top_p (above 0 to 1), min_p (0 to 1), typical_p (above 0 to 1).

        max_new_tokens: at least 1, by default to the end of the context. stop: strings that end the
        generation and are not part of its text. stop_token_ids: tokens that end it. ignore_eos: goes on after
        the checkpoint's own end tokens. logprobs: says of each new token how likely it was, and of as many of
        the likeliest ones, 0 to 1024; prompt_logprobs: the same for the prompt.

        prompt_lookup: proposes 1 to 64
        tokens at a time by what followed the last ones where they stood before. draft_tokens: how many
        the draft model of with_draft proposes, 1 to 64, by default 4. timeout: most seconds. on_prefill:
        a function that gets the tokens of the prompt done and in all while it is read; what it raises
        ends the generation and goes to sys.unraisablehook.

        One of json_schema (a dict, its text or a pydantic model class), regex, grammar (llguidance's
        Lark) and choice is what the text must look like. tools: what the model may ask its caller to
        run, as in OpenAI's interface, for a prompt of messages; the calls are in
        Generation.tool_calls. "strict": True in a tool's function forces its arguments to keep to its
        parameters. tool_choice: auto, none, required or one tool. tool_format: hermes where the
        checkpoint's template knows tools, else qwen_agent.
        """

    def stream(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        typical_p: float | None = None,
        repetition_penalty: float | None = None,
        presence_penalty: float | None = None,
        frequency_penalty: float | None = None,
        logit_bias: dict[int, float] | None = None,
        bad_words: Sequence[str | Sequence[int]] | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        stop_token_ids: Sequence[int] | None = None,
        ignore_eos: bool = False,
        json_schema: JsonSchema | None = None,
        regex: str | None = None,
        grammar: str | None = None,
        choice: Sequence[str] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: Literal["auto", "none", "required"] | Mapping[str, Any] | None = None,
        tool_format: Literal["hermes", "qwen_agent"] | None = None,
        prompt_lookup: int | None = None,
        draft_tokens: int | None = None,
        timeout: float | None = None,
        on_prefill: Callable[[int, int], object] | None = None,
        min_new_tokens: int | None = None,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        processor: LogitsProcessor | None = None,
    ) -> TokenStream:
        """Answers a prompt piece by piece; nothing is computed before the first piece is asked for.
        Options as in generate.
        """

    @overload
    def chat(
        self,
        messages: Sequence[Message],
        *,
        stream: Literal[False] = False,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        typical_p: float | None = None,
        repetition_penalty: float | None = None,
        presence_penalty: float | None = None,
        frequency_penalty: float | None = None,
        logit_bias: dict[int, float] | None = None,
        bad_words: Sequence[str | Sequence[int]] | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        stop_token_ids: Sequence[int] | None = None,
        ignore_eos: bool = False,
        json_schema: JsonSchema | None = None,
        regex: str | None = None,
        grammar: str | None = None,
        choice: Sequence[str] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: Literal["auto", "none", "required"] | Mapping[str, Any] | None = None,
        tool_format: Literal["hermes", "qwen_agent"] | None = None,
        prompt_lookup: int | None = None,
        draft_tokens: int | None = None,
        timeout: float | None = None,
        on_prefill: Callable[[int, int], object] | None = None,
        min_new_tokens: int | None = None,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        processor: LogitsProcessor | None = None,
    ) -> Generation:
        """Answers a conversation; with stream=True piece by piece. Options as in generate."""

    @overload
    def chat(
        self,
        messages: Sequence[Message],
        *,
        stream: Literal[True],
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        typical_p: float | None = None,
        repetition_penalty: float | None = None,
        presence_penalty: float | None = None,
        frequency_penalty: float | None = None,
        logit_bias: dict[int, float] | None = None,
        bad_words: Sequence[str | Sequence[int]] | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        stop_token_ids: Sequence[int] | None = None,
        ignore_eos: bool = False,
        json_schema: JsonSchema | None = None,
        regex: str | None = None,
        grammar: str | None = None,
        choice: Sequence[str] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: Literal["auto", "none", "required"] | Mapping[str, Any] | None = None,
        tool_format: Literal["hermes", "qwen_agent"] | None = None,
        prompt_lookup: int | None = None,
        draft_tokens: int | None = None,
        timeout: float | None = None,
        on_prefill: Callable[[int, int], object] | None = None,
        min_new_tokens: int | None = None,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        processor: LogitsProcessor | None = None,
    ) -> TokenStream: ...
    @overload
    def chat(
        self,
        messages: Sequence[Message],
        *,
        stream: bool,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        typical_p: float | None = None,
        repetition_penalty: float | None = None,
        presence_penalty: float | None = None,
        frequency_penalty: float | None = None,
        logit_bias: dict[int, float] | None = None,
        bad_words: Sequence[str | Sequence[int]] | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        stop_token_ids: Sequence[int] | None = None,
        ignore_eos: bool = False,
        json_schema: JsonSchema | None = None,
        regex: str | None = None,
        grammar: str | None = None,
        choice: Sequence[str] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: Literal["auto", "none", "required"] | Mapping[str, Any] | None = None,
        tool_format: Literal["hermes", "qwen_agent"] | None = None,
        prompt_lookup: int | None = None,
        draft_tokens: int | None = None,
        timeout: float | None = None,
        on_prefill: Callable[[int, int], object] | None = None,
        min_new_tokens: int | None = None,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        processor: LogitsProcessor | None = None,
    ) -> Generation | TokenStream: ...
    @overload
    def generate_batch(
        self,
        prompts: Sequence[Prompt],
        *,
        return_exceptions: Literal[False] = False,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        typical_p: float | None = None,
        repetition_penalty: float | None = None,
        presence_penalty: float | None = None,
        frequency_penalty: float | None = None,
        logit_bias: dict[int, float] | None = None,
        bad_words: Sequence[str | Sequence[int]] | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        stop_token_ids: Sequence[int] | None = None,
        ignore_eos: bool = False,
        json_schema: JsonSchema | None = None,
        regex: str | None = None,
        grammar: str | None = None,
        choice: Sequence[str] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: Literal["auto", "none", "required"] | Mapping[str, Any] | None = None,
        tool_format: Literal["hermes", "qwen_agent"] | None = None,
        prompt_lookup: int | None = None,
        draft_tokens: int | None = None,
        timeout: float | None = None,
        on_prefill: Callable[[int, int], object] | None = None,
        min_new_tokens: int | None = None,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        processor: LogitsProcessor | None = None,
    ) -> list[Generation]:
        """Answers several prompts, in order. The first failure is raised once all have run; with
        return_exceptions=True failures stand in the list instead. Options as in generate.
        """

    @overload
    def generate_batch(
        self,
        prompts: Sequence[Prompt],
        *,
        return_exceptions: bool,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        typical_p: float | None = None,
        repetition_penalty: float | None = None,
        presence_penalty: float | None = None,
        frequency_penalty: float | None = None,
        logit_bias: dict[int, float] | None = None,
        bad_words: Sequence[str | Sequence[int]] | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        stop_token_ids: Sequence[int] | None = None,
        ignore_eos: bool = False,
        json_schema: JsonSchema | None = None,
        regex: str | None = None,
        grammar: str | None = None,
        choice: Sequence[str] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: Literal["auto", "none", "required"] | Mapping[str, Any] | None = None,
        tool_format: Literal["hermes", "qwen_agent"] | None = None,
        prompt_lookup: int | None = None,
        draft_tokens: int | None = None,
        timeout: float | None = None,
        on_prefill: Callable[[int, int], object] | None = None,
        min_new_tokens: int | None = None,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        processor: LogitsProcessor | None = None,
    ) -> list[Generation | Qwen2Error]: ...
    def session(self) -> Session:
        """A conversation that keeps its cache between turns."""

    def open_session(self, path: str | os.PathLike[str]) -> Session:
        """A session that Session.save wrote, with its cache: nothing of it is read again. A file that is
        damaged, or of another model or of other settings, raises InvalidFileError.
        """

    def with_draft(self, draft: Model) -> Model:
        """This model with draft, a smaller one of the same vocabulary, which proposes tokens; several are
        checked in one step, and the tokens stay those of this model alone. Both share their weights
        with the new one.
        """

    def with_adapter(self, path: str | os.PathLike[str]) -> Model:
        """This model with a LoRA adapter of PEFT's beside its weights, which both share: what the adapter
        adds is computed next to them. On top of an adapter a second one adds up with it.

        path: the adapter's directory.
        """

    def engine(
        self,
        *,
        max_sequences: int | None = None,
        cache_bytes: int | None = None,
        prefill_chunk: int | None = None,
        queue_limit: int | None = None,
        when_full: Literal["refuse", "wait"] = "refuse",
        reader_patience: float | None = None,
        prefix_cache: bool = True,
        deterministic: bool = False,
    ) -> Engine:
        """An engine for many requests on this model.

        max_sequences: those that are computed together; by default 64.
        cache_bytes: what the caches of all sequences and the shared prefixes may take together; by default
            those of four sequences that fill the context.
        prefill_chunk: tokens of prompts that one step reads between the tokens of the others; by default 64.
        queue_limit: requests that may wait; by default 1024.
        when_full: what becomes of a request when so many wait: refuse, which raises OutOfMemoryError, or
            wait.
        reader_patience: seconds that the reader of an answer may leave 256 pieces unread before the request
            ends as cancelled; by default 60.
        prefix_cache: whether the beginning that a prompt shares with earlier ones is computed once.
        deterministic: whether a request gets the same tokens alone and among others, to the last bit of its
            logits; sequences are then computed one by one.
        """

    def logits(self, tokens: Sequence[int] | npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.float32]:
        """The logits of every token of a sequence: float32, [n_tokens, vocab_size]."""

    def score(self, tokens: Sequence[int] | npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.float32]:
        """Natural log-probability of each token given those before it; the first has none, so the
        result is one shorter than tokens.
        """

    def warmup(self) -> None:
        """Readies the device for the first request: reads every weight once, or of a layer's experts those
        that a few tokens visit, and has a GPU's driver compile the kernels for prompts of all lengths.
        """

    def embed(self, prompt: Prompt, *, pooling: str = "mean") -> npt.NDArray[np.float32]:
        """The embedding of a prompt: float32, [hidden_size], with squares that sum to 1. It is made of the
        hidden states behind the final norm: their mean, or with pooling="last_token" the last token's.
        """

    def perplexity(
        self,
        tokens: Sequence[int] | npt.NDArray[np.integer[Any]],
        *,
        window: int = 2048,
        stride: int = 512,
    ) -> float:
        """The perplexity of tokens: windows of `window` tokens begin every `stride` tokens, and each token
        counts once, foretold from what its first window has before it.
        """

    def close(self) -> None:
        """Lets go of the weights; later use raises ValueError. They are freed when what still uses
        them ends: running generations, open streams and sessions.
        """

    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> None: ...
    @property
    def tokenizer(self) -> Tokenizer:
        """Text to tokens and back."""

    @property
    def config(self) -> dict[str, Any]:
        """The architecture, as config.json gives it; a copy."""

    @property
    def generation_config(self) -> dict[str, Any]:
        """The checkpoint's own settings for generation; a copy."""

    @property
    def name(self) -> str:
        """The directory's or repository's name."""

    @property
    def adapters(self) -> list[Path]:
        """The directories of the adapters beside its weights, in the order they were added."""

    @property
    def device(self) -> str:
        """Where it computes."""

    @property
    def dtype(self) -> str:
        """The precision that most of its matrices have or had before they were packed."""

    @property
    def context_length(self) -> int:
        """Tokens that prompt and answer may have together."""

    @property
    def threads(self) -> int:
        """Threads that compute on the processor."""

    @property
    def memory(self) -> Memory:
        """Bytes that it takes."""

    def __reduce__(self) -> NoReturn: ...

@final
class Session:
    """One conversation: what was said so far, and the cache of it. While a stream of it runs, it is
    the stream's.
    """

    def append(self, prompt: Prompt) -> None:
        """Adds to the conversation; the model reads it at the next generation. Messages go through
        the chat template together with those before them; text and tokens go behind what is there.
        """

    def generate(
        self,
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        typical_p: float | None = None,
        repetition_penalty: float | None = None,
        presence_penalty: float | None = None,
        frequency_penalty: float | None = None,
        logit_bias: dict[int, float] | None = None,
        bad_words: Sequence[str | Sequence[int]] | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        stop_token_ids: Sequence[int] | None = None,
        ignore_eos: bool = False,
        json_schema: JsonSchema | None = None,
        regex: str | None = None,
        grammar: str | None = None,
        choice: Sequence[str] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: Literal["auto", "none", "required"] | Mapping[str, Any] | None = None,
        tool_format: Literal["hermes", "qwen_agent"] | None = None,
        prompt_lookup: int | None = None,
        draft_tokens: int | None = None,
        timeout: float | None = None,
        on_prefill: Callable[[int, int], object] | None = None,
        min_new_tokens: int | None = None,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        processor: LogitsProcessor | None = None,
    ) -> Generation:
        """Answers what was appended; the answer becomes part of the conversation."""

    def stream(
        self,
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        typical_p: float | None = None,
        repetition_penalty: float | None = None,
        presence_penalty: float | None = None,
        frequency_penalty: float | None = None,
        logit_bias: dict[int, float] | None = None,
        bad_words: Sequence[str | Sequence[int]] | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        stop_token_ids: Sequence[int] | None = None,
        ignore_eos: bool = False,
        json_schema: JsonSchema | None = None,
        regex: str | None = None,
        grammar: str | None = None,
        choice: Sequence[str] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: Literal["auto", "none", "required"] | Mapping[str, Any] | None = None,
        tool_format: Literal["hermes", "qwen_agent"] | None = None,
        prompt_lookup: int | None = None,
        draft_tokens: int | None = None,
        timeout: float | None = None,
        on_prefill: Callable[[int, int], object] | None = None,
        min_new_tokens: int | None = None,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        processor: LogitsProcessor | None = None,
    ) -> TokenStream:
        """As generate, piece by piece. What was generated when the stream ends or is closed becomes
        part of the conversation.
        """

    def fork(self) -> Session:
        """A second conversation with the same past; both go on independently."""

    def truncate(self, n_tokens: int) -> None:
        """Forgets all but the first n_tokens tokens; messages can no longer be appended then, unless
        everything was forgotten.
        """

    def rollback(self, n_messages: int) -> None:
        """Takes back the last n_messages messages, answers of the model included; after one of them the
        model may answer anew.
        """

    def shift(self, keep_first: int, n_tokens: int) -> None:
        """Makes room in a session of text: forgets n_tokens tokens behind the first keep_first. What
        stands behind them is read again at the next generation. Nothing is ever forgotten unless it is
        asked for.
        """

    def shift_messages(self, keep_first: int, n_messages: int) -> None:
        """Makes room in a conversation: forgets n_messages messages behind the first keep_first, such as
        1 for a system prompt.
        """

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the conversation and its cache to a file, which replaces one of this name; the file is
        complete or not there. Model.open_session reads it.
        """

    @property
    def tokens(self) -> list[int]:
        """Everything said so far, as tokens."""

    @property
    def messages(self) -> list[MessageDict]:
        """Everything said so far, as messages; empty in a session of text."""

    @property
    def memory(self) -> int:
        """Bytes of its cache."""

    def __reduce__(self) -> NoReturn: ...

@final
class TokenStream:
    """The pieces of a generation, as they come: an iterator and an asynchronous one."""

    def cancel(self) -> None:
        """Stops the generation, from any thread: it ends after the token it is working on."""

    def finish(self) -> Generation:
        """Runs to the end and returns the whole result; as often as wanted."""

    def close(self) -> None:
        """Ends the generation where it is; finish() then gives what there is."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> None: ...
    def __iter__(self) -> Self: ...
    def __next__(self) -> Piece: ...
    def __aiter__(self) -> Self: ...
    async def __anext__(self) -> Piece: ...
    def __reduce__(self) -> NoReturn: ...

@final
class Engine:
    """Many requests on one model: they join and leave at every step, and each weight is read once for all of
    them. May be used from several threads and event loops at once.
    """

    def submit(
        self,
        prompt: Prompt,
        *,
        priority: int | None = 0,
        model: Model | None = None,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        typical_p: float | None = None,
        repetition_penalty: float | None = None,
        presence_penalty: float | None = None,
        frequency_penalty: float | None = None,
        logit_bias: dict[int, float] | None = None,
        bad_words: Sequence[str | Sequence[int]] | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        stop_token_ids: Sequence[int] | None = None,
        ignore_eos: bool = False,
        json_schema: JsonSchema | None = None,
        regex: str | None = None,
        grammar: str | None = None,
        choice: Sequence[str] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: Literal["auto", "none", "required"] | Mapping[str, Any] | None = None,
        tool_format: Literal["hermes", "qwen_agent"] | None = None,
        prompt_lookup: int | None = None,
        draft_tokens: int | None = None,
        timeout: float | None = None,
        on_prefill: Callable[[int, int], object] | None = None,
        min_new_tokens: int | None = None,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        processor: LogitsProcessor | None = None,
    ) -> RequestStream:
        """Puts a prompt into the queue; the answer comes as it is read. A full queue raises OutOfMemoryError,
        or is waited for, as the engine was built.

        priority: -128 to 127; a step of it goes before the 32 requests that came before. model: the engine's
        own with an adapter, by Model.with_adapter. Other options as in Model.generate, but for prompt_lookup,
        draft_tokens and on_prefill; a processor runs on the engine's thread.
        """

    async def submit_async(
        self,
        prompt: Prompt,
        *,
        priority: int | None = 0,
        model: Model | None = None,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        typical_p: float | None = None,
        repetition_penalty: float | None = None,
        presence_penalty: float | None = None,
        frequency_penalty: float | None = None,
        logit_bias: dict[int, float] | None = None,
        bad_words: Sequence[str | Sequence[int]] | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        stop_token_ids: Sequence[int] | None = None,
        ignore_eos: bool = False,
        json_schema: JsonSchema | None = None,
        regex: str | None = None,
        grammar: str | None = None,
        choice: Sequence[str] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: Literal["auto", "none", "required"] | Mapping[str, Any] | None = None,
        tool_format: Literal["hermes", "qwen_agent"] | None = None,
        prompt_lookup: int | None = None,
        draft_tokens: int | None = None,
        timeout: float | None = None,
        on_prefill: Callable[[int, int], object] | None = None,
        min_new_tokens: int | None = None,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        processor: LogitsProcessor | None = None,
    ) -> RequestStream:
        """As submit, in an event loop: a full queue is waited for without blocking it."""

    def generate(
        self,
        prompt: Prompt,
        *,
        priority: int | None = 0,
        model: Model | None = None,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        typical_p: float | None = None,
        repetition_penalty: float | None = None,
        presence_penalty: float | None = None,
        frequency_penalty: float | None = None,
        logit_bias: dict[int, float] | None = None,
        bad_words: Sequence[str | Sequence[int]] | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        stop_token_ids: Sequence[int] | None = None,
        ignore_eos: bool = False,
        json_schema: JsonSchema | None = None,
        regex: str | None = None,
        grammar: str | None = None,
        choice: Sequence[str] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: Literal["auto", "none", "required"] | Mapping[str, Any] | None = None,
        tool_format: Literal["hermes", "qwen_agent"] | None = None,
        prompt_lookup: int | None = None,
        draft_tokens: int | None = None,
        timeout: float | None = None,
        on_prefill: Callable[[int, int], object] | None = None,
        min_new_tokens: int | None = None,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        processor: LogitsProcessor | None = None,
    ) -> Generation:
        """Answers a prompt, among the others. Options as in submit."""

    async def generate_async(
        self,
        prompt: Prompt,
        *,
        priority: int | None = 0,
        model: Model | None = None,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        typical_p: float | None = None,
        repetition_penalty: float | None = None,
        presence_penalty: float | None = None,
        frequency_penalty: float | None = None,
        logit_bias: dict[int, float] | None = None,
        bad_words: Sequence[str | Sequence[int]] | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        stop_token_ids: Sequence[int] | None = None,
        ignore_eos: bool = False,
        json_schema: JsonSchema | None = None,
        regex: str | None = None,
        grammar: str | None = None,
        choice: Sequence[str] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: Literal["auto", "none", "required"] | Mapping[str, Any] | None = None,
        tool_format: Literal["hermes", "qwen_agent"] | None = None,
        prompt_lookup: int | None = None,
        draft_tokens: int | None = None,
        timeout: float | None = None,
        on_prefill: Callable[[int, int], object] | None = None,
        min_new_tokens: int | None = None,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        processor: LogitsProcessor | None = None,
    ) -> Generation:
        """As generate, in an event loop. A task that is cancelled while it waits cancels the request."""

    @overload
    def chat(
        self,
        messages: Sequence[Message],
        *,
        stream: Literal[False] = False,
        priority: int | None = 0,
        model: Model | None = None,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        typical_p: float | None = None,
        repetition_penalty: float | None = None,
        presence_penalty: float | None = None,
        frequency_penalty: float | None = None,
        logit_bias: dict[int, float] | None = None,
        bad_words: Sequence[str | Sequence[int]] | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        stop_token_ids: Sequence[int] | None = None,
        ignore_eos: bool = False,
        json_schema: JsonSchema | None = None,
        regex: str | None = None,
        grammar: str | None = None,
        choice: Sequence[str] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: Literal["auto", "none", "required"] | Mapping[str, Any] | None = None,
        tool_format: Literal["hermes", "qwen_agent"] | None = None,
        prompt_lookup: int | None = None,
        draft_tokens: int | None = None,
        timeout: float | None = None,
        on_prefill: Callable[[int, int], object] | None = None,
        min_new_tokens: int | None = None,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        processor: LogitsProcessor | None = None,
    ) -> Generation:
        """Answers a conversation; with stream=True piece by piece. Options as in submit."""

    @overload
    def chat(
        self,
        messages: Sequence[Message],
        *,
        stream: Literal[True],
        priority: int | None = 0,
        model: Model | None = None,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        typical_p: float | None = None,
        repetition_penalty: float | None = None,
        presence_penalty: float | None = None,
        frequency_penalty: float | None = None,
        logit_bias: dict[int, float] | None = None,
        bad_words: Sequence[str | Sequence[int]] | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        stop_token_ids: Sequence[int] | None = None,
        ignore_eos: bool = False,
        json_schema: JsonSchema | None = None,
        regex: str | None = None,
        grammar: str | None = None,
        choice: Sequence[str] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: Literal["auto", "none", "required"] | Mapping[str, Any] | None = None,
        tool_format: Literal["hermes", "qwen_agent"] | None = None,
        prompt_lookup: int | None = None,
        draft_tokens: int | None = None,
        timeout: float | None = None,
        on_prefill: Callable[[int, int], object] | None = None,
        min_new_tokens: int | None = None,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        processor: LogitsProcessor | None = None,
    ) -> RequestStream: ...
    @overload
    def chat(
        self,
        messages: Sequence[Message],
        *,
        stream: bool,
        priority: int | None = 0,
        model: Model | None = None,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        typical_p: float | None = None,
        repetition_penalty: float | None = None,
        presence_penalty: float | None = None,
        frequency_penalty: float | None = None,
        logit_bias: dict[int, float] | None = None,
        bad_words: Sequence[str | Sequence[int]] | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        stop_token_ids: Sequence[int] | None = None,
        ignore_eos: bool = False,
        json_schema: JsonSchema | None = None,
        regex: str | None = None,
        grammar: str | None = None,
        choice: Sequence[str] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: Literal["auto", "none", "required"] | Mapping[str, Any] | None = None,
        tool_format: Literal["hermes", "qwen_agent"] | None = None,
        prompt_lookup: int | None = None,
        draft_tokens: int | None = None,
        timeout: float | None = None,
        on_prefill: Callable[[int, int], object] | None = None,
        min_new_tokens: int | None = None,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        processor: LogitsProcessor | None = None,
    ) -> Generation | RequestStream: ...
    @overload
    async def chat_async(
        self,
        messages: Sequence[Message],
        *,
        stream: Literal[False] = False,
        priority: int | None = 0,
        model: Model | None = None,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        typical_p: float | None = None,
        repetition_penalty: float | None = None,
        presence_penalty: float | None = None,
        frequency_penalty: float | None = None,
        logit_bias: dict[int, float] | None = None,
        bad_words: Sequence[str | Sequence[int]] | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        stop_token_ids: Sequence[int] | None = None,
        ignore_eos: bool = False,
        json_schema: JsonSchema | None = None,
        regex: str | None = None,
        grammar: str | None = None,
        choice: Sequence[str] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: Literal["auto", "none", "required"] | Mapping[str, Any] | None = None,
        tool_format: Literal["hermes", "qwen_agent"] | None = None,
        prompt_lookup: int | None = None,
        draft_tokens: int | None = None,
        timeout: float | None = None,
        on_prefill: Callable[[int, int], object] | None = None,
        min_new_tokens: int | None = None,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        processor: LogitsProcessor | None = None,
    ) -> Generation:
        """As chat, in an event loop."""

    @overload
    async def chat_async(
        self,
        messages: Sequence[Message],
        *,
        stream: Literal[True],
        priority: int | None = 0,
        model: Model | None = None,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        typical_p: float | None = None,
        repetition_penalty: float | None = None,
        presence_penalty: float | None = None,
        frequency_penalty: float | None = None,
        logit_bias: dict[int, float] | None = None,
        bad_words: Sequence[str | Sequence[int]] | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        stop_token_ids: Sequence[int] | None = None,
        ignore_eos: bool = False,
        json_schema: JsonSchema | None = None,
        regex: str | None = None,
        grammar: str | None = None,
        choice: Sequence[str] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: Literal["auto", "none", "required"] | Mapping[str, Any] | None = None,
        tool_format: Literal["hermes", "qwen_agent"] | None = None,
        prompt_lookup: int | None = None,
        draft_tokens: int | None = None,
        timeout: float | None = None,
        on_prefill: Callable[[int, int], object] | None = None,
        min_new_tokens: int | None = None,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        processor: LogitsProcessor | None = None,
    ) -> RequestStream: ...
    @overload
    async def chat_async(
        self,
        messages: Sequence[Message],
        *,
        stream: bool,
        priority: int | None = 0,
        model: Model | None = None,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        typical_p: float | None = None,
        repetition_penalty: float | None = None,
        presence_penalty: float | None = None,
        frequency_penalty: float | None = None,
        logit_bias: dict[int, float] | None = None,
        bad_words: Sequence[str | Sequence[int]] | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        stop_token_ids: Sequence[int] | None = None,
        ignore_eos: bool = False,
        json_schema: JsonSchema | None = None,
        regex: str | None = None,
        grammar: str | None = None,
        choice: Sequence[str] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: Literal["auto", "none", "required"] | Mapping[str, Any] | None = None,
        tool_format: Literal["hermes", "qwen_agent"] | None = None,
        prompt_lookup: int | None = None,
        draft_tokens: int | None = None,
        timeout: float | None = None,
        on_prefill: Callable[[int, int], object] | None = None,
        min_new_tokens: int | None = None,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        processor: LogitsProcessor | None = None,
    ) -> Generation | RequestStream: ...
    @property
    def stats(self) -> EngineStats:
        """What it is doing."""

    def close(self) -> None:
        """Ends what runs, with a CancelledError, and the engine's thread; later use raises ValueError."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> None: ...
    def __reduce__(self) -> NoReturn: ...

@final
class RequestStream:
    """The pieces of an answer that an engine computes, as they come: an iterator and an asynchronous one.

    Letting go of it cancels the request. Who leaves 256 pieces unread pauses this request, never the others;
    after a minute of that it ends as cancelled.
    """

    def cancel(self) -> None:
        """Stops the request, from any thread: it ends after the token it is working on."""

    def finish(self) -> Generation:
        """Waits for the end and returns the whole result; as often as wanted."""

    async def finish_async(self) -> Generation:
        """As finish, in an event loop."""

    def close(self) -> None:
        """Cancels the request without waiting; there are no more pieces, and finish() gives what there is."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> None: ...
    def __iter__(self) -> Self: ...
    def __next__(self) -> Piece: ...
    def __aiter__(self) -> Self: ...
    async def __anext__(self) -> Piece: ...
    def __reduce__(self) -> NoReturn: ...

@final
class Tokenizer:
    """The tokenizer of a checkpoint."""

    @staticmethod
    def load(directory: str | os.PathLike[str]) -> Tokenizer:
        """Reads the tokenizer of a checkpoint's directory, without the weights."""

    def encode(self, text: str) -> list[int]:
        """The tokens of text, all of it ordinary: `<|im_end|>` is ten characters."""

    def encode_with_special_tokens(self, text: str) -> list[int]:
        """The tokens of text with special tokens recognised, as transformers' tokenizer(text). Never
        for untrusted text: whoever writes `<|im_end|>` ends the turn.
        """

    def count(self, text: str) -> int:
        """The number of tokens that encode makes of text."""

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of tokens; bytes that are not UTF-8 become U+FFFD. skip_special_tokens leaves out
        tokens like `<|im_end|>`.
        """

    def apply_chat_template(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        """The text that the chat template makes of messages: for showing. To feed a model, use
        encode_chat, which keeps control tokens in messages from being obeyed.
        """

    def encode_chat(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> list[int]:
        """The tokens of a conversation: what the template prints becomes control tokens, what the
        messages hold never does.
        """

    def token_to_id(self, token: str) -> int | None:
        """The id of a token by its name in the vocabulary, for example `<|im_end|>`."""

    def id_to_token(self, id: int) -> str | None:
        """The name of a token in the vocabulary, with `Ġ` for a space."""

    def is_special(self, id: int) -> bool:
        """Whether the token is a control token."""

    @property
    def vocab_size(self) -> int:
        """The highest id plus one."""

    @property
    def eos_token_id(self) -> int | None:
        """The token that ends a turn."""

    @property
    def pad_token_id(self) -> int | None:
        """The token that fills a batch."""

    @property
    def chat_template(self) -> str | None:
        """The Jinja source of the chat template; base models may have none."""

    def __reduce__(self) -> NoReturn: ...

@final
class Piece:
    """One token and the text that became whole with it; print(piece, end="") prints the text."""

    @property
    def text(self) -> str:
        """Whole characters; empty while one is incomplete or a stop string may be under way."""

    @property
    def token(self) -> int:
        """The token's id."""

    @property
    def logprobs(self) -> Logprobs | None:
        """How likely it was, if logprobs asked for it."""

    @property
    def tool_calls(self) -> list[ToolCall]:
        """Calls of tools that became whole with it; their text is not in the text."""

@final
class Logprobs:
    """How likely the token at one position was, and which ones were the likeliest there: natural logarithms
    of the softmax of the model's own logits, before all options.
    """

    @property
    def token(self) -> int:
        """The token that is there."""

    @property
    def logprob(self) -> float:
        """Its log-probability."""

    @property
    def top(self) -> list[TokenLogprob]:
        """The likeliest tokens, the likeliest first."""

@final
class TokenLogprob:
    """A token and its log-probability."""

    @property
    def token(self) -> int:
        """The token's id."""

    @property
    def logprob(self) -> float:
        """Natural logarithm of its probability."""

@final
class ToolCall:
    """A call that the model asks for."""

    @property
    def name(self) -> str:
        """The name that the model wrote, which need not be one of the tools."""

    @property
    def arguments(self) -> str:
        """The text of a JSON object. It keeps to the tool's schema only where the tool is strict."""

    def to_dict(self) -> dict[str, Any]:
        """The dict of OpenAI's interface, for the tool_calls of a message."""

@final
class Generation:
    """A finished generation; str(generation) is its text."""

    @property
    def text(self) -> str:
        """The text, without the stop string and without special tokens."""

    @property
    def tokens(self) -> list[int]:
        """The new tokens, an end token included."""

    @property
    def tool_calls(self) -> list[ToolCall]:
        """Calls of tools that the model asks for, in its order."""

    @property
    def finish_reason(self) -> Literal["stop", "length", "tool_calls", "cancelled", "timeout"]:
        """Why it ended."""

    @property
    def stop_match(self) -> StopMatch | None:
        """What it ended at, if finish_reason is stop."""

    @property
    def usage(self) -> Usage:
        """Token counts."""

    @property
    def timings(self) -> Timings:
        """How long it took."""

    @property
    def seed(self) -> int | None:
        """The seed that the sampler used; None for greedy decoding."""

    @property
    def logprobs(self) -> list[Logprobs]:
        """How likely each new token was, if logprobs asked for it; else empty."""

    @property
    def prompt_logprobs(self) -> list[Logprobs]:
        """How likely each token of the prompt but the first was, if prompt_logprobs asked for it; else
        empty.
        """

@final
class StopMatch:
    """What ended a generation."""

    @property
    def kind(self) -> Literal["eos", "token", "text", "constraint"]:
        """eos: an end token of the checkpoint; token: one of stop_token_ids; text: one of stop;
        constraint: it allows nothing more.
        """

    @property
    def token(self) -> int | None:
        """The token, for eos and token."""

    @property
    def text(self) -> str | None:
        """The string, for text."""

@final
class Usage:
    """Token counts of one generation."""

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt, cached ones included."""

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that were in the cache already."""

    @property
    def completion_tokens(self) -> int:
        """New tokens."""

    @property
    def draft_tokens(self) -> int:
        """Tokens that were proposed by the draft model or by prompt lookup."""

    @property
    def accepted_tokens(self) -> int:
        """Those of them that the model chose, too; over draft_tokens this is the acceptance rate."""

@final
class Timings:
    """Wall-clock times of one generation."""

    @property
    def prefill_s(self) -> float:
        """Seconds that reading the prompt took, the first new token included."""

    @property
    def decode_s(self) -> float:
        """Seconds that all new tokens but the first took."""

    @property
    def prefill_tokens_per_s(self) -> float:
        """Prompt tokens (without cached ones) per second; 0 if nothing was read."""

    @property
    def decode_tokens_per_s(self) -> float:
        """New tokens per second after the first; 0 if there were none."""

@final
class Memory:
    """Bytes that a model takes."""

    @property
    def weights(self) -> int:
        """Weights, once for all sessions."""

    @property
    def weights_per_token(self) -> int:
        """What a decode step reads of them: all but the embedding table, where that is not the head too."""

    @property
    def cache_per_token(self) -> int:
        """Keys and values of one token of one session."""

    @property
    def cache_full(self) -> int:
        """Keys and values of one session that fills the context."""

@final
class EngineStats:
    """What an engine does; counted since its start where nothing else is said."""

    @property
    def waiting(self) -> int:
        """Requests that wait to be started, now."""

    @property
    def running(self) -> int:
        """Requests that are computed, now."""

    @property
    def submitted(self) -> int:
        """Requests that were submitted."""

    @property
    def finished(self) -> int:
        """Requests that ended, cancelled and failed ones included."""

    @property
    def failed(self) -> int:
        """Requests that ended with an error."""

    @property
    def preempted(self) -> int:
        """Requests whose cache was dropped for lack of memory, to be computed again."""

    @property
    def steps(self) -> int:
        """Steps of the network."""

    @property
    def prompt_tokens(self) -> int:
        """Tokens of prompts that were computed."""

    @property
    def cached_tokens(self) -> int:
        """Tokens of prompts that were shared with earlier requests."""

    @property
    def completion_tokens(self) -> int:
        """Tokens that were generated."""

    @property
    def cache_bytes(self) -> int:
        """Bytes of caches and shared prefixes, now."""

    @property
    def cache_limit(self) -> int:
        """Bytes that they may take."""

@final
class CheckpointInfo:
    """What inspect finds."""

    @property
    def config(self) -> dict[str, Any]:
        """The architecture, as config.json or the metadata of a GGUF file give it."""

    @property
    def generation_config(self) -> dict[str, Any]:
        """The checkpoint's own settings for generation."""

    @property
    def container(self) -> Literal["safetensors", "gguf"]:
        """What its tensors are in."""

    @property
    def stored_bytes(self) -> int:
        """Bytes of all tensors as they are stored."""

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights in memory if they are loaded with no other wish."""

    @property
    def formats(self) -> dict[str, int]:
        """Bytes by how they are stored: bf16, Q4_K, …."""

    @property
    def dtype(self) -> str | None:
        """The precision that most bytes are in which are numbers."""

    @property
    def parameters(self) -> int:
        """Numbers in all weights."""

    @property
    def context_length(self) -> int:
        """Tokens that prompt and answer may have together."""

@final
class AdapterInfo:
    """What inspect_adapter finds."""

    @property
    def base_model(self) -> str | None:
        """The model that it was made for, as PEFT names it."""

    @property
    def modules(self) -> list[str]:
        """The projections that it changes: q_proj, v_proj, …."""

    @property
    def matrices(self) -> int:
        """Matrices that it changes."""

    @property
    def ranks(self) -> list[int]:
        """The ranks of its matrices."""

    @property
    def scales(self) -> tuple[float, float]:
        """The smallest and the largest factor of its products."""

    @property
    def parameters(self) -> int:
        """Numbers in all its matrices."""

    @property
    def memory(self) -> int:
        """Bytes in memory beside the weights."""

class Qwen2Error(Exception):
    """The base of everything that this package raises on its own account.

    The message is one line: what, where, why.
    """

    kind: str
    """The class of the error, as in Rust and C: invalid_argument, not_found, …"""
    path: str | None
    """The file or directory concerned."""
    key: str | None
    """The tensor, config key or option concerned."""
    help: str | None
    """The way out, a sentence for a person; also a note of the exception from Python 3.11 on."""

class InvalidArgumentError(Qwen2Error, ValueError):
    """An argument is out of its range or contradicts another one."""

class NotFoundError(Qwen2Error, FileNotFoundError):
    """A file, directory or model id does not exist."""

class PermissionDeniedError(Qwen2Error, PermissionError):
    """The operating system refuses access."""

class IoError(Qwen2Error, OSError):
    """Reading or writing failed."""

class InvalidFileError(Qwen2Error, ValueError):
    """A file is there but does not hold what it must."""

class UnsupportedError(Qwen2Error, NotImplementedError):
    """Well-formed, but something this build or this library does not do."""

class ContextOverflowError(Qwen2Error, ValueError):
    """Prompt and new tokens do not fit the context."""

class OutOfMemoryError(Qwen2Error, MemoryError):
    """Memory of the host or of the device is exhausted."""

class DeviceUnavailableError(Qwen2Error, RuntimeError):
    """The device was not compiled in or is not there."""

class DeviceFailedError(Qwen2Error, RuntimeError):
    """The device failed while it worked."""

class NetworkError(Qwen2Error, ConnectionError):
    """A model could not be fetched."""

class InvalidTemplateError(Qwen2Error, ValueError):
    """The chat template cannot be parsed or rendered."""

class InvalidConstraintError(Qwen2Error, ValueError):
    """A schema or grammar cannot be compiled."""

class CancelledError(Qwen2Error, RuntimeError):
    """The caller stopped it: a callback the loading or the generation, the end of an engine its requests."""

class InternalError(Qwen2Error, RuntimeError):
    """A bug of this library."""
