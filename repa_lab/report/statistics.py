"""Uncertainty over seeds: Student-t intervals, differences paired by seed, several comparisons at once, and bands.

Arms of one sweep share their seeds: seed k sees the same data, noise and initialisation streams in every arm. What a
seed adds to both arms cancels in their difference, so differences are taken seed by seed before anything is averaged.
The interval is Student's t: it keeps its coverage at three seeds, where the bootstrap and 1.96 standard errors do not.
Ratios are averaged as their logarithms, so that no bound is below 0 and which arm stands below the line does not
matter.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, stdtr, stdtrit

Key = TypeVar("Key")
Goal = Literal["min", "max"]
# Value by progress.
Curve = Mapping[float, float]
Verdict = Literal["resolved", "not resolved", "insufficient"]
MIN_SEEDS = 3
MIN_BOOTSTRAP = 10
LEVEL = 0.95
_RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A mean over ``n`` values, of ratios the geometric one, with its interval, NaN for fewer than two values."""

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
        p_value: two-sided, of the paired t-test that the mean difference is 0; NaN for fewer than two pairs.
        correlation: Pearson's, between the arm's and the baseline's values over the seeds: near 1, pairing takes away
            most of what seeds add; below 0 it makes the interval wider. NaN for fewer than three pairs, where it says
            nothing.
    """

    difference: Estimate
    baseline_mean: float
    seeds: tuple[int, ...]
    p_value: float
    correlation: float

    @property
    def relative(self) -> float:
        """The mean difference over the size of the baseline's mean; NaN if there are no pairs or that mean is 0."""
        return self.difference.mean / abs(self.baseline_mean) if self.baseline_mean else math.nan

    @property
    def is_resolved(self) -> bool:
        """Whether it is resolved as the only comparison that is made; see :func:`holm` for several."""
        return verdict(self.difference.n, self.p_value) == "resolved"


@dataclass(frozen=True)
class Speedup:
    """How much sooner an arm reaches a value than its baseline.

    Attributes:
        ratio: the baseline's steps over the arm's, above 1 is sooner; over the seeds in which both reached it, as
            :func:`ratio_interval` has it.
        steps: the arm's mean steps over those seeds, in the unit of its curves.
        reached: in how many seeds both reached it; below ``n``, ``ratio`` speaks of those alone.
        n: how many seeds both arms have.
        early: in how many of the reached seeds a first measurement, the arm's or the baseline's, was there already.
            When it got there is then not known, only that it was by then.
    """

    ratio: Estimate
    steps: float
    reached: int
    n: int
    early: int = 0


def mean_interval(values: Iterable[float], level: float = LEVEL) -> Estimate:
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


def ratio_interval(ratios: Iterable[float], level: float = LEVEL) -> Estimate:
    """The geometric mean of ratios above 0 and its interval: Student's t of their logarithms, taken back.

    The t interval of the ratios themselves may reach below 0 where seeds are few, and their mean favours whichever side
    is above the line: of 2 and 1/2 it is 1.25, either way round. Here inverse ratios have the inverse mean and bounds.

    Args:
        ratios: one per seed, independent of each other.
        level: coverage of the interval, between 0 and 1.
    """
    found = mean_interval((math.log(ratio) for ratio in ratios), level)
    return Estimate(found.n, *(math.exp(value) for value in (found.mean, found.low, found.high)))


def bootstrap_interval(values: Iterable[float], level: float = LEVEL, resamples: int = _RESAMPLES) -> Estimate:
    """The mean and its bootstrap interval over seeds, which need not lie evenly about the mean; always the same
    resamples.

    It is the expanded percentile interval (Hesterberg, The American Statistician 69(4), 2015): the percentiles
    are widened so that the interval of normal values is nearly Student's, for plain percentiles are too narrow by
    ``sqrt((n - 1) / n)`` and by the normal quantile in place of t's.

    Args:
        values: one per seed; those that are not finite are left out.
        level: coverage of the interval, between 0 and 1.
        resamples: how many means are drawn.

    Returns:
        An estimate without an interval below :data:`MIN_BOOTSTRAP` values: resamples of few values are too much alike.
    """
    kept = np.array([value for value in values if math.isfinite(value)], dtype=np.float64)
    n = len(kept)
    if n < MIN_BOOTSTRAP:
        return Estimate(n, float(kept.mean()) if n else math.nan, math.nan, math.nan)
    drawn = np.random.default_rng(0).integers(0, n, (resamples, n))
    tail = float(ndtr(-math.sqrt(n / (n - 1)) * float(stdtrit(n - 1, 0.5 + level / 2))))
    low, high = np.quantile(kept[drawn].mean(axis=1), [tail, 1 - tail])
    return Estimate(n, float(kept.mean()), float(low), float(high))


def band(values: Iterable[float], level: float = LEVEL) -> Estimate:
    """The interval that a curve's band shows: a bootstrap's where there are seeds enough for one, else Student's t."""
    values = list(values)
    found = bootstrap_interval(values, level)
    return found if found.n >= MIN_BOOTSTRAP else mean_interval(values, level)


def paired_difference(
    arm: Mapping[int, float], baseline: Mapping[int, float], level: float = LEVEL
) -> PairedDifference:
    """Arm minus baseline over the seeds that have a finite value in both.

    Args:
        arm: value by seed.
        baseline: value by seed, measured at the same step under the same protocol.
        level: coverage of the interval.
    """
    seeds = tuple(sorted(finite(arm).keys() & finite(baseline).keys()))
    own, other = (np.array([values[seed] for seed in seeds], dtype=np.float64) for values in (arm, baseline))
    mean = float(other.mean()) if seeds else math.nan
    return PairedDifference(
        mean_interval(own - other, level), mean, seeds, _p_value(own - other), _correlation(own, other)
    )


