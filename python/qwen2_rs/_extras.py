"""Packages that are not installed with this one, and how to get them."""

from __future__ import annotations


def missing(error: ImportError, package: str, needed_by: str, install: str) -> ImportError:
    """What to raise for `error` from the import of `package`: one that says what to install. Where the
    package is there and something that it imports is not, `error` is raised itself.
    """
    if (error.name or "").split(".")[0] != package:
        raise error
    message = f"{package} is not installed: {needed_by} needs it; help: pip install {install}"
    return ImportError(message, name=package)
