"""The questions of the tasks beside this file, wherever the harness was started."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from datasets import Dataset


def load(**_: Any) -> dict[str, Dataset]:
    """The one split."""
    lines = Path(__file__).with_name("demo.jsonl").read_text(encoding="utf-8").splitlines()
    return {"test": Dataset.from_list([json.loads(line) for line in lines])}
