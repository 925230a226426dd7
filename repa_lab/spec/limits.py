"""What a sweep may cost at most, and what ends its runs early. Neither is part of a run's identity."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import model_validator

from repa_lab.settings import Count, NotNegative, Settings


class BudgetConfig(Settings):
    """What a sweep may cost at most."""

    gpu_hours: NotNegative | None = None
    """A sweep that would take more is refused before it starts; null is no limit."""
    disk_gib: NotNegative | None = None
    """GiB of disk; a sweep that would take more is refused."""


class StopRule(Settings):
    """Ends a run once a measured ``metric`` is ``below`` or ``above`` a value, from step ``after`` on.

    A run that was ended is as good as done for the sweep that has the rule. A sweep without the rule takes it up where
    it stopped, for the rule is not part of the run's identity.
    """

    metric: str = "frechet"
    """By its kind or full name."""
    below: float | None = None
    """Ends the run once the metric is below; give exactly one of the two."""
    above: float | None = None
    """Ends the run once the metric is above."""
    after: Count = 0
    """The rule is not asked before this step."""

    @model_validator(mode="after")
    def _one_side(self) -> StopRule:
        if (self.below is None) == (self.above is None):
            raise ValueError("give exactly one of below, above")
        return self

    def holds(self, row: Mapping[str, Any]) -> bool:
        """Whether a row of measurements by full name, with the ``step`` they were made at, ends the run."""
        value = row.get(self.metric)
        if value is None or row["step"] < self.after:
            return False
        return bool(value < self.below if self.below is not None else value > self.above)
