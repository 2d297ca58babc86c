"""The Qwen2 language models inside your own program, on CPU and GPU.

>>> from qwen2_rs import Model
>>> model = Model.load("examples/demo-model")
>>> model.chat([{"role": "user", "content": "What is 12 plus 30?"}]).text
'12 + 30 = 42.'
"""

from qwen2_rs._qwen2 import (
    CancelledError,
    ContextOverflowError,
    DeviceFailedError,
    DeviceUnavailableError,
    Generation,
    InternalError,
    InvalidArgumentError,
    InvalidConstraintError,
    InvalidFileError,
    InvalidTemplateError,
    IoError,
    Memory,
    Model,
    NetworkError,
    NotFoundError,
    OutOfMemoryError,
    PermissionDeniedError,
    Piece,
    Qwen2Error,
    Session,
    StopMatch,
    Timings,
    Tokenizer,
    TokenStream,
    UnsupportedError,
    Usage,
    __version__,
    devices,
)
from qwen2_rs._types import Message, MessageDict, Prompt

__all__ = [
    "CancelledError",
    "ContextOverflowError",
    "DeviceFailedError",
    "DeviceUnavailableError",
    "Generation",
    "InternalError",
    "InvalidArgumentError",
    "InvalidConstraintError",
    "InvalidFileError",
    "InvalidTemplateError",
    "IoError",
    "Memory",
    "Message",
    "MessageDict",
    "Model",
    "NetworkError",
    "NotFoundError",
    "OutOfMemoryError",
    "PermissionDeniedError",
    "Piece",
    "Prompt",
    "Qwen2Error",
    "Session",
    "StopMatch",
    "Timings",
    "TokenStream",
    "Tokenizer",
    "UnsupportedError",
    "Usage",
    "__version__",
    "devices",
]
