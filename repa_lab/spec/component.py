"""A section of a spec whose fields are those of the component that it names, built-in or from a plugin."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from pydantic import BaseModel, GetCoreSchemaHandler, GetJsonSchemaHandler, ValidationError
from pydantic_core import CoreSchema, InitErrorDetails, core_schema

from repa_lab.align.settings import REGULARIZERS
from repa_lab.data.settings import SOURCES
from repa_lab.registry import Registry, UnknownComponentError


class HasSettings(Protocol):
    """A component with settings."""

    @property
    def settings(self) -> type[BaseModel]:
        """Its settings class."""
        ...


@dataclass(frozen=True)
class NamedBy:
    """Marks a section whose field ``key`` names a component of a registry, whose settings the section then is.

    Attributes:
        registry: the components.
        key: the field that names one.
        default: the component where the field is left out.
    """

    registry: Registry[Any]
    key: str
    default: str | None

    def settings_of(self, section: Mapping[str, Any]) -> type[BaseModel] | None:
        """Return the settings class that a section names; None where there is no such component."""
        try:
            component: HasSettings = self.registry[str(section.get(self.key, self.default))]
        except UnknownComponentError:
            return None
        return component.settings

    @property
    def choices(self) -> tuple[type[BaseModel], ...]:
        """The settings classes of all components."""
        return tuple(self.registry[name].settings for name in self.registry)

    def _error(self, kind: Literal["missing", "value_error"], given: Any, **context: Any) -> ValidationError:
        """Return an error that stands at the field that names the component."""
        details = InitErrorDetails(type=kind, loc=(self.key,), input=given, ctx=context)
        return ValidationError.from_exception_data(self.registry.kind, [details])

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        def parse(value: Any) -> BaseModel:
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

        dump = core_schema.plain_serializer_function_ser_schema(
            lambda value, info: value.model_dump(mode=info.mode), info_arg=True
        )
        return core_schema.no_info_plain_validator_function(parse, serialization=dump)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"anyOf": [handler(choice.__pydantic_core_schema__) for choice in self.choices]}


# The sections whose fields are those of a component.
COMPONENTS = {"regularizer": NamedBy(REGULARIZERS, "type", "none"), "data": NamedBy(SOURCES, "source", None)}
