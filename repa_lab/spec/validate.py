"""pydantic's findings as problems with places, in the lab's words."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from repa_lab.spec.component import NamedBy
from repa_lab.spec.document import Draft
from repa_lab.spec.errors import Path_, Problem, SpecError, did_you_mean

M = TypeVar("M", bound=BaseModel)


def validate(model: type[M], draft: Draft) -> M:
    """Build a section from a draft.

    Raises:
        SpecError: with every finding, at the place that set the value.
    """
    try:
        return model.model_validate(draft.value)
    except ValidationError as error:
        raise SpecError(_problems(model, draft, error)) from None


def _problems(model: type[BaseModel], draft: Draft, error: ValidationError) -> Iterator[Problem]:
    by_path: dict[Path_, list[ErrorDetails]] = {}
    for details in error.errors(include_url=False):
        path = _path_in(draft.value, details["loc"], details["type"] == "missing")
        by_path.setdefault(path, []).append(details)
    for path, found in by_path.items():
        # A branch of a union that fits as far as something inside it says more than the branches that do not fit at
        # all.
        if not any(other[: len(path)] == path and other != path for other in by_path):
            yield Problem(draft.place(path), ".".join(map(str, path)), _message(model, draft.value, path, found))


def _path_in(value: Any, loc: Path_, is_missing: bool) -> Path_:
    """pydantic's location without the steps that are not in the data, for they name the branches of a union."""
    path: list[str | int] = []
    for step in loc[:-1] if is_missing else loc:
        inside = value if isinstance(value, dict) else dict(enumerate(value)) if isinstance(value, list) else {}
        if step in inside:
            value = inside[step]
            path.append(step)
    return (*path, loc[-1]) if is_missing else tuple(path)


def _message(model: type[BaseModel], value: Any, path: Path_, found: list[ErrorDetails]) -> str:
    first = found[0]
    if first["type"] == "extra_forbidden":
        return _unknown(path[-1], _owners(model, path[:-1], value))
    if first["type"] == "missing":
        return "this field is required"
    if refusals := [str(details["ctx"]["error"]) for details in found if details["type"] == "value_error"]:
        return refusals[0]
    wishes = " or ".join(dict.fromkeys(_wish(details) for details in found))
    hint = did_you_mean(first["input"], _choices(found)) if isinstance(first["input"], str) else ""
    return f"expected {wishes}, got {shortened(first['input'])}{hint}"


def unknown_field(model: type[BaseModel], dotted: str) -> str | None:
    """Return what to say of a dotted path that leads to no field of a model, None if it leads to one.

    Where a section's fields are those of the component it names, a field of any component counts.
    """
    path = dotted.split(".")
    for depth, step in enumerate(path):
        owners = _owners(model, tuple(path[:depth]))
        if not owners:
            return f"'{'.'.join(path[:depth])}' is a value, so it has no field '{step}'"
        if not any(step in _fields(owner) for owner in owners):
            return _unknown(step, owners)
    return None


def _unknown(name: str | int, owners: Sequence[type[BaseModel]]) -> str:
    allowed = sorted({field for owner in owners for field in _fields(owner)})
    listed = f"; allowed: {', '.join(allowed)}" if allowed else ""
    return f"unknown field '{name}'{listed}{did_you_mean(str(name), allowed)}"


def _fields(owner: type[BaseModel]) -> dict[str, Any]:
    """Return the type of every field by its name in a file, with the marks that pydantic takes off."""
    return {
        field.alias or name: Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
        for name, field in owner.model_fields.items()
        if not field.exclude
    }


def shortened(value: Any) -> str:
    """Return a value as a message shows it, cut after 100 characters."""
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


_MAX_SHOWN = 100


_WISHES = {
    "int_type": "an integer",
    "float_type": "a number",
    "string_type": "text",
    "string_unicode": "text",
    "string_pattern_mismatch": "text that matches {pattern}",
    "bool_type": "true or false",
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


def _wish(details: ErrorDetails) -> str:
    kind, context = details["type"], details.get("ctx", {})
    if kind == "literal_error":
        choices = _quoted(context["expected"])
        return f"one of {', '.join(choices)}" if len(choices) > 1 else choices[0]
    if kind in _WISHES:
        return _WISHES[kind].format(**context)
    return details["msg"][0].lower() + details["msg"][1:]


def _quoted(expected: str) -> list[str]:
    words = [word.strip() for word in expected.replace(" or ", ", ").split(", ")]
    return [{"False": "false", "True": "true"}.get(word, word.strip("'")) for word in words]


def _choices(found: list[ErrorDetails]) -> list[str]:
    return [
        word for details in found if details["type"] == "literal_error" for word in _quoted(details["ctx"]["expected"])
    ]


def _owners(model: type[BaseModel], path: Path_, value: Any = None) -> tuple[type[BaseModel], ...]:
    """Return the models that may stand at a path, through optional, list and mapping fields.

    Args:
        model: where the path begins.
        path: of field names, keys and positions.
        value: what the file says, which decides between components; None allows all of them.
    """
    annotations: tuple[Any, ...] = (model,)
    for step in path:
        annotations = tuple(below for annotation in annotations for below in _below(annotation, step, value))
        value = value.get(step) if isinstance(value, dict) else None
    return tuple(dict.fromkeys(found for annotation in annotations for found in _models(annotation, value)))


def _below(annotation: Any, step: str | int, value: Any) -> Iterator[Any]:
    """Yield the types of what stands at ``step`` inside a value of a type."""
    models = _models(annotation, value)
    if models and not isinstance(step, int):
        yield from (_fields(model)[step] for model in models if step in _fields(model))
        return
    for inside in (
        typing.get_args(part) for part in _parts(annotation) if typing.get_origin(part) in (list, dict, tuple)
    ):
        yield inside[0] if inside[-1] is Ellipsis else inside[-1]


def _models(annotation: Any, value: Any) -> tuple[type[BaseModel], ...]:
    """Return the models that a type offers."""
    named = next((mark for mark in getattr(annotation, "__metadata__", ()) if isinstance(mark, NamedBy)), None)
    if named is not None:
        chosen = named.settings_of(value) if isinstance(value, dict) else None
        return (chosen,) if chosen else named.choices
    return tuple(part for part in _parts(annotation) if isinstance(part, type) and issubclass(part, BaseModel))


def _parts(annotation: Any) -> tuple[Any, ...]:
    """Return the types that a type offers to choose from."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return tuple(part for choice in typing.get_args(annotation) for part in _parts(choice))
    return _parts(typing.get_args(annotation)[0]) if typing.get_origin(annotation) is Annotated else (annotation,)
