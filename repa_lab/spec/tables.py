"""The tables of fields in `docs/spec.md`, made of the settings classes: `repa-lab schema --tables docs/spec.md`."""

from __future__ import annotations

import json
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from repa_lab.runs.files import write_text
from repa_lab.spec.component import COMPONENTS
from repa_lab.spec.grammar import Grammar
from repa_lab.spec.schema import RunConfig

# `<!-- fields of NAME -->`, a table, `<!-- end -->`.
_BLOCK = re.compile(r"(<!-- fields of (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
_KINDS = {
    bool: "`true`, `false`",
    int: "an integer",
    float: "a number",
    str: "text",
    dict: "a mapping",
    types.NoneType: "`null`",
}


def write_tables(page: Path) -> None:
    """Write the tables of a page anew, between its marks.

    Raises:
        KeyError: a mark names no section and no component.
    """
    text = page.read_text(encoding="utf-8")
    write_text(page, _BLOCK.sub(lambda found: f"{found[1]}{table(found[2])}{found[3]}", text))


def table(name: str) -> str:
    """Return the table of a section (``train``), of a component's own fields (``data/hub``), or of the file (``spec``)."""
    rows = [f"| `{path}` | {default} | {values} | {about} |\n" for path, default, values, about in _rows(name)]
    return "".join(["| field | default | values | |\n", "|---|---|---|---|\n", *rows])


def _rows(name: str) -> Iterator[tuple[str, str, str, str]]:
    section, _, component = name.partition("/")
    if section == "spec":
        yield from _fields(Grammar, "", inside=False)
    elif component:
        known = COMPONENTS[section].registry
        settings = known[component].settings
        shown = (*(known[name].settings for name in known), *_models(RunConfig.model_fields[section].annotation))
        inherited = next(base.model_fields for base in settings.__mro__[1:] if base in shown)
        own = ((field, info) for field, info in settings.model_fields.items() if field not in inherited)
        yield from (row for field, info in own for row in _field(f"{section}.{field}", info))
    else:
        source = RunConfig if section in RunConfig.model_fields else Grammar
        (model,) = _models(source.model_fields[section].annotation)[:1]
        yield from _fields(model, f"{section}.")


def _fields(model: type[BaseModel], prefix: str, inside: bool = True) -> Iterator[tuple[str, str, str, str]]:
    for name, field in model.model_fields.items():
        yield from _field(f"{prefix}{field.alias or name}", field, inside)


def _field(path: str, field: FieldInfo, inside: bool = True) -> Iterator[tuple[str, str, str, str]]:
    models = _models(field.annotation)
    about = " ".join((field.description or "").split()).replace("``", "`")
    yield path, _default(field, bool(models)), ", ".join(dict.fromkeys(_values(field.annotation))), about
    if inside and len(models) == 1 and not path.startswith("evaluate.encoder"):
        yield from _fields(models[0], f"{path}.")


def _default(field: FieldInfo, is_section: bool) -> str:
    default = field.get_default(call_default_factory=True)
    if default is PydanticUndefined:
        return "required"
    if isinstance(default, BaseModel):
        return ""
    if isinstance(default, str):
        return f"`{default}`" if default else '`""`'
    return f"`{json.dumps(list(default) if isinstance(default, tuple) else default)}`"


def _values(annotation: Any) -> Iterator[str]:
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        yield from _values(inner[0])
    elif origin in (typing.Union, types.UnionType):
        for choice in inner:
            yield from _values(choice)
    elif origin is typing.Literal:
        yield from (f"`{json.dumps(value) if not isinstance(value, str) else value}`" for value in inner)
    elif origin in (list, tuple):
        yield "a list"
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield "a section"
    else:
        yield _KINDS.get(origin or annotation, "any value")


def _models(annotation: Any) -> list[type[BaseModel]]:
    inner = typing.get_args(annotation)
    if typing.get_origin(annotation) in (Annotated, typing.Union, types.UnionType, tuple, list):
        return list(dict.fromkeys(model for choice in inner for model in _models(choice)))
    return [annotation] if isinstance(annotation, type) and issubclass(annotation, BaseModel) else []
