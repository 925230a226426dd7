"""The weight of the regularizer as a function of the step."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

from repa_lab.align.settings import RegularizerSettings, ScheduleSettings

# Each takes the start weight, the end weight, the progress u in [0, 1] and the power.
SHAPES: dict[str, Callable[[float, float, float, float], float]] = {
    "constant": lambda start, end, u, power: start,
    "linear": lambda start, end, u, power: start + (end - start) * u,
    "cosine": lambda start, end, u, power: end + (start - end) * (1 + math.cos(math.pi * u)) / 2,
    "polynomial": lambda start, end, u, power: end + (start - end) * (1 - u) ** power,
}


class Schedule:
    """The weight at a step: linear warm-up from 0, then a decay from ``weight`` to ``end``, then 0 from ``cutoff_step``
    on.

    Args:
        weight: the weight after warm-up (SimpleTuner's lambda).
        total_steps: the length of the training, where a decay without ``decay_steps`` ends.
        shape: fields of :class:`ScheduleSettings` by keyword.

    Raises:
        ValidationError: an unknown type, a negative number, or a decay that ends before the warm-up.
        ValueError: the weight is negative, or a decay has no end.
    """

    def __init__(self, weight: float = 0.5, total_steps: int | None = None, **shape: Any) -> None:
        self._set(weight, ScheduleSettings.model_validate(shape), total_steps)

    @classmethod
    def of(cls, settings: RegularizerSettings, total_steps: int | None = None) -> Schedule:
        """Return the schedule of a regularizer's settings."""
        schedule = cls.__new__(cls)
        schedule._set(settings.weight, settings.schedule, total_steps)
        return schedule

    def _set(self, weight: float, shape: ScheduleSettings, total_steps: int | None) -> None:
        if not weight >= 0:
            raise ValueError(f"the weight must not be negative, got {weight}")
        if shape.type != "constant" and not shape.decay_steps and total_steps is None:
            raise ValueError(f"a {shape.type} schedule needs decay_steps, the step at which it ends")
        self.weight, self.shape = weight, shape
        self.decay_end = shape.decay_steps or total_steps or 0

    def __call__(self, step: int) -> float:
        """Return the weight at ``step``, the number of optimizer steps already taken."""
        if self.shape.cutoff_step and step >= self.shape.cutoff_step:
            return 0.0
        if step < self.shape.warmup_steps:
            return self.weight * step / self.shape.warmup_steps
        span = max(self.decay_end - self.shape.warmup_steps, 1)
        progress = min((step - self.shape.warmup_steps) / span, 1.0)
        return SHAPES[self.shape.type](self.weight, self.shape.end, progress, self.shape.power)

    @property
    def bends(self) -> set[int]:
        """The steps at which the weight begins to follow another formula."""
        decay = () if self.shape.type == "constant" else (self.decay_end,)
        return {0, self.shape.warmup_steps, *decay, self.shape.cutoff_step or 0}

    def formula(self, step: int) -> tuple[object, ...]:
        """What the weight follows at ``step`` and until the next bend: the same formula gives the same weights."""
        decays = self.shape.type != "constant" and self.shape.warmup_steps <= step < self.decay_end
        if (self.shape.cutoff_step and step >= self.shape.cutoff_step) or not (
            step < self.shape.warmup_steps or decays
        ):
            return (self(step),)
        if step < self.shape.warmup_steps:
            return ("warmup", self.weight, self.shape.warmup_steps)
        return (self.shape.type, self.weight, self.shape.end, self.shape.warmup_steps, self.decay_end, self.shape.power)


def agreement(one: Schedule, other: Schedule, steps: int) -> int:
    """The first step, up to ``steps``, at which two schedules have different weights; ``steps`` if there is none."""
    bends = sorted({bend for bend in one.bends | other.bends if bend < steps} | {steps})
    for start, end in itertools.pairwise(bends):
        if one.formula(start) != other.formula(start):
            differing = next((step for step in range(start, end) if one(step) != other(step)), None)
            if differing is not None:
                return differing
    return steps
