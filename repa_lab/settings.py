"""What every settings class is: frozen, strict about types, and closed to unknown fields. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
NotNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
BlockIndex = Annotated[int, Field(ge=0)] | Literal["mid"]
# YAML gives lists; settings are keys of mappings, so every one of them must be hashable.
AS_TUPLE = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)


class Settings(BaseModel):
    """The settings of one component. A docstring under a field documents the field."""

    model_config = ConfigDict(
        frozen=True, strict=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )


@dataclass(frozen=True)
class NamesFile:
    """Marks a field that may name a local file or folder; in a run's identity its content stands for the name.

    Attributes:
        required: whether the name must be that of a local file; a hub id is allowed otherwise.
    """

    required: bool = False


# A local file.
LocalFile = Annotated[str, NamesFile(required=True)]
# A hub id, or a local file or folder.
HubOrLocal = Annotated[str, NamesFile()]


def later(neutral: Any, **limits: Any) -> Any:
    """Declare a field that older runs lack: at its neutral value a run's id is what it was without the field."""
    return Field(default=neutral, json_schema_extra={"neutral": True}, **limits)


def settings_in(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Settings]]:
    """Yield every settings object inside a value, itself included, with its path; tuples count by position."""
    if isinstance(value, Settings):
        yield path, value
        for name in type(value).model_fields:
            yield from settings_in(getattr(value, name), (*path, name))
    elif isinstance(value, tuple):
        for index, item in enumerate(value):
            yield from settings_in(item, (*path, index))


def file_fields(settings: Settings) -> Iterator[tuple[str, str, NamesFile]]:
    """Yield the name, the value and the mark of every field of these settings that names a file and is set."""
    for name, field in type(settings).model_fields.items():
        mark = next(
            (mark for mark in field_metadata(field.annotation, field.metadata) if isinstance(mark, NamesFile)), None
        )
        if mark is not None and isinstance(value := getattr(settings, name), str):
            yield name, value, mark


def field_metadata(annotation: Any, metadata: list[Any]) -> Iterator[Any]:
    """Yield the marks of a field, those of the members of a union included."""
    yield from metadata
    for member in getattr(annotation, "__args__", ()):
        yield from field_metadata(member, list(getattr(member, "__metadata__", ())))
