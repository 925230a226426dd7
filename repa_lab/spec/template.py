"""A new spec from an example: one whole file, with the meaning of every field beside it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from textwrap import wrap
from typing import Any

from pydantic import BaseModel

from repa_lab.spec.errors import KeyPath
from repa_lab.spec.experiment import Experiment, load_spec
from repa_lab.spec.json_schema import about
from repa_lab.spec.schema import SECTIONS, SpecFile
from repa_lab.spec.yaml import reads_as_text

_WIDTH = 120
_BARE = re.compile(r"[^\s,\[\]{}&*!|>'\"%@`#:?-][^,\[\]{}#:]*")
_LINK = re.compile(r"[;,]? see \[[^]]*\]\([^)]*\)")


def template(example: Path, name: str) -> str:
    """Return an example as the text of a spec that stands alone: what it is based on is written out.

    Raises:
        SpecError: the example is wrong.
    """
    experiment, lines = load_spec(example), example.read_text(encoding="utf-8").splitlines()
    header = [*takewhile(lambda line: line.startswith("#"), lines)]
    draft = experiment.draft.value | {"name": name}
    fields = [field for field in SpecFile.model_fields if field in draft]
    fields.sort(key=lambda field: ("name", "question").index(field) if field in ("name", "question") else 2)
    blocks = ["\n".join(_section(experiment, field, draft[field])) for field in fields]
    return "\n".join([*header, *blocks]) + "\n"


def _section(experiment: Experiment, name: str, value: Any) -> Iterator[str]:
    if not isinstance(value, dict):
        yield from _entry("", name, value)
        return
    yield ""
    yield f"# {_docstring(SpecFile, name)}"
    yield f"{name}:"
    yield from _fields(experiment, (name,), value)


def _fields(experiment: Experiment, path: KeyPath, section: dict[str, Any]) -> Iterator[str]:
    indent = "  " * len(path)
    for name, value in section.items():
        docstrings = (_docstring(type(model), name) for model in _models(experiment, path))
        remark = next(filter(None, docstrings), "")
        lines = list(_entry(indent, name, value))
        if isinstance(value, dict) and value and (remark or len(lines[0]) > _WIDTH):
            lines = [f"{indent}{_flow(name)}:", *_fields(experiment, (*path, name), value)]
        if remark and len(lines[0]) + 4 + len(remark) > _WIDTH:
            comment = f"{indent}# "
            yield from wrap(remark, _WIDTH, initial_indent=comment, subsequent_indent=comment, break_on_hyphens=False)
        elif remark:
            lines[0] += f"  # {remark}"
        yield from lines


def _entry(indent: str, name: str, value: Any) -> Iterator[str]:
    """Yield a key with its value on one line; a list that is too long for one has a line for each item."""
    line = f"{indent}{_flow(name)}: {_flow(value)}"
    if isinstance(value, list) and len(line) > _WIDTH:
        yield f"{indent}{_flow(name)}:"
        yield from (f"{indent}  - {_flow(item)}" for item in value)
    else:
        yield line


def _models(experiment: Experiment, path: KeyPath) -> Iterator[BaseModel]:
    """Yield the settings at a path: of every arm where arms have them, else of the experiment."""
    for holder in [arm.config for arm in experiment.arms] if path[0] in SECTIONS else [experiment]:
        settings: Any = holder
        for key in path:
            settings = getattr(settings, str(key), None)
        if isinstance(settings, BaseModel):
            yield settings


def _docstring(model: type[BaseModel], name: str) -> str:
    """Return a field's docstring on one line; empty if the model has no such field."""
    field = model.model_fields.get(name)
    return _LINK.sub("", about(field)) if field else ""


def _flow(value: Any) -> str:
    """Return a value as YAML on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_flow(key)}: {_flow(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_flow, value)) + "]"
    if isinstance(value, str) and _BARE.fullmatch(value) and reads_as_text(value) and not value.endswith(" "):
        return value
    return json.dumps(value, ensure_ascii=False)
