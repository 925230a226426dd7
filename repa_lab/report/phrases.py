"""Numbers and lists as a report writes them."""

from __future__ import annotations

import math
from collections.abc import Sequence

NONE = "n/a"


def decimals(*values: float, digits: int = 4) -> int:
    """How many decimals show ``digits`` significant digits of the largest value, and at most six."""
    largest = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
    magnitude = math.floor(math.log10(largest)) if largest > 0 else 0
    return min(max(digits - 1 - magnitude, 0), 6)


def interval(low: float, high: float, places: int) -> str:
    """``[low, high]`` with so many decimals."""
    return f"[{low:.{places}f}, {high:.{places}f}]"


def number(value: float, places: int, sign: str = "") -> str:
    """A value with so many decimals; ``n/a`` for NaN."""
    return NONE if math.isnan(value) else f"{value:{sign}.{places}f}"


def significant(value: float | None, digits: int = 3) -> str:
    """A value of any magnitude with so many significant digits, such as ``12,800``, ``0.00353`` or ``1.31e+11``."""
    if value is None or math.isnan(value):
        return NONE
    if value == 0:
        return "0"
    if not 1e-4 <= abs(value) < 1e7:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{decimals(value, digits=digits)}f}"


def p_value(p: float) -> str:
    """``0.011``, ``<0.001`` or ``n/a``."""
    if math.isnan(p):
        return NONE
    return "<0.001" if p < 0.001 else f"{p:.{2 if p >= 0.1 else 3}f}"


def seeds(n: int) -> str:
    """``1 seed``, ``2 seeds``."""
    return f"{n} seed" if n == 1 else f"{n} seeds"


def listed(labels: Sequence[str], most: int = 4) -> str:
    """The first few of them."""
    more = f" and {len(labels) - most} more" if len(labels) > most else ""
    return " / ".join(labels[:most]) + more
