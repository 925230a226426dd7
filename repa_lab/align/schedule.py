"""The weight of a regularizer as a function of the step."""

from __future__ import annotations

import itertools
import math
from typing import Any, Self

from repa_lab.align.settings import RegularizerSettings, ScheduleSettings


class Schedule:
    """The weight at a step: a linear warm-up from 0, a decay from ``weight`` to ``end``, and 0 from ``cutoff_step`` on.

    Args:
        weight: the weight after the warm-up (SimpleTuner's lambda).
        total_steps: the length of the training, where a decay without ``decay_steps`` ends.
        settings: the shape of the schedule.
        shape: the same, by keyword: fields of :class:`ScheduleSettings`.

    Raises:
        ValidationError: an unknown type, a negative number, or a decay that ends before the warm-up.
        ValueError: the weight is negative, or a decay has no end.
    """

    def __init__(
        self,
        weight: float = 0.5,
        total_steps: int | None = None,
        settings: ScheduleSettings | None = None,
        **shape: Any,
    ) -> None:
        self.weight, self.shape = weight, settings or ScheduleSettings.model_validate(shape)
        if not weight >= 0:
            raise ValueError(f"the weight must not be negative, got {weight}")
        if self.shape.type != "constant" and not self.shape.decay_steps and total_steps is None:
            raise ValueError(f"a {self.shape.type} schedule needs decay_steps, the step at which it ends")
        self.decay_end = self.shape.decay_steps or total_steps or 0

    @classmethod
    def of(cls, settings: RegularizerSettings, total_steps: int | None = None) -> Self:
        """Return the schedule of a regularizer's settings."""
        return cls(settings.weight, total_steps, settings.schedule)

    def __call__(self, step: int) -> float:
        """Return the weight at ``step``, the number of optimizer steps already taken."""
        shape, start, end = self.shape, self.weight, self.shape.end
        if shape.cutoff_step and step >= shape.cutoff_step:
            return 0.0
        if step < shape.warmup_steps:
            return start * step / shape.warmup_steps
        if shape.type == "constant":
            return start
        progress = min((step - shape.warmup_steps) / max(self.decay_end - shape.warmup_steps, 1), 1.0)
        if shape.type == "linear":
            return start + (end - start) * progress
        if shape.type == "cosine":
            return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2
        decayed: float = end + (start - end) * (1 - progress) ** shape.power
        return decayed

    @property
    def bends(self) -> set[int]:
        """The steps at which the formula of the weight changes."""
        decay = () if self.shape.type == "constant" else (self.decay_end,)
        return {0, self.shape.warmup_steps, *decay, self.shape.cutoff_step or 0}

    def formula(self, step: int) -> tuple[object, ...]:
        """Return a key of the weight's formula from ``step`` to the next bend; equal keys give equal weights."""
        shape = self.shape
        if (shape.cutoff_step and step >= shape.cutoff_step) or step >= max(shape.warmup_steps, self.decay_end):
            return (self(step),)
        if step < shape.warmup_steps:
            return ("warmup", self.weight, shape.warmup_steps)
        if shape.type == "constant":
            return (self(step),)
        return (shape.type, self.weight, shape.end, shape.warmup_steps, self.decay_end, shape.power)


def agreement(one: Schedule, other: Schedule, steps: int) -> int:
    """Return the first step, up to ``steps``, at which two schedules have different weights; ``steps`` if none has."""
    bends = sorted({bend for bend in one.bends | other.bends if bend < steps} | {steps})
    for start, end in itertools.pairwise(bends):
        if one.formula(start) != other.formula(start):
            differing = next((step for step in range(start, end) if one(step) != other(step)), None)
            if differing is not None:
                return differing
    return steps
