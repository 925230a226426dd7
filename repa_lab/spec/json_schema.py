"""What others read of the settings classes: the JSON schema of a spec, and the tables of fields in `docs/spec.md`."""

from __future__ import annotations

import json
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic.json_schema import models_json_schema
from pydantic_core import PydanticUndefined

from repa_lab.files import write_text
from repa_lab.spec.schema import COMPONENTS, SECTIONS, RunConfig, SpecFile
from repa_lab.spec.validate import is_model, members

_REF = "#/$defs/"


def json_schema() -> dict[str, Any]:
    """Return the JSON schema (2020-12) of a spec, a base or a fragment, for editors."""
    _, schema = models_json_schema([(SpecFile, "validation"), (RunConfig, "validation")], by_alias=True)
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
    properties |= {name: _without_title(sections[name]) for name in SECTIONS}
    _allow_dotted_paths(properties, definitions, paths)
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
        yield prefix + name, _without_title(field)
        for choice in field.get("anyOf", [field]):
            definition = definitions.get(choice.get("$ref", "").removeprefix(_REF), choice)
            yield from _paths(definition.get("properties", {}), definitions, f"{prefix}{name}.")


def _without_title(field: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in field.items() if key != "title"}


def _by_path(schemas: dict[str, Any]) -> dict[str, Any]:
    """Return the properties with these dotted paths; into a section that may be a list also by position and by name."""
    patterns: dict[str, Any] = {}
    for section in (name for name, mark in COMPONENTS.items() if mark.several):
        below = {path.removeprefix(f"{section}."): path for path in schemas if path.startswith(f"{section}.")}
        fields = "|".join(path for path in below if "." not in path)
        member = rf"^{section}\.(\d+|(?!({fields})\.)[a-z][a-z0-9_-]*)"
        patterns |= {rf"{member}\.{re.escape(path)}$": schemas[whole] for path, whole in below.items()}
    return {"properties": schemas, "patternProperties": patterns}


def _allow_dotted_paths(properties: dict[str, Any], definitions: dict[str, Any], paths: dict[str, Any]) -> None:
    """List the dotted paths wherever they are keys, so that an editor completes them there too."""
    settings, span = {"$ref": f"{_REF}Settings"}, {"$ref": f"{_REF}RangeConfig"}
    lists = {path: {"type": "array", "minItems": 1, "items": field} for path, field in paths.items()}
    levels = {"type": "object", "minProperties": 1, "additionalProperties": {"anyOf": [settings, {"type": "null"}]}}
    properties["axes"] |= {
        **_by_path({path: {"anyOf": [values, span, levels]} for path, values in lists.items()}),
        "additionalProperties": levels,
    }
    properties["one_at_a_time"] |= {
        **_by_path({path: {"anyOf": [values, span]} for path, values in lists.items()}),
        "additionalProperties": False,
    }
    definitions["Include"]["properties"]["set"] = settings
    definitions["SearchConfig"]["properties"]["space"] |= {
        **_by_path({path: {"$ref": f"{_REF}Interval"} for path in paths}),
        "additionalProperties": False,
    }


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
_Row = tuple[str, str, str, str]  # path, default, values, docstring


def write_tables(page: Path) -> None:
    """Generate the tables of fields between the marks of a page: `repa-lab schema --tables docs/spec.md`.

    Raises:
        KeyError: a mark names no section and no component.
    """
    text = page.read_text(encoding="utf-8")
    write_text(page, _BLOCK.sub(lambda block: f"{block[1]}{_table(block[2])}{block[3]}", text))


def _table(name: str) -> str:
    rows = [f"| `{path}` | {default} | {values} | {docstring} |\n" for path, default, values, docstring in _rows(name)]
    return "".join(["| field | default | values | |\n", "|---|---|---|---|\n", *rows])


def _rows(name: str) -> Iterator[_Row]:
    """Yield the rows of a section (``train``), a component's own fields (``data/hub``), or the file (``spec``)."""
    section, _, component = name.partition("/")
    if section == "spec":
        yield from _fields(SpecFile, "", with_subfields=False)
    elif component:
        mark = COMPONENTS[section]
        settings = mark.registry[component].settings
        shown = (*mark.choices, *_models(RunConfig.model_fields[section].annotation))
        inherited = next(base.model_fields for base in settings.__mro__[1:] if base in shown)
        for field, info in settings.model_fields.items():
            if field not in inherited:
                yield from _field(f"{section}.{field}", info)
    else:
        source = RunConfig if section in RunConfig.model_fields else SpecFile
        yield from _fields(_models(source.model_fields[section].annotation)[0], f"{section}.")


def _fields(model: type[BaseModel], prefix: str, with_subfields: bool = True) -> Iterator[_Row]:
    for name, field in model.model_fields.items():
        yield from _field(f"{prefix}{field.alias or name}", field, with_subfields)


def _field(path: str, field: FieldInfo, with_subfields: bool = True) -> Iterator[_Row]:
    models = _models(field.annotation)
    yield path, _default(field), ", ".join(dict.fromkeys(_values(field.annotation))), about(field)
    if with_subfields and len(models) == 1 and not path.startswith("evaluate.encoder"):
        yield from _fields(models[0], f"{path}.")


def about(field: FieldInfo) -> str:
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


def _models(annotation: Any) -> list[type[BaseModel]]:
    """Return the models among the members of a type, and among the values of its lists."""
    lists = (member for member in members(annotation) if typing.get_origin(member) in (list, tuple))
    inside = [model for member in lists for value in typing.get_args(member) for model in _models(value)]
    return list(dict.fromkeys([*filter(is_model, members(annotation)), *inside]))
