"""Uncertainty over seeds: Student-t intervals, differences paired by seed, multiple comparisons, bands and headlines.

The arms of a sweep share their seeds: seed k draws the same data, noise and initialisation in every arm. A seed shifts
both arms alike and the shift cancels in their difference, so differences are taken seed by seed and then averaged.
Intervals are Student's t, which keeps its coverage at three seeds; the bootstrap and 1.96 standard errors do not.
Ratios are averaged as logarithms, so no bound is below 0 and swapping the arms inverts the result.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
from scipy.special import stdtr, stdtrit

from repa_lab.runs.files import Row
from repa_lab.runs.root import ComparisonRecord

Key = TypeVar("Key")
Goal = Literal["min", "max"]
Curve = Mapping[float, float]  # value by progress
SeedCurves = Mapping[int, Curve]
Verdict = Literal["resolved", "not resolved", "insufficient"]
MIN_SEEDS = 3
LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over ``n`` values (geometric for ratios) and its interval; the bounds are NaN below two values."""

    n: int
    mean: float
    low: float
    high: float

    def excludes(self, value: float) -> bool:
        """Return whether the interval exists and does not contain ``value``."""
        return self.low > value or self.high < value


@dataclass(frozen=True)
class PairedDifference:
    """An arm minus its baseline, seed by seed."""

    difference: Estimate  # the mean difference with its interval, in units of the metric
    baseline_mean: float  # mean of the baseline over the paired seeds
    p_value: float  # two-sided, of the paired t-test that the mean difference is 0; NaN below two pairs
    # Pearson's r of arm and baseline over the seeds; NaN below three pairs. Near 1, pairing removes most of the
    # variation between seeds; below 0, pairing widens the interval.
    correlation: float

    @property
    def relative(self) -> float:
        """The mean difference over the absolute baseline mean; NaN without pairs or if the baseline mean is 0."""
        return self.difference.mean / abs(self.baseline_mean) if self.baseline_mean else math.nan

    @property
    def is_resolved(self) -> bool:
        """Whether the difference is resolved if no other comparison is made; see :func:`holm` for several."""
        return verdict(self.difference.n, self.p_value) == "resolved"


@dataclass(frozen=True)
class Speedup:
    """How much sooner an arm reaches a value than its baseline."""

    ratio: Estimate  # the baseline's steps over the arm's, over the seeds in which both reached it; above 1 is sooner
    steps: float  # mean steps of the arm over those seeds, in the unit of its curves
    reached: int  # number of seeds in which both reached the value
    n: int  # number of seeds that both arms have
    early: int = 0  # in how many of these one was there at its first measurement: when it crossed is not known


def mean_interval(values: Iterable[float]) -> Estimate:
    """Return the mean over seeds and its two-sided Student-t interval; values that are not finite are left out."""
    kept = [float(value) for value in values if math.isfinite(value)]
    n = len(kept)
    if n < 2:
        return Estimate(n, kept[0] if kept else math.nan, math.nan, math.nan)
    mean = float(np.mean(kept))
    half = float(stdtrit(n - 1, 0.5 + LEVEL / 2)) * float(np.std(kept, ddof=1)) / math.sqrt(n)
    return Estimate(n, mean, mean - half, mean + half)


def ratio_interval(ratios: Iterable[float]) -> Estimate:
    """Return the geometric mean of positive ratios, one per seed, and the Student-t interval of their logarithms.

    A t interval of the ratios themselves may reach below 0, and their arithmetic mean favours the numerator: the mean
    of 2 and 1/2 would be 1.25. Here inverse ratios have the inverse mean and bounds.
    """
    log = mean_interval(math.log(ratio) for ratio in ratios)
    return Estimate(log.n, math.exp(log.mean), math.exp(log.low), math.exp(log.high))


def paired_difference(arm: Mapping[int, float], baseline: Mapping[int, float]) -> PairedDifference:
    """Return arm minus baseline over the seeds that have a finite value in both.

    Args:
        arm: value by seed.
        baseline: value by seed, measured at the same step under the same protocol.
    """
    seeds = sorted(finite(arm).keys() & finite(baseline).keys())
    arm_values, baseline_values = np.array([[side[seed] for seed in seeds] for side in (arm, baseline)], dtype=float)
    differences, n = arm_values - baseline_values, len(seeds)
    correlation = p_value = math.nan
    if n >= MIN_SEEDS and np.ptp(arm_values) and np.ptp(baseline_values):
        correlation = float(np.corrcoef(arm_values, baseline_values)[0, 1])
    if n > 1:
        mean, deviation = float(differences.mean()), float(differences.std(ddof=1))
        certain = float(mean == 0)
        p_value = float(2 * stdtr(n - 1, -abs(mean) * math.sqrt(n) / deviation)) if deviation else certain
    baseline_mean = float(baseline_values.mean()) if n else math.nan
    return PairedDifference(mean_interval(differences), baseline_mean, p_value, correlation)


