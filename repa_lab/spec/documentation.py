"""The fields of a spec described: the JSON schema for editors, the tables in `docs/spec.md`, and new specs."""

from __future__ import annotations

import json
import re
import types
import typing
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from textwrap import wrap
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic.json_schema import GenerateJsonSchema, models_json_schema
from pydantic_core import PydanticUndefined

from repa_lab.errors import KeyPath
from repa_lab.files import write_text
from repa_lab.spec.document import COMPONENTS, reads_as_text
from repa_lab.spec.experiment import Experiment, load_spec
from repa_lab.spec.schema import SECTIONS, RunConfig, SpecFile, is_model, members, models_of

_REF = "#/$defs/"


class _WithoutTitles(GenerateJsonSchema):
    """Leaves out the titles of fields, which only repeat their names."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def json_schema() -> dict[str, Any]:
    """Return the JSON schema (2020-12) of a spec, a base or a fragment, for editors."""
    models: list[Any] = [(SpecFile, "validation"), (RunConfig, "validation")]
    _, schema = models_json_schema(models, by_alias=True, schema_generator=_WithoutTitles)
    definitions: dict[str, Any] = schema["$defs"]
    for name, definition in definitions.items():
        definition["description"] = definition["description"].replace("``", "`")
        if name != "Include":  # a base or a fragment may give any field of a section that is merged
            definition.pop("required", None)
    properties, sections = (definitions.pop(name)["properties"] for name in ("SpecFile", "RunConfig"))
    choices: dict[str, list[Any]] = {}  # by dotted path; components may differ in a field of one name
    for path, field in _paths(sections, definitions):
        if field not in choices.setdefault(path, []):
            choices[path].append(field)
    paths = {path: fields[0] if len(fields) == 1 else {"anyOf": fields} for path, fields in choices.items()}
    definitions["Settings"] = {
        "type": "object",
        "description": "Settings of an arm by dotted path, such as regularizer.weight.",
        **_by_path(paths),
        "additionalProperties": False,
    }
    properties |= {name: sections[name] for name in SECTIONS}
    # The dotted paths are listed wherever they are keys, so that an editor completes them there too.
    settings, span = {"$ref": f"{_REF}Settings"}, {"$ref": f"{_REF}RangeConfig"}
    lists = {path: {"type": "array", "minItems": 1, "items": field} for path, field in paths.items()}
    levels = {"type": "object", "minProperties": 1, "additionalProperties": {"anyOf": [settings, {"type": "null"}]}}
    axes = _by_path({path: {"anyOf": [values, span, levels]} for path, values in lists.items()})
    star = _by_path({path: {"anyOf": [values, span]} for path, values in lists.items()})
    space = _by_path({path: {"$ref": f"{_REF}Interval"} for path in paths})
    properties["axes"] |= {**axes, "additionalProperties": levels}
    properties["one_at_a_time"] |= {**star, "additionalProperties": False}
    definitions["SearchConfig"]["properties"]["space"] |= {**space, "additionalProperties": False}
    definitions["Include"]["properties"]["set"] = settings
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "repa-lab spec",
        "description": "One question, or a part of one: a base or a fragment.",
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
        "patternProperties": {"^x-": {"description": "What other parts of the file share; ignored itself."}},
        "$defs": definitions,
    }


def _paths(fields: dict[str, Any], definitions: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every dotted path of a run's settings with its schema."""
    for name, field in fields.items():
        yield prefix + name, field
        for choice in field.get("anyOf", [field]):
            definition = definitions.get(choice.get("$ref", "").removeprefix(_REF), choice)
            yield from _paths(definition.get("properties", {}), definitions, f"{prefix}{name}.")


def _by_path(schemas: dict[str, Any]) -> dict[str, Any]:
    """Return the properties with these dotted paths; into a section that may be a list also by position and by name."""
    patterns: dict[str, Any] = {}
    for section in (name for name, mark in COMPONENTS.items() if mark.several):
        below = {path.removeprefix(f"{section}."): path for path in schemas if path.startswith(f"{section}.")}
        fields = "|".join(path for path in below if "." not in path)
        member = rf"^{section}\.(\d+|(?!({fields})\.)[a-z][a-z0-9_-]*)"
        patterns |= {rf"{member}\.{re.escape(path)}$": schemas[whole] for path, whole in below.items()}
    return {"properties": schemas, "patternProperties": patterns}


# ---- the tables of fields in `docs/spec.md`

