"""Evenly spaced values of an axis, as a person would have listed them: 0.3, where floating point says 0.30000000000000004."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Annotated, Any

from pydantic import BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator

from repa_lab.settings import Settings
from repa_lab.spec.validate import shortened

MAX_VALUES = 10_000
Number = int | float
_DIGITS = 6  # of a value that no short decimal is, such as 10 ** 0.5: its label is the value, so it can be typed again


def _arithmetic(numbers: Sequence[Number]) -> list[Number]:
    """``[start, stop, step]``; stop is among them if it falls on a step.

    Raises:
        ValueError: the step does not lead to stop, or there are too many.
    """
    start, stop, step = _decimals(numbers)
    if step == 0 or (stop - start) / step < 0:
        raise ValueError(f"the step {numbers[2]} does not lead from {numbers[0]} to {numbers[1]}")
    count = math.floor((stop - start) / step) + 1
    if count > MAX_VALUES:
        raise ValueError(f"{count:,} values; at most {MAX_VALUES:,}")
    return _spelled([start + index * step for index in range(count)], numbers)


def _linear(numbers: Sequence[Number]) -> list[Number]:
    """``[start, stop, count]``, both ends included.

    Raises:
        ValueError: there are fewer than two values, too many, or the ends are equal.
    """
    start, stop, _ = _decimals(numbers)
    last = _count(numbers) - 1
    return _spelled([start + (stop - start) * index / last for index in range(last + 1)], numbers)


def _geometric(numbers: Sequence[Number]) -> list[Number]:
    """``[start, stop, count]`` in equal ratios, both ends included.

    Raises:
        ValueError: as for :func:`_linear`, or an end is not above 0.
    """
    if min(numbers[:2]) <= 0:
        raise ValueError(f"a logspace starts and stops above 0, got {numbers}")
    start, stop, _ = _decimals(numbers)
    last = _count(numbers) - 1
    return _spelled([start * (stop / start) ** (Decimal(index) / last) for index in range(last + 1)], numbers)


def _count(numbers: Sequence[Number]) -> int:
    count = numbers[2]
    if not isinstance(count, int) or not 2 <= count <= MAX_VALUES:
        raise ValueError(f"the count is an integer from 2 to {MAX_VALUES:,}, got {count}")
    if numbers[0] == numbers[1]:
        raise ValueError(f"start and stop must differ, got {numbers}")
    return count


def _decimals(numbers: Sequence[Number]) -> list[Decimal]:
    """What numbers in a file say: 0.1 is a tenth, not the float next to it."""
    return [Decimal(repr(number)) for number in numbers]


def _spelled(values: list[Decimal], given: Sequence[Number]) -> list[Number]:
    """The values as numbers of a file: integers where all that was given are, short decimals exactly, and others
    rounded to as few digits, six or more, as tell them apart."""
    are_integers = all(isinstance(number, int) for number in given)
    for digits in range(_DIGITS, 18):
        spelled = [_spell(value, are_integers, digits) for value in values]
        if len(set(spelled)) == len(values):
            return spelled
    raise ValueError(f"the values are too close to tell apart, got {list(given)}")


def _spell(value: Decimal, are_integers: bool, digits: int) -> Number:
    exact = Decimal(f"{value:.24g}")  # without the error of the last of 28 digits
    if are_integers and exact == int(exact):
        return int(exact)
    near = float(exact)
    return near if Decimal(repr(near)) == exact else float(f"{near:.{digits}g}")


FORMS: dict[str, Callable[[Sequence[Number]], list[Number]]] = {
    "range": _arithmetic,
    "linspace": _linear,
    "logspace": _geometric,
}
# What the search calls its ranges, which are easily written here.
_SEARCHED = ("log", "uniform", "int", "choice")


def _triple(form: str) -> BeforeValidator:
    """Checks three numbers as a whole, so that what is wrong is told where the form stands."""
    last = "step" if form == "range" else "count"

    def check(given: Any) -> Any:
        numbers = given if isinstance(given, list) else []
        if len(numbers) != 3 or not all(isinstance(n, int | float) and not isinstance(n, bool) for n in numbers):
            raise ValueError(f"expected three numbers, [start, stop, {last}], got {shortened(given)}")
        if not all(map(math.isfinite, numbers)):
            raise ValueError(f"expected finite numbers, got {shortened(given)}")
        FORMS[form](numbers)
        return given

    return BeforeValidator(check)


_Three = Annotated[list[Number], Field(min_length=3, max_length=3)]


class RangeConfig(Settings):
    """Evenly spaced values, exactly one of ``range`` [start, stop, step] (stop is included where it falls on a step),
    ``linspace`` [start, stop, count] and ``logspace`` [start, stop, count] (in equal ratios); both ends are
    included."""

    model_config = ConfigDict(json_schema_extra={"minProperties": 1, "maxProperties": 1})

    range: Annotated[_Three, _triple("range")] | None = None
    linspace: Annotated[_Three, _triple("linspace")] | None = None
    logspace: Annotated[_Three, _triple("logspace")] | None = None

    @model_validator(mode="after")
    def _one_form(self) -> RangeConfig:
        if sum(getattr(self, form) is not None for form in FORMS) != 1:
            raise ValueError(f"give exactly one of {', '.join(FORMS)}")
        return self

    @property
    def form(self) -> str:
        """Which of the three is given."""
        return next(form for form in FORMS if getattr(self, form) is not None)

    @property
    def values(self) -> list[Number]:
        """The values in order."""
        return FORMS[self.form](getattr(self, self.form))


def is_range(value: Any) -> bool:
    """Whether an axis that is a mapping means a range: what stands at a level of a named axis is settings or nothing."""
    if isinstance(value, RangeConfig):
        return True
    given = value.items() if isinstance(value, dict) else ()
    return any(_means_form(key) and not isinstance(inner, dict | None) for key, inner in given)


def _means_form(key: str) -> bool:
    return key in _SEARCHED or bool(difflib.get_close_matches(key, FORMS, n=1))


Values = Annotated[list[Any], Field(min_length=1)]
Levels = Annotated[dict[Annotated[str, Field(min_length=1)], dict[str, Any] | None], Field(min_length=1)]
# Tags that can be no keys of a mapping, for they appear in the paths of pydantic's errors.
RangeOrLevels = Annotated[
    Annotated[RangeConfig, Tag("\0range")] | Annotated[Levels, Tag("\0levels")],
    Discriminator(lambda value: "\0range" if is_range(value) else "\0levels"),
]
