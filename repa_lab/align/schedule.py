"""The weight of the regularizer as a function of the step."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

# Each takes the start weight, the end weight, the progress u in [0, 1] and the power.
SHAPES: dict[str, Callable[[float, float, float, float], float]] = {
    "constant": lambda start, end, u, power: start,
    "linear": lambda start, end, u, power: start + (end - start) * u,
    "cosine": lambda start, end, u, power: end + (start - end) * (1 + math.cos(math.pi * u)) / 2,
    "polynomial": lambda start, end, u, power: end + (start - end) * (1 - u) ** power,
}


@dataclass(frozen=True)
class Schedule:
    """Weight at a step: linear warm-up from 0, then a decay from ``weight`` to ``end``, then 0 from ``cutoff_step`` on.

    Args:
        type: ``constant``, ``linear``, ``cosine`` or ``polynomial`` (with ``power``).
        weight: the weight after warm-up (the guide's lambda).
        end: the weight at the end of the decay and after it.
        warmup_steps: the weight rises linearly over these steps; at step 0 it is exactly 0 if there are any.
        decay_steps: the absolute step at which the decay ends, counted from 0 and warm-up included; 0 means ``total_steps``.
        cutoff_step: the weight is exactly 0 from this step on; ``None`` or 0 means never.
        power: the exponent of ``polynomial``.
        total_steps: the length of the training; needed by a decay whose ``decay_steps`` is 0.

    Raises:
        ValueError: an unknown type, a negative number, or a decay with no end or with one before that of the warm-up.
    """

    type: str = "constant"
    weight: float = 0.5
    end: float = 0.0
    warmup_steps: int = 0
    decay_steps: int = 0
    cutoff_step: int | None = None
    power: float = 1.0
    total_steps: int | None = None

    def __post_init__(self) -> None:
        if self.type not in SHAPES:
            raise ValueError(f"unknown schedule type {self.type!r}; allowed: {', '.join(SHAPES)}")
        for name in ("weight", "end", "warmup_steps", "decay_steps", "cutoff_step", "power"):
            if not (getattr(self, name) or 0) >= 0:
                raise ValueError(f"schedule {name} must not be negative, got {getattr(self, name)}")
        if self.type != "constant" and not self.decay_steps and self.total_steps is None:
            raise ValueError(f"a {self.type} schedule needs decay_steps or total_steps to know where it ends")
        if self.type != "constant" and 0 < self.decay_steps <= self.warmup_steps:
            raise ValueError("decay_steps is counted from step 0, so it must be more than warmup_steps")

    def __call__(self, step: int) -> float:
        """The weight at ``step``, the number of optimizer steps already taken."""
        if self.cutoff_step and step >= self.cutoff_step:
            return 0.0
        if step < self.warmup_steps:
            return self.weight * step / self.warmup_steps
        span = max(self.decay_end - self.warmup_steps, 1)
        progress = min((step - self.warmup_steps) / span, 1.0)
        return SHAPES[self.type](self.weight, self.end, progress, self.power)

    @property
    def decay_end(self) -> int:
        """The step at which the decay ends; 0 where nothing says so."""
        return self.decay_steps or self.total_steps or 0

    @property
    def bends(self) -> set[int]:
        """The steps at which the weight begins to follow another formula."""
        decay = () if self.type == "constant" else (self.decay_end,)
        return {0, self.warmup_steps, *decay, self.cutoff_step or 0}

    def formula(self, step: int) -> tuple[object, ...]:
        """What the weight follows at ``step`` and until the next bend: the same formula gives the same weights."""
        decays = self.type != "constant" and self.warmup_steps <= step < self.decay_end
        if (self.cutoff_step and step >= self.cutoff_step) or not (step < self.warmup_steps or decays):
            return (self(step),)
        if step < self.warmup_steps:
            return ("warmup", self.weight, self.warmup_steps)
        return (self.type, self.weight, self.end, self.warmup_steps, self.decay_end, self.power)


def agreement(one: Schedule, other: Schedule, steps: int) -> int:
    """The first step, up to ``steps``, at which two schedules have different weights; ``steps`` if there is none."""
    bends = sorted({bend for bend in one.bends | other.bends if bend < steps} | {steps})
    for start, end in itertools.pairwise(bends):
        if one.formula(start) != other.formula(start):
            differing = next((step for step in range(start, end) if one(step) != other(step)), None)
            if differing is not None:
                return differing
    return steps