# `<!-- fields of NAME -->`, a table, `<!-- end -->`.
_BLOCK = re.compile(r"(<!-- fields of (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
_TYPES = {
    bool: "`true`, `false`",
    int: "an integer",
    float: "a number",
    str: "text",
    dict: "a mapping",
    types.NoneType: "`null`",
}


def write_tables(page: Path) -> None:
    """Generate the tables of fields between the marks of a page: `repa-lab schema --tables docs/spec.md`.

    Raises:
        KeyError: a mark names no section and no component.
    """

    def table(block: re.Match[str]) -> str:
        return "".join([block[1], "| field | default | values | |\n|---|---|---|---|\n", *_rows(block[2]), block[3]])

    write_text(page, _BLOCK.sub(table, page.read_text(encoding="utf-8")))


def _rows(name: str) -> Iterator[str]:
    """Yield the rows of a section (``train``), a component's own fields (``data/hub``), or the file (``spec``)."""
    section, _, component = name.partition("/")
    if section == "spec":
        yield from _fields(SpecFile.model_fields, "", with_subfields=False)
    elif component:
        mark = COMPONENTS[section]
        settings = mark.registry[component].settings
        shown = (*mark.choices, *models_of(RunConfig.model_fields[section].annotation))
        inherited = next(base.model_fields for base in settings.__mro__[1:] if base in shown)
        own = {field: info for field, info in settings.model_fields.items() if field not in inherited}
        yield from _fields(own, f"{section}.")
    else:
        source = RunConfig if section in RunConfig.model_fields else SpecFile
        yield from _fields(models_of(source.model_fields[section].annotation)[0].model_fields, f"{section}.")


def _fields(fields: dict[str, FieldInfo], prefix: str, with_subfields: bool = True) -> Iterator[str]:
    for name, field in fields.items():
        path = f"{prefix}{field.alias or name}"
        values = ", ".join(dict.fromkeys(_values(field.annotation)))
        yield f"| `{path}` | {_default(field)} | {values} | {_docstring(field)} |\n"
        models = models_of(field.annotation)
        if with_subfields and len(models) == 1 and not path.startswith("evaluate.encoder"):
            yield from _fields(models[0].model_fields, f"{path}.")


def _docstring(field: FieldInfo) -> str:
    """Return a field's docstring on one line."""
    return " ".join((field.description or "").split()).replace("``", "`")


def _default(field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True)
    if default is PydanticUndefined:
        return "required"
    if isinstance(default, BaseModel):
        return ""
    if isinstance(default, str):
        return f"`{default}`" if default else '`""`'
    return f"`{json.dumps(list(default) if isinstance(default, tuple) else default)}`"


def _values(annotation: Any) -> Iterator[str]:
    for member in members(annotation):
        origin = typing.get_origin(member)
        if origin is typing.Literal:
            choices = typing.get_args(member)
            yield from (f"`{value if isinstance(value, str) else json.dumps(value)}`" for value in choices)
        elif origin in (list, tuple):
            yield "a list"
        elif is_model(member):
            yield "a section"
        else:
            yield _TYPES.get(origin or member, "any value")


# ---- a new spec

_WIDTH = 120
_BARE = re.compile(r"[^\s,\[\]{}&*!|>'\"%@`#:?-][^,\[\]{}#:]*")
_LINK = re.compile(r"[;,]? see \[[^]]*\]\([^)]*\)")


def template(example: Path, name: str) -> str:
    """Return an example as the text of a spec that stands alone, with the meaning of every field beside it.

    Raises:
        SpecError: the example is wrong.
    """
    experiment, text = load_spec(example), example.read_text(encoding="utf-8")
    draft = experiment.draft.value | {"name": name}
    lines = [*takewhile(lambda line: line.startswith("#"), text.splitlines())]
    for field in dict.fromkeys(["name", "question", *SpecFile.model_fields]):
        value = draft.get(field)
        if isinstance(value, dict):
            lines += ["", f"# {_remark(SpecFile, field)}", f"{field}:", *_section(experiment, (field,), value)]
        elif field in draft:
            lines += _entry("", field, value)
    return "\n".join(lines) + "\n"


def _section(experiment: Experiment, path: KeyPath, section: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of a section, with a remark on every field that an arm, or else the experiment, has."""
    settings: list[Any] = [arm.config for arm in experiment.arms] if path[0] in SECTIONS else [experiment]
    for key in path:
        settings = [getattr(holder, str(key), None) for holder in settings]
    indent = "  " * len(path)
    for name, value in section.items():
        remarks = (_remark(type(model), name) for model in settings if isinstance(model, BaseModel))
        remark = next(filter(None, remarks), "")
        lines = list(_entry(indent, name, value))
        if isinstance(value, dict) and value and (remark or len(lines[0]) > _WIDTH):
            lines = [f"{indent}{_flow(name)}:", *_section(experiment, (*path, name), value)]
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


def _remark(model: type[BaseModel], name: str) -> str:
    """Return a field's docstring on one line, without links; empty if the model has no such field."""
    field = model.model_fields.get(name)
    return _LINK.sub("", _docstring(field)) if field else ""


def _flow(value: Any) -> str:
    """Return a value as YAML on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_flow(key)}: {_flow(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_flow, value)) + "]"
    if isinstance(value, str) and _BARE.fullmatch(value) and reads_as_text(value) and not value.endswith(" "):
        return value
    return json.dumps(value, ensure_ascii=False)
