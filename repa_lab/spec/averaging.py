"""The averaged weights of a run: their decay at every step, and what is left in them of the initial weights."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import AfterValidator, Field

from repa_lab.settings import Settings

Decay = Annotated[float, Field(ge=0, lt=1)]
_NEGLIGIBLE_SHARE = 0.05


class EmaConfig(Settings):
    """The exponential moving average of the weights: ``decay * average + (1 - decay) * weights`` after every step.

    Attributes are the fields of ``train.ema``; a number in their place is the decay.
    """

    decay: Decay = 0.9999
    """What an update keeps of the average."""
    warmup: bool = False
    """Keep at most `(1 + n) / (10 + n)` after `n` updates, so that short runs forget their initial weights."""

    def decay_at(self, updates: int) -> float:
        """Return the decay of the update that follows ``updates`` earlier ones."""
        return min(self.decay, (1 + updates) / (10 + updates)) if self.warmup else self.decay

    def initial_share(self, steps: int) -> float:
        """Return the share of the initial weights in the average after ``steps`` updates: the product of their decays."""
        return math.prod(self.decay_at(n) for n in range(steps)) if self.warmup else self.decay**steps

    def warning(self, steps: int) -> str | None:
        """Return a sentence on the initial weights in the average after ``steps`` updates; None if they are below 5 %."""
        share = self.initial_share(steps)
        if share <= _NEGLIGIBLE_SHARE:
            return None
        return (
            f"train.ema: at decay {self.decay:g} the measured average still holds {100 * share:.0f} % of the initial weights "
            f"after {steps:,} steps; set train.ema.warmup, or lower the decay"
        )


def _simplest(ema: float | EmaConfig) -> float | EmaConfig:
    return ema.decay if isinstance(ema, EmaConfig) and not ema.warmup else ema


# Without a warm-up the section and its decay alone are one setting, which is kept as the number.
Ema = Annotated[Decay | EmaConfig, AfterValidator(_simplest)]
