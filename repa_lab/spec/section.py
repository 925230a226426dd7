"""What every section of a spec is: fixed once read, strict about types, and without fields that nobody knows."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
NotNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
BlockIndex = Annotated[int, Field(ge=0)] | Literal["mid"]
# A list in a file, a tuple here: settings are keys of mappings, so all of them must be hashable.
AS_TUPLE = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)


class Section(BaseModel):
    """A section of a spec."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


def later(neutral: Any, **limits: Any) -> Any:
    """A field that came after runs were identified without it: at its neutral value, a run's id is what it was before."""
    return Field(default=neutral, json_schema_extra={"neutral": True}, **limits)