def holm(p_values: Sequence[float], comparisons: int | None = None) -> list[float]:
    """P-values that hold for several comparisons at once, by Holm's step-down method (Scand. J. Statist. 6, 1979,
    65-70).

    Calling those below 0.05 differences keeps the chance of a single false one below 0.05, whatever the comparisons
    share, such as a baseline.

    Args:
        p_values: of single comparisons; NaN stands for one that cannot be made yet, and stays NaN.
        comparisons: how many there are to be made in all, whether or not they have a p-value; None is as many as given.

    Returns:
        In the order of ``p_values``.
    """
    adjusted, largest = [math.nan] * len(p_values), 0.0
    known = sorted((place for place, p in enumerate(p_values) if not math.isnan(p)), key=lambda place: p_values[place])
    total = len(p_values) if comparisons is None else max(comparisons, len(known))
    for rank, place in enumerate(known):
        largest = max(largest, min(1.0, (total - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted


def verdict(n: int, p_value: float) -> Verdict:
    """What may be said of a difference over ``n`` pairs: below three nothing, else whether chance explains it at the 5
    % level.

    Args:
        n: paired seeds.
        p_value: adjusted for the number of comparisons; see :func:`holm`.
    """
    if n < MIN_SEEDS:
        return "insufficient"
    return "resolved" if p_value < 1 - LEVEL else "not resolved"


def steps_to_reach(curve: Curve, target: float, goal: Goal = "min") -> float | None:
    """The first step at which the curve is at or beyond ``target``, interpolated linearly between measurements.

    Steps may be any measure of progress: optimizer steps, images, device hours or FLOPs.

    A curve that is there at its first measurement gives that step: what came before was not measured. Measurements that
    are not finite are left out.

    Returns:
        In the units of the curve's keys, or None if the target was never reached.
    """
    sign = 1.0 if goal == "min" else -1.0
    before: tuple[float, float] | None = None
    for place, value in sorted(finite(curve).items()):
        excess = sign * (value - target)
        if excess <= 0:
            return float(place) if before is None else _crossing(before, (place, excess))
        before = (place, excess)
    return None


def speedup(
    arm: Mapping[int, Curve],
    baseline: Mapping[int, Curve],
    goal: Goal = "min",
    target: float | None = None,
    level: float = LEVEL,
) -> Speedup | None:
    """Compare, seed by seed, when the arm and when the baseline first reach a value.

    The baseline's own first crossing counts, not the end of its training: on a noisy curve it may have been there
    earlier, and an arm compared with itself must give 1.

    Args:
        arm: curve by seed, over any measure of progress.
        baseline: curve by seed, of the same metric over the same measure.
        goal: whether small or large values are good.
        target: the value; None is what the baseline ends with, seed by seed.
        level: coverage of the interval of the ratio.

    Returns:
        None if no seed has both curves.
    """
    pairs = [(_begun(arm[seed]), _begun(baseline[seed])) for seed in sorted(arm.keys() & baseline.keys())]
    pairs = [(own, other) for own, other in pairs if own and other]
    if not pairs:
        return None
    reached = []
    for own, other in pairs:
        value = other[max(other)] if target is None else target
        mine, theirs = steps_to_reach(own, value, goal), steps_to_reach(other, value, goal)
        if mine is not None and theirs is not None:
            reached.append((mine, theirs, mine == min(own) or theirs == min(other)))
    ratio = ratio_interval((theirs / mine for mine, theirs, _ in reached), level)
    early = sum(is_early for *_, is_early in reached)
    return Speedup(ratio, mean_interval(mine for mine, *_ in reached).mean, len(reached), len(pairs), early)


def in_common(one: Iterable[float], other: Iterable[float]) -> tuple[set[float], set[float]]:
    """Of the steps at which two curves were measured those that compare: both were, or the other one had ended.

    A curve that is measured more often crosses a value earlier between its points, the more so where it is convex; one
    that is measured sooner may be seen to cross before the other was looked at.
    """
    mine, theirs = set(one), set(other)
    both = mine & theirs
    return (
        both | {step for step in mine if step > max(theirs, default=-math.inf)},
        both | {step for step in theirs if step > max(mine, default=-math.inf)},
    )


def finite(values: Mapping[Key, float]) -> dict[Key, float]:
    """Those values that are finite."""
    return {key: value for key, value in values.items() if math.isfinite(value)}


def _p_value(differences: NDArray[np.float64]) -> float:
    n = len(differences)
    if n < 2:
        return math.nan
    mean, spread = float(differences.mean()), float(differences.std(ddof=1))
    if spread == 0:
        return float(mean == 0)
    return float(2 * stdtr(n - 1, -abs(mean) * math.sqrt(n) / spread))


def _correlation(own: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    if len(own) < MIN_SEEDS or not (np.ptp(own) and np.ptp(other)):
        return math.nan
    return float(np.corrcoef(own, other)[0, 1])


def _begun(curve: Curve) -> dict[float, float]:
    """The finite measurements after the first step: a ratio has no use for step 0."""
    return {place: value for place, value in finite(curve).items() if place > 0}


def _crossing(above: tuple[float, float], below: tuple[float, float]) -> float:
    (start, excess), (end, deficit) = above, below
    return start + (end - start) * excess / (excess - deficit)
