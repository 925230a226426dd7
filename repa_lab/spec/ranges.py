"""Ranges of values on an axis, as a person would list them: 0.3, not floating point's 0.30000000000000004."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from decimal import Decimal
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator

from repa_lab.settings import Settings
from repa_lab.spec.errors import shortened

MAX_VALUES = 10_000
FORMS = ("range", "linspace", "logspace")
# The forms of a search, which are easily written here by mistake.
_SEARCH_FORMS = ("log", "uniform", "int", "choice")
# Digits of a value that is no short decimal, such as 10 ** 0.5; its label is the value, so it can be typed again.
_DIGITS = 6
Number = int | float


def values_of(form: str, numbers: Sequence[Number]) -> list[Number]:
    """Return the values of a range.

    Args:
        form: ``range`` for [start, stop, step], ``linspace`` or ``logspace`` for [start, stop, count].

    Raises:
        ValueError: the numbers make no range, or a range of too many values.
    """
    start, stop, step = (Decimal(repr(number)) for number in numbers)  # 0.1 is a tenth, not the float next to it
    if form == "range":
        if step == 0 or (stop - start) / step < 0:
            raise ValueError(f"the step {numbers[2]} does not lead from {numbers[0]} to {numbers[1]}")
        count = math.floor((stop - start) / step) + 1
        if count > MAX_VALUES:
            raise ValueError(f"{count:,} values; at most {MAX_VALUES:,}")
        return _rounded([start + index * step for index in range(count)], numbers)
    if form == "logspace" and min(start, stop) <= 0:
        raise ValueError(f"a logspace starts and stops above 0, got {numbers}")
    if not isinstance(numbers[2], int) or not 2 <= numbers[2] <= MAX_VALUES:
        raise ValueError(f"the count is an integer from 2 to {MAX_VALUES:,}, got {numbers[2]}")
    if start == stop:
        raise ValueError(f"start and stop must differ, got {numbers}")
    last = numbers[2] - 1
    if form == "linspace":
        return _rounded([start + (stop - start) * index / last for index in range(last + 1)], numbers)
    return _rounded([start * (stop / start) ** (Decimal(index) / last) for index in range(last + 1)], numbers)


def _rounded(values: list[Decimal], given: Sequence[Number]) -> list[Number]:
    """Return values as a file has them: exact if short, else with as few digits, six or more, as tell them apart."""
    are_integers = all(isinstance(number, int) for number in given)
    for digits in range(_DIGITS, 18):
        numbers = [_number(value, are_integers, digits) for value in values]
        if len(set(numbers)) == len(values):
            return numbers
    raise ValueError(f"the values are too close to tell apart, got {list(given)}")


def _number(value: Decimal, may_be_integer: bool, digits: int) -> Number:
    exact = Decimal(f"{value:.24g}")  # without the error in the last of 28 digits
    if may_be_integer and exact == int(exact):
        return int(exact)
    near = float(exact)
    return near if Decimal(repr(near)) == exact else float(f"{near:.{digits}g}")


def _three_numbers(form: str) -> BeforeValidator:
    """Check three numbers together, so that a mistake is placed at the form."""
    last = "step" if form == "range" else "count"

    def check(given: Any) -> Any:
        numbers = given if isinstance(given, list) else []
        if len(numbers) != 3 or not all(isinstance(n, int | float) and not isinstance(n, bool) for n in numbers):
            raise ValueError(f"expected three numbers, [start, stop, {last}], got {shortened(given)}")
        if not all(map(math.isfinite, numbers)):
            raise ValueError(f"expected finite numbers, got {shortened(given)}")
        values_of(form, numbers)
        return given

    return BeforeValidator(check)


_Three = Annotated[list[Number], Field(min_length=3, max_length=3)]


class RangeConfig(Settings):
    """Evenly spaced values, exactly one of ``range`` [start, stop, step] (stop is included where it falls on a step),
    ``linspace`` [start, stop, count] and ``logspace`` [start, stop, count] (in equal ratios); both ends are
    included."""

    model_config = ConfigDict(json_schema_extra={"minProperties": 1, "maxProperties": 1})

    range: Annotated[_Three, _three_numbers("range")] | None = None
    linspace: Annotated[_Three, _three_numbers("linspace")] | None = None
    logspace: Annotated[_Three, _three_numbers("logspace")] | None = None

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if sum(getattr(self, form) is not None for form in FORMS) != 1:
            raise ValueError(f"give exactly one of {', '.join(FORMS)}")
        return self

    @property
    def form(self) -> str:
        """The form that is given."""
        return next(form for form in FORMS if getattr(self, form) is not None)

    @property
    def values(self) -> list[Number]:
        """The values in order."""
        return values_of(self.form, getattr(self, self.form))


def _tag(value: Any) -> str:
    """Return whether an axis that is a mapping is a range or has named levels: levels hold settings or nothing."""
    given = value.items() if isinstance(value, dict) else ()
    forms = (key for key, inner in given if not isinstance(inner, dict | None))
    is_range = any(key in _SEARCH_FORMS or difflib.get_close_matches(key, FORMS, n=1) for key in forms)
    return "\0range" if is_range or isinstance(value, RangeConfig) else "\0levels"


Values = Annotated[list[Any], Field(min_length=1)]
Levels = Annotated[dict[Annotated[str, Field(min_length=1)], dict[str, Any] | None], Field(min_length=1)]
# The tags appear in the paths of pydantic's errors, so they must not be keys of a mapping.
RangeOrLevels = Annotated[
    Annotated[RangeConfig, Tag("\0range")] | Annotated[Levels, Tag("\0levels")], Discriminator(_tag)
]
