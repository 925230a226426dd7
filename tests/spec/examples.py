"""Specs that the tests start from."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from repa_lab.align.settings import REGULARIZERS

# Every type of regularizer, as messages list them.
TYPES = ", ".join(REGULARIZERS.names)
# Four lines that every spec needs; what a test adds starts on line 5.
HEAD = "name: q\nmodel: {family: sit, size: B/2}\ndata: {source: digits}\ntrain: {steps: 10}\n"
# A regularizer for what varies its fields; a line of its own.
REPA = "regularizer: {type: repa}\n"
_MAPPING = {
    "name": "q",
    "model": {"family": "sit", "size": "B/2"},
    "data": {"source": "digits"},
    "train": {"steps": 10},
}


def mapping(**more: Any) -> dict[str, Any]:
    """A fresh minimal spec as a program would write it."""
    return {**copy.deepcopy(_MAPPING), **more}


def write(folder: Path, text: str, name: str = "q.yaml") -> Path:
    """A spec file."""
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    return file