def holm(p_values: Sequence[float], comparisons: int | None = None) -> list[float]:
    """Return p-values that hold for all comparisons at once, by Holm's step-down method (Scand. J. Statist. 6, 1979).

    If those below 0.05 are called differences, the chance of a single false one is below 0.05, also for comparisons
    that share a baseline.

    Args:
        p_values: of single comparisons; NaN stands for a comparison without data, and stays NaN.
        comparisons: total number, those without a p-value included; None is ``len(p_values)``.
    """
    adjusted, largest = [math.nan] * len(p_values), 0.0
    known = sorted((place for place, p in enumerate(p_values) if not math.isnan(p)), key=lambda place: p_values[place])
    total = len(p_values) if comparisons is None else max(comparisons, len(known))
    for rank, place in enumerate(known):
        largest = max(largest, min(1.0, (total - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted


def verdict(n: int, p_value: float) -> Verdict:
    """Return what ``n`` paired seeds and a p-value adjusted by :func:`holm` show; nothing below three pairs."""
    if n < MIN_SEEDS:
        return "insufficient"
    return "resolved" if p_value < 1 - LEVEL else "not resolved"


def steps_to_reach(curve: Curve, target: float, goal: Goal = "min") -> float | None:
    """Return the first progress at which the curve reaches ``target``, interpolated linearly between measurements.

    Progress may be optimizer steps, images, device hours or FLOPs. A curve that starts beyond the target gives its
    first measurement. Measurements that are not finite are left out.

    Returns:
        Progress in the units of the curve's keys, or None if the target was never reached.
    """
    sign = 1.0 if goal == "min" else -1.0
    previous: tuple[float, float] | None = None
    for place, value in sorted(finite(curve).items()):
        excess = sign * (value - target)
        if excess <= 0:
            if previous is None:
                return float(place)
            start, start_excess = previous
            return start + (place - start) * start_excess / (start_excess - excess)
        previous = (place, excess)
    return None


def speedup(arm: SeedCurves, baseline: SeedCurves, goal: Goal = "min", target: float | None = None) -> Speedup | None:
    """Compare, seed by seed, when the arm and when the baseline first reach a value.

    The baseline's own first crossing counts, not the end of its training: a noisy baseline may have crossed the value
    earlier, and an arm compared with itself must give 1. Measurements at step 0 are left out.

    Args:
        arm: curve by seed, over any measure of progress.
        baseline: curve by seed, of the same metric over the same measure.
        goal: whether small or large values are good.
        target: the value; None is the baseline's final value, seed by seed.

    Returns:
        None if no seed has both curves.
    """
    n, reached = 0, []
    for seed in sorted(arm.keys() & baseline.keys()):
        curves = [
            {place: value for place, value in finite(side[seed]).items() if place > 0} for side in (arm, baseline)
        ]
        if not all(curves):
            continue
        n += 1
        value = curves[1][max(curves[1])] if target is None else target
        arm_steps, baseline_steps = (steps_to_reach(curve, value, goal) for curve in curves)
        if arm_steps is not None and baseline_steps is not None:
            is_early = arm_steps == min(curves[0]) or baseline_steps == min(curves[1])
            reached.append((arm_steps, baseline_steps, is_early))
    if not n:
        return None
    ratio = ratio_interval((baseline_steps / arm_steps for arm_steps, baseline_steps, _ in reached))
    steps = mean_interval(arm_steps for arm_steps, *_ in reached).mean
    return Speedup(ratio, steps, len(reached), n, sum(is_early for *_, is_early in reached))


def pair_curves(arm: SeedCurves, baseline: SeedCurves) -> tuple[SeedCurves, SeedCurves]:
    """Keep, seed by seed, the steps of two arms' curves to compare: measured on both, or after the other has ended.

    A curve that is measured more often crosses a value earlier between its points, and a curve that is measured sooner
    may be seen to cross before the other was looked at.
    """

    def kept(curves: SeedCurves, others: SeedCurves) -> SeedCurves:
        paired = {**curves}
        for seed in curves.keys() & others.keys():
            other, last = others[seed], max(others[seed], default=-math.inf)
            paired[seed] = {step: value for step, value in curves[seed].items() if step in other or step > last}
        return paired

    return kept(arm, baseline), kept(baseline, arm)


def finite(values: Mapping[Key, float]) -> dict[Key, float]:
    """Return the entries whose values are finite."""
    return {key: value for key, value in values.items() if math.isfinite(value)}


def headline(compared: ComparisonRecord, rows: list[Row]) -> dict[str, Any]:
    """Return one run in a few numbers; empty until the compared metric was measured.

    Args:
        compared: the metric that the run's sweep compares.
        rows: all metric rows of the run.

    Returns:
        ``metric`` (name), ``final`` and ``best`` (values), ``best_step``, and for every reached target of the metric
        ``steps_to/<value>`` in optimizer steps.
    """
    curve = {row["step"]: row[compared.metric] for row in rows if row.get(compared.metric) is not None}
    if not curve:
        return {}
    best = (min if compared.goal == "min" else max)(curve, key=lambda step: curve[step])
    targets = compared.targets.get(compared.metric, [])
    steps = {f"steps_to/{value:g}": steps_to_reach(curve, value, compared.goal) for value in targets}
    reached = {name: step for name, step in steps.items() if step is not None}
    return {"metric": compared.metric, "final": curve[max(curve)], "best": curve[best], "best_step": best, **reached}
