"""Uncertainty over seeds: Student-t intervals, differences paired by seed, and steps to reach a value.

Arms of one sweep share their seeds: seed k sees the same data, noise and initialisation streams in every arm. What a
seed adds to both arms cancels in their difference, so differences are taken seed by seed before anything is averaged.
The interval is Student's t: it keeps its coverage at three seeds, where the bootstrap and 1.96 standard errors do not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import stdtrit

Goal = Literal["min", "max"]
Curve = Mapping[int, float]
MIN_SEEDS = 3


@dataclass(frozen=True)
class Estimate:
    """A mean over ``n`` values with its interval; ``low`` and ``high`` are NaN for fewer than two values."""

    n: int
    mean: float
    low: float
    high: float

    def excludes(self, value: float) -> bool:
        """Whether the interval exists and does not contain ``value``."""
        return self.low > value or self.high < value


@dataclass(frozen=True)
class PairedDifference:
    """An arm minus its baseline, seed by seed.

    Attributes:
        difference: of the metric, in its units.
        baseline_mean: over the paired seeds only, so ``baseline_mean + difference.mean`` is the arm's mean over them.
        seeds: the seeds both have, ascending.
    """

    difference: Estimate
    baseline_mean: float
    seeds: tuple[int, ...]

    @property
    def relative(self) -> float:
        """The mean difference as a fraction of the baseline's mean; NaN if there are no pairs or that mean is 0."""
        return self.difference.mean / self.baseline_mean if self.baseline_mean else math.nan

    @property
    def is_resolved(self) -> bool:
        """Whether at least three seeds were paired and the interval excludes 0; fewer are too few to conclude."""
        return self.difference.n >= MIN_SEEDS and self.difference.excludes(0.0)


@dataclass(frozen=True)
class Speedup:
    """How much sooner an arm reaches what its baseline ends with.

    Attributes:
        ratio: the baseline's steps over the arm's, above 1 is sooner; over the seeds that reached it.
        steps: the arm's mean steps over those seeds.
        reached: how many seeds reached it; below ``n``, ``ratio`` flatters, for the others' ratios are unknown.
        n: how many seeds both arms have.
    """

    ratio: Estimate
    steps: float
    reached: int
    n: int


def mean_interval(values: Iterable[float], level: float = 0.95) -> Estimate:
    """The mean and its two-sided Student-t interval; values that are not finite are left out, ``n`` counts the rest.

    Args:
        values: one per seed, independent of each other.
        level: coverage of the interval, between 0 and 1.
    """
    kept = [float(value) for value in values if math.isfinite(value)]
    n = len(kept)
    if n < 2:
        return Estimate(n, kept[0] if kept else math.nan, math.nan, math.nan)
    mean = float(np.mean(kept))
    half = float(stdtrit(n - 1, 0.5 + level / 2)) * float(np.std(kept, ddof=1)) / math.sqrt(n)
    return Estimate(n, mean, mean - half, mean + half)


def paired_difference(arm: Mapping[int, float], baseline: Mapping[int, float], level: float = 0.95) -> PairedDifference:
    """Arm minus baseline over the seeds that have a finite value in both.

    Args:
        arm: value by seed.
        baseline: value by seed, measured at the same step under the same protocol.
        level: coverage of the interval.
    """
    seeds = tuple(sorted(_finite(arm).keys() & _finite(baseline).keys()))
    difference = mean_interval((arm[seed] - baseline[seed] for seed in seeds), level)
    return PairedDifference(difference, mean_interval(baseline[seed] for seed in seeds).mean, seeds)


def steps_to_reach(curve: Curve, target: float, goal: Goal = "min") -> float | None:
    """The first step at which the curve is at or beyond ``target``, interpolated linearly between measurements.

    A curve that is there at its first measurement gives that step: what came before was not measured. Measurements that
    are not finite are left out.

    Returns:
        Optimizer steps, or None if the target was never reached.
    """
    sign = 1.0 if goal == "min" else -1.0
    before: tuple[int, float] | None = None
    for step, value in sorted(_finite(curve).items()):
        excess = sign * (value - target)
        if excess <= 0:
            return float(step) if before is None else _crossing(before, (step, excess))
        before = (step, excess)
    return None


def speedup(arm: Mapping[int, Curve], baseline: Mapping[int, Curve], goal: Goal = "min", level: float = 0.95) -> Speedup | None:
    """Compare, seed by seed, when the arm and when the baseline first reach the value the baseline ends with.

    The baseline's own first crossing counts, not the end of its training: on a noisy curve it may have been there
    earlier, and an arm compared with itself must give 1.

    Args:
        arm: curve by seed.
        baseline: curve by seed, of the same metric.
        goal: whether small or large values are good.
        level: coverage of the interval of the ratio.

    Returns:
        None if no seed has both curves.
    """
    pairs = [(_trained(arm[seed]), _trained(baseline[seed])) for seed in sorted(arm.keys() & baseline.keys())]
    pairs = [(own, other) for own, other in pairs if own and other]
    if not pairs:
        return None
    reached = [(steps_to_reach(own, _final(other), goal), _own_steps(other, goal)) for own, other in pairs]
    steps = [(own, other) for own, other in reached if own is not None]
    ratio = mean_interval((other / own for own, other in steps), level)
    return Speedup(ratio, mean_interval(own for own, _ in steps).mean, len(steps), len(pairs))


def _own_steps(baseline: Curve, goal: Goal) -> float:
    steps = steps_to_reach(baseline, _final(baseline), goal)
    assert steps is not None  # a curve reaches its own last value
    return steps


def _final(curve: Curve) -> float:
    return curve[max(curve)]


def _trained(curve: Curve) -> dict[int, float]:
    """The finite measurements after the first step: a ratio of steps has no use for step 0."""
    return {step: value for step, value in _finite(curve).items() if step > 0}


def _finite(values: Mapping[int, float]) -> dict[int, float]:
    return {key: value for key, value in values.items() if math.isfinite(value)}


def _crossing(above: tuple[int, float], below: tuple[int, float]) -> float:
    (start, excess), (end, deficit) = above, below
    return start + (end - start) * excess / (excess - deficit)
