"""Errors: one class for each kind, the same text as in Rust and C."""

from __future__ import annotations

import base64
import builtins
import json
import os
import pickle
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import qwen2_rs
from conftest import DEMO, fixture_directory, vectors
from qwen2_rs import Model, NotFoundError, Qwen2Error, Tokenizer

CASES = vectors("errors.json")["cases"]

BUILTIN = {
    "InvalidArgumentError": ValueError,
    "NotFoundError": FileNotFoundError,
    "PermissionDeniedError": PermissionError,
    "IoError": OSError,
    "InvalidFileError": ValueError,
    "UnsupportedError": NotImplementedError,
    "ContextOverflowError": ValueError,
    "OutOfMemoryError": MemoryError,
    "DeviceUnavailableError": RuntimeError,
    "DeviceFailedError": RuntimeError,
    "NetworkError": ConnectionError,
    "InvalidTemplateError": ValueError,
    "InvalidConstraintError": ValueError,
    "CancelledError": RuntimeError,
    "InternalError": RuntimeError,
}


def apply(directory: Path, change: dict[str, Any]) -> None:
    path = directory / change["file"]
    operation = change["op"]
    if operation == "remove":
        path.unlink()
    elif operation == "truncate":
        os.truncate(path, change["length"])
    elif operation in {"set_json", "remove_json"}:
        value = json.loads(path.read_text(encoding="utf-8"))
        if operation == "set_json":
            value[change["key"]] = change["value"]
        else:
            del value[change["key"]]
        path.write_text(json.dumps(value), encoding="utf-8")
    elif operation == "write":
        path.write_text(change["text"], encoding="utf-8")
    elif operation == "write_base64":
        path.write_bytes(base64.b64decode(change["base64"]))
    elif operation == "symlink":
        path.unlink(missing_ok=True)
        path.symlink_to(change["target"])
    else:
        pytest.fail(f"unknown operation {operation}")


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_a_bad_checkpoint_gives_the_error_of_the_vectors(case: dict[str, Any], tmp_path: Path) -> None:
    directory = tmp_path / "model"
    shutil.copytree(fixture_directory(case["base"]), directory)
    for change in case["changes"]:
        apply(directory, change)
    with pytest.raises(Qwen2Error) as caught:
        Model.load(directory)
    error = caught.value

    def fill(text: str | None) -> str | None:
        return None if text is None else text.replace("{dir}", str(directory))

    assert (error.kind, str(error), error.help) == (
        case["kind"],
        fill(case["message"]),
        fill(case.get("help")),
    )


def test_there_is_a_class_for_each_kind_which_is_a_builtin_too() -> None:
    classes = {
        name: thing
        for name, thing in vars(qwen2_rs).items()
        if isinstance(thing, type) and issubclass(thing, Qwen2Error) and thing is not Qwen2Error
    }
    assert set(classes) == set(BUILTIN)
    for name, thing in classes.items():
        assert thing.__bases__ == (Qwen2Error, BUILTIN[name])
        assert thing.__module__ == "qwen2_rs"
        assert not hasattr(builtins, name)
    kinds = {thing.kind for thing in classes.values()}
    assert len(kinds) == len(classes)
    assert {"invalid_argument", "out_of_memory", "internal"} <= kinds


def test_an_error_says_where_and_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        Model.load(tmp_path / "nowhere")
    error = caught.value
    assert isinstance(error, NotFoundError)
    assert error.kind == "not_found"
    assert str(tmp_path / "nowhere") in str(error)
    assert error.help
    if sys.version_info >= (3, 11):
        assert f"help: {error.help}" in error.__notes__


def test_an_error_can_be_pickled() -> None:
    with pytest.raises(Qwen2Error) as caught:
        Model.load(DEMO, device="nonsense")
    copy = pickle.loads(pickle.dumps(caught.value))  # noqa: S301
    assert type(copy) is type(caught.value)
    assert (str(copy), copy.kind, copy.key, copy.help) == (
        str(caught.value),
        "invalid_argument",
        "device",
        caught.value.help,
    )


def test_paths_of_any_kind_are_taken(tmp_path: Path) -> None:
    class Place:
        def __fspath__(self) -> str:
            return str(DEMO)

    places: list[str | os.PathLike[str]] = [DEMO, str(DEMO), Place()]
    for place in places:
        assert Model.load(place).name == "demo-model"
        assert Tokenizer.load(place).vocab_size > 0
    if sys.platform.startswith("linux"):
        strange = tmp_path / os.fsdecode(b"caf\xe9")
        shutil.copytree(fixture_directory("tied"), strange)
        assert Model.load(strange).context_length == 128
        (strange / "config.json").unlink()
        with pytest.raises(NotFoundError) as caught:
            Model.load(str(strange))
        assert caught.value.path == str(strange / "config.json")
    for wrong in [3, None]:
        with pytest.raises(TypeError):
            Model.load(wrong)  # type: ignore[arg-type]
    with pytest.raises(Qwen2Error):
        Model.load("a\0b")
