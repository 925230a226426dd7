"""The base of all settings classes: frozen, strict about types, closed to unknown fields. Imports no torch."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, GetJsonSchemaHandler, ValidationError
from pydantic_core import CoreSchema, InitErrorDetails, core_schema

from repa_lab.errors import KeyPath
from repa_lab.registry import Registry, UnknownComponentError

M = TypeVar("M")
Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
NotNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
BlockIndex = Annotated[int, Field(ge=0)] | Literal["mid"]


def _let_tuples_take_lists(schema: Any) -> None:
    """Set ``strict`` to False for every tuple in a pydantic schema, in place."""
    if isinstance(schema, dict):
        if schema.get("type") == "tuple":
            schema["strict"] = False
        schema = list(schema.values())
    if isinstance(schema, list):
        for inner in schema:
            _let_tuples_take_lists(inner)


class Settings(BaseModel):
    """The settings of one component. A docstring under a field documents the field.

    Settings are hashable, so a field with several values is a tuple; it takes a list too, which is what YAML has.
    """

    model_config = ConfigDict(
        frozen=True, strict=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema = handler(source)
        _let_tuples_take_lists(schema)
        return schema

    def unused_fields(self) -> set[str]:
        """Return the names of the fields that have no effect at the values of the others; see :class:`UsedIf`."""
        return {name for name, mark in marks_of(type(self), UsedIf) if not mark.holds(self)}


@dataclass(frozen=True)
class UsedIf:
    """Marks a field that has an effect only at some values of another field of its section.

    These are ``values``, or, if there are none, all values but those in ``but``.
    """

    field: str
    values: tuple[Any, ...] = ()
    but: tuple[Any, ...] = ()

    def holds(self, settings: Settings) -> bool:
        """Return whether the marked field of these settings has an effect."""
        value = getattr(settings, self.field)
        return value in self.values if self.values else value not in self.but


@dataclass(frozen=True)
class NamesFile:
    """Marks a field that may name a local file or folder; a run's identity holds its content instead of its name.

    A field that is ``required`` to name a file takes no hub id.
    """

    required: bool = False


LocalFile = Annotated[str, NamesFile(required=True)]
HubOrLocal = Annotated[str, NamesFile()]


def later(neutral: Any) -> Any:
    """Declare a field that was added later: at the neutral value the field is left out of a run's identity."""
    return Field(default=neutral, json_schema_extra={"neutral": True})


def settings_in(value: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Settings]]:
    """Yield every settings object inside a value, itself included, with its path; tuples count by position."""
    if isinstance(value, Settings):
        yield path, value
        for name in type(value).model_fields:
            yield from settings_in(getattr(value, name), (*path, name))
    elif isinstance(value, tuple):
        for index, item in enumerate(value):
            yield from settings_in(item, (*path, index))


def file_fields(settings: Settings) -> Iterator[tuple[str, str, NamesFile]]:
    """Yield the name, the value and the mark of every field that names a file and is set."""
    for name, mark in marks_of(type(settings), NamesFile):
        if isinstance(value := getattr(settings, name), str):
            yield name, value, mark


@functools.cache
def marks_of(settings: type[Settings], kind: type[M]) -> tuple[tuple[str, M], ...]:
    """Return the names of the fields that have a mark of a kind, also in a member of a union, each with its mark."""
    fields = settings.model_fields.items()
    marks = ((name, mark) for name, field in fields for mark in _metadata(field.annotation, field.metadata))
    return tuple((name, mark) for name, mark in marks if isinstance(mark, kind))


def _metadata(annotation: Any, metadata: list[Any]) -> Iterator[Any]:
    yield from metadata
    for member in getattr(annotation, "__args__", ()):
        yield from _metadata(member, list(getattr(member, "__metadata__", ())))


@dataclass(frozen=True)
class SettingsOf:
    """Marks a section of a spec that holds the settings of the component that the section names.

    Attributes:
        registry: the components.
        key: the field that names the component.
        default: the component of an empty section; None if the section must name one.
        several: whether a list of sections may stand in place of one.
    """

    registry: Registry[Any]
    key: str
    default: str | None
    several: bool = False

    def settings_of(self, section: Mapping[str, Any]) -> type[BaseModel] | None:
        """Return the settings class of the component that a section names; None if there is no such component."""
        name = str(section.get(self.key, self.default))
        settings: type[BaseModel] | None = self.registry[name].settings if name in self.registry else None
        return settings

    @property
    def choices(self) -> tuple[type[BaseModel], ...]:
        """The settings classes of all components."""
        return tuple(self.registry[name].settings for name in self.registry)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        dump = core_schema.plain_serializer_function_ser_schema(
            lambda value, info: value.model_dump(mode=info.mode), info_arg=True
        )
        section = core_schema.no_info_plain_validator_function(self._parse, serialization=dump)
        if not self.several:
            return section
        # Words that are no field of any section: pydantic adds them to the location of an error.
        choices: dict[Any, CoreSchema] = {
            "<section>": section,
            "<list>": core_schema.tuple_schema([section], variadic_item_index=0, min_length=1, strict=False),
        }
        return core_schema.tagged_union_schema(
            choices, _form, custom_error_type="form", custom_error_message="expected a mapping or a list"
        )

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        section: dict[str, Any] = {"anyOf": [handler(choice.__pydantic_core_schema__) for choice in self.choices]}
        if not self.several:
            return section
        return {"anyOf": [*section["anyOf"], {"type": "array", "minItems": 1, "items": section}]}

    def _parse(self, value: Any) -> BaseModel:
        if isinstance(value, BaseModel):
            return value
        if not isinstance(value, dict):
            raise ValueError(f"expected a mapping, got {value!r}")
        if self.key not in value and self.default is None:
            raise self._error("missing", value)
        if self.key not in value and value:
            raise ValueError(f"has settings and no {self.key}; allowed: {', '.join(self.registry.names)}")
        if (settings := self.settings_of(value)) is None:
            unknown = UnknownComponentError(self.registry.kind, str(value[self.key]), self.registry.names)
            raise self._error("value_error", value[self.key], error=unknown)
        return settings.model_validate({self.key: self.default, **value})

    def _error(self, kind: Literal["missing", "value_error"], given: Any, **context: Any) -> ValidationError:
        """Return an error placed at the field that names the component."""
        details = InitErrorDetails(type=kind, loc=(self.key,), input=given, ctx=context)
        return ValidationError.from_exception_data(self.registry.kind, [details])


def _form(value: Any) -> str | None:
    """Return whether a value is a section or a list of sections; None if it is neither."""
    if isinstance(value, (list, tuple)):
        return "<list>"
    return "<section>" if isinstance(value, (dict, BaseModel)) else None
