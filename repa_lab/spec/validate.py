"""pydantic's findings as problems with places, in the lab's words."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

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
        # A branch of a union that fits as far as something inside it says more than the branches that do not fit at all.
        if not any(other[: len(path)] == path and other != path for other in by_path):
            yield Problem(draft.place(path), ".".join(map(str, path)), _message(model, path, found))


def _path_in(value: Any, loc: Path_, is_missing: bool) -> Path_:
    """pydantic's location without the steps that are not in the data, for they name the branches of a union."""
    path: list[str | int] = []
    for step in loc[:-1] if is_missing else loc:
        inside = value if isinstance(value, dict) else dict(enumerate(value)) if isinstance(value, list) else {}
        if step in inside:
            value = inside[step]
            path.append(step)
    return (*path, loc[-1]) if is_missing else tuple(path)


def _message(model: type[BaseModel], path: Path_, found: list[ErrorDetails]) -> str:
    first = found[0]
    if first["type"] == "extra_forbidden":
        owner = _section(model, path[:-1])
        return _unknown(path[-1], owner) if owner else f"unknown field '{path[-1]}'"
    if first["type"] == "missing":
        return "this field is required"
    if refusals := [str(details["ctx"]["error"]) for details in found if details["type"] == "value_error"]:
        return refusals[0]
    wishes = " or ".join(dict.fromkeys(_wish(details) for details in found))
    hint = did_you_mean(first["input"], _choices(found)) if isinstance(first["input"], str) else ""
    return f"expected {wishes}, got {shortened(first['input'])}{hint}"


def unknown_field(model: type[BaseModel], dotted: str) -> str | None:
    """What to say of a dotted path that leads to no field of a model; None if it leads to one."""
    path = dotted.split(".")
    for depth, step in enumerate(path):
        owner = _section(model, tuple(path[:depth]))
        if owner is None:
            return f"'{'.'.join(path[:depth])}' is a value, so it has no field '{step}'"
        if step not in _names(owner):
            return _unknown(step, owner)
    return None


def _unknown(name: str | int, owner: type[BaseModel]) -> str:
    allowed = sorted(_names(owner))
    return f"unknown field '{name}'; allowed: {', '.join(allowed)}{did_you_mean(str(name), allowed)}"


def _names(owner: type[BaseModel]) -> dict[str, Any]:
    return {field.alias or name: field.annotation for name, field in owner.model_fields.items()}


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
    return [word for details in found if details["type"] == "literal_error" for word in _quoted(details["ctx"]["expected"])]


def _section(model: type[BaseModel], path: Path_) -> type[BaseModel] | None:
    """The section that a path leads to, through optional, list and mapping fields."""
    annotation: Any = model
    for step in path:
        annotation = _below(annotation, step)
    return _first_model(annotation)


def _below(annotation: Any, step: str | int) -> Any:
    """The type of what stands at ``step`` inside a value of a type; None where nothing is known."""
    if (section := _first_model(annotation)) is not None and not isinstance(step, int):
        return _names(section).get(step)
    inside = (typing.get_args(part) for part in _parts(annotation) if _is_container(part))
    return next((types_[0] if types_[-1] is Ellipsis else types_[-1] for types_ in inside), None)


def _parts(annotation: Any) -> tuple[Any, ...]:
    """The types that a type offers to choose from."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return tuple(part for choice in typing.get_args(annotation) for part in _parts(choice))
    return _parts(typing.get_args(annotation)[0]) if typing.get_origin(annotation) is Annotated else (annotation,)


def _is_container(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (list, dict, tuple)


def _first_model(annotation: Any) -> type[BaseModel] | None:
    return next((p for p in _parts(annotation) if isinstance(p, type) and issubclass(p, BaseModel)), None)
