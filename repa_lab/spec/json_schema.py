"""The JSON schema of a spec file, with which an editor completes fields and marks mistakes while one types."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from pydantic.json_schema import models_json_schema

from repa_lab.spec.grammar import Grammar
from repa_lab.spec.schema import SECTIONS, RunConfig

_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_REF = "#/$defs/"
_BASE = {"type": "string", "description": "A spec file under this one, relative to this file."}
_USE = {
    "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}, {"type": "null"}],
    "description": "Fragments between the base and this file, relative to this file.",
}
_HEAD = {"title": "repa-lab spec", "description": "One question, or a part of one: a base or a fragment."}
# What a file leaves out its base or a fragment may give, so only what is never put together from several files is
# required.
_WHOLE = ("Include",)


def json_schema() -> dict[str, Any]:
    """The JSON schema (2020-12) of a spec, a base or a fragment; what a run's settings allow it asks of every arm's too."""
    _, schema = models_json_schema([(Grammar, "validation"), (RunConfig, "validation")], by_alias=True)
    parts: dict[str, Any] = schema["$defs"]
    for name, part in parts.items():
        part["description"] = part["description"].replace("``", "`")
        if name not in _WHOLE:
            part.pop("required", None)
    document, sections = (parts.pop(name)["properties"] for name in ("Grammar", "RunConfig"))
    parts["Settings"] = _settings(_merged(_paths(sections, parts)))
    properties: dict[str, Any] = document | {"base": _BASE, "use": _USE}
    properties |= {name: _described(sections[name]) for name in SECTIONS}
    _name_fields(properties, parts)
    return {
        "$schema": _DIALECT,
        **_HEAD,
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
        "$defs": parts,
    }


def _paths(fields: dict[str, Any], parts: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted path of a run's settings with the schema of what stands there."""
    for name, field in fields.items():
        yield prefix + name, _described(field)
        for choice in field.get("anyOf", [field]):
            part = parts.get(choice.get("$ref", "").removeprefix(_REF), choice)
            yield from _paths(part.get("properties", {}), parts, f"{prefix}{name}.")


def _merged(paths: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Return the schema of every path; where components differ in a field of one name, any of theirs will do."""
    found: dict[str, list[Any]] = {}
    for path, field in paths:
        if field not in found.setdefault(path, []):
            found[path].append(field)
    return {path: fields[0] if len(fields) == 1 else {"anyOf": fields} for path, fields in found.items()}


def _described(field: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in field.items() if key != "title"}


def _settings(paths: dict[str, Any]) -> dict[str, Any]:
    about = "Settings of an arm by dotted path, such as regularizer.weight."
    return {"type": "object", "description": about, "properties": paths, "additionalProperties": False}


def _name_fields(properties: dict[str, Any], parts: dict[str, Any]) -> None:
    """Name the dotted paths wherever they are keys, so that an editor knows them there as well."""
    settings, span = {"$ref": f"{_REF}Settings"}, {"$ref": f"{_REF}RangeConfig"}
    paths = parts["Settings"]["properties"]
    listed = {path: {"type": "array", "minItems": 1, "items": field} for path, field in paths.items()}
    levels = {"type": "object", "minProperties": 1, "additionalProperties": {"anyOf": [settings, {"type": "null"}]}}
    named = properties["axes"]
    named["properties"] = {path: {"anyOf": [values, span, levels]} for path, values in listed.items()}
    named["additionalProperties"] = levels
    star = properties["one_at_a_time"]
    star |= {
        "properties": {path: {"anyOf": [values, span]} for path, values in listed.items()},
        "additionalProperties": False,
    }
    parts["Include"]["properties"]["set"] = settings
    space = parts["SearchConfig"]["properties"]["space"]
    space |= {"properties": {path: {"$ref": f"{_REF}Interval"} for path in paths}, "additionalProperties": False}
