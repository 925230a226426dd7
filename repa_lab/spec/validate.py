"""Validation of a draft: pydantic's errors become problems with places and plain messages."""

from __future__ import annotations

import types
import typing
from collections.abc import Collection, Iterator, Sequence
from typing import Annotated, Any, TypeGuard, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from repa_lab.registry import did_you_mean
from repa_lab.settings import SettingsOf
from repa_lab.spec.document import Draft, entries
from repa_lab.spec.errors import KeyPath, Problem, SpecError, dotted, shortened

M = TypeVar("M", bound=BaseModel)


def validate(model: type[M], draft: Draft) -> M:
    """Validate a draft against a settings class.

    Raises:
        SpecError: every mistake, each at the place that set the value.
    """
    try:
        return model.model_validate(draft.value)
    except ValidationError as error:
        raise SpecError(_problems(model, draft, error)) from None


def _problems(model: type[BaseModel], draft: Draft, error: ValidationError) -> Iterator[Problem]:
    by_path: dict[KeyPath, list[ErrorDetails]] = {}
    for details in error.errors(include_url=False):
        path = path_in(draft.value, details["loc"], details["type"] == "missing")
        by_path.setdefault(path, []).append(details)
    for path, errors in by_path.items():
        # An error inside one branch of a union says more than the errors of the branches that do not fit at all.
        if not any(other[: len(path)] == path and other != path for other in by_path):
            yield draft.problem(path, _message(model, draft.value, path, errors))


def path_in(value: Any, loc: KeyPath, is_missing: bool) -> KeyPath:
    """Return where an error of pydantic lies in the data, without the steps that name the branch of a union."""
    path: list[str | int] = []
    for step in loc[:-1] if is_missing else loc:
        if step in entries(value):
            value = entries(value)[step]
            path.append(step)
    return (*path, loc[-1]) if is_missing else tuple(path)


def _message(model: type[BaseModel], value: Any, path: KeyPath, errors: list[ErrorDetails]) -> str:
    first = errors[0]
    if first["type"] == "extra_forbidden":
        return unknown_field_message(path[-1], _owners(model, path[:-1], value))
    if first["type"] == "missing":
        return "this field is required"
    return expectation(errors)


def expectation(errors: Sequence[ErrorDetails]) -> str:
    """Return what pydantic expected of one value, what was given, and the choice that was probably meant."""
    first = errors[0]
    if refusals := [str(details["ctx"]["error"]) for details in errors if details["type"] == "value_error"]:
        return refusals[0]
    expected = " or ".join(dict.fromkeys(_expected(details) for details in errors))
    choices = [
        word
        for details in errors
        if details["type"] == "literal_error"
        for word in _literals(details["ctx"]["expected"])
    ]
    hint = did_you_mean(first["input"], choices) if isinstance(first["input"], str) else ""
    return f"expected {expected}, got {shortened(first['input'])}{hint}"


def unknown_field(model: type[BaseModel], path: str, names: Collection[str] = ()) -> str | None:
    """Return an error message if a dotted path leads to no field of a model, else None.

    In a section that holds the settings of a component, the fields of every component count.
    """
    keys: KeyPath = ()
    for step in path.split("."):
        owners = _owners(model, keys)
        if (step.isdecimal() or step in names) and _owners(model, (*keys, 0)):
            keys = (*keys, 0)
            continue
        if not owners:
            return f"'{dotted(keys)}' is a value, so it has no field '{step}'"
        if not any(step in fields_of(owner) for owner in owners):
            return unknown_field_message(step, owners)
        keys = (*keys, step)
    return None


def unknown_field_message(name: str | int, owners: Sequence[type[BaseModel]]) -> str:
    """Return the error message for a field that none of the models has."""
    allowed = sorted({field for owner in owners for field in fields_of(owner)})
    listed = f"; allowed: {', '.join(allowed)}" if allowed else ""
    return f"unknown field '{name}'{listed}{did_you_mean(str(name), allowed)}"


def fields_of(model: type[BaseModel]) -> dict[str, Any]:
    """Return the type of every field that a file may set, by name, with the metadata that pydantic strips."""
    return {
        field.alias or name: Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
        for name, field in model.model_fields.items()
        if not field.exclude
    }


_EXPECTED = {
    "int_type": "an integer",
    "int_parsing": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "float_parsing": "a number",
    "string_type": "text",
    "string_unicode": "text",
    "string_pattern_mismatch": "text that matches {pattern}",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "none_required": "null",
    "finite_number": "a finite number",
    "greater_than_equal": "a number of at least {ge}",
    "greater_than": "a number of more than {gt}",
    "less_than_equal": "a number of at most {le}",
    "less_than": "a number of less than {lt}",
    "string_too_short": "text of {min_length} or more characters",
    "string_too_long": "text of at most {max_length} characters",
    "too_short": "{min_length} or more values",
    "too_long": "at most {max_length} values",
}


def _expected(details: ErrorDetails) -> str:
    kind, context = details["type"], details.get("ctx", {})
    if kind == "literal_error":
        choices = _literals(context["expected"])
        return f"one of {', '.join(choices)}" if len(choices) > 1 else choices[0]
    if kind in _EXPECTED:
        return _EXPECTED[kind].format(**context)
    return details["msg"][0].lower() + details["msg"][1:]


def _literals(expected: str) -> list[str]:
    words = [word.strip() for word in expected.replace(" or ", ", ").split(", ")]
    return [{"False": "false", "True": "true"}.get(word, word.strip("'")) for word in words]


def _owners(model: type[BaseModel], path: KeyPath, value: Any = None) -> tuple[type[BaseModel], ...]:
    """Return the models that may be at a path, through optional, list and mapping fields.

    Args:
        path: field names, keys and positions.
        value: the data, which names the component of a section; without it, every component counts.
    """
    annotations: tuple[Any, ...] = (model,)
    for step in path:
        annotations = tuple(below for annotation in annotations for below in _below(annotation, step))
        value = entries(value).get(step)
        annotations = tuple(_named_component(annotation, value) or annotation for annotation in annotations)
    return tuple(dict.fromkeys(owner for annotation in annotations for owner in _models(annotation)))


def _below(annotation: Any, step: str | int) -> Iterator[Any]:
    """Yield the types of the value at ``step`` inside a value of a type."""
    if isinstance(step, str) and (models := _models(annotation)):
        yield from (fields_of(model)[step] for model in models if step in fields_of(model))
        return
    if (mark := _component(annotation)) and mark.several:
        yield annotation
    for member in members(annotation):
        if typing.get_origin(member) in (list, dict, tuple):
            arguments = typing.get_args(member)
            yield arguments[0] if arguments[-1] is Ellipsis else arguments[-1]


def _models(annotation: Any) -> tuple[type[BaseModel], ...]:
    """Return the models among the members of a type."""
    mark = _component(annotation)
    return mark.choices if mark else tuple(filter(is_model, members(annotation)))


def _named_component(annotation: Any, section: Any) -> type[BaseModel] | None:
    mark = _component(annotation)
    return mark.settings_of(section) if mark and isinstance(section, dict) else None


def _component(annotation: Any) -> SettingsOf | None:
    return next((mark for mark in getattr(annotation, "__metadata__", ()) if isinstance(mark, SettingsOf)), None)


def is_model(annotation: Any) -> TypeGuard[type[BaseModel]]:
    """Return whether a type is a model."""
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def members(annotation: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the type itself, without metadata."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return tuple(member for choice in typing.get_args(annotation) for member in members(choice))
    return members(typing.get_args(annotation)[0]) if typing.get_origin(annotation) is Annotated else (annotation,)
