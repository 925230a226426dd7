"""Whether the intervals keep what they promise: thousands of simulated sweeps whose truth is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from repa_lab.report.statistics import holm, mean_interval, paired_difference

SWEEPS = 2000


def within(covered: float, expected: float, n: int = SWEEPS, deviations: float = 3.5) -> bool:
    """Whether a simulated share is what is expected, up to binomial error."""
    return abs(covered - expected) <= deviations * math.sqrt(expected * (1 - expected) / n)


def sweeps(
    seeds: int, effect: float, arms: int = 1, shared: float = 3.0, own: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Baselines ``(sweeps, seeds)`` and arms ``(sweeps, arms, seeds)``: what a seed adds is shared, the rest is each run's own."""
    rng = np.random.default_rng(20)
    seed = rng.normal(500, shared, (SWEEPS, 1, seeds))
    noise = rng.normal(0, own, (SWEEPS, arms + 1, seeds))
    return (seed + noise)[:, 0], seed[:, 0][:, None] + noise[:, 1:] + effect


def differences(seeds: int, effect: float) -> np.ndarray:
    baseline, arm = sweeps(seeds, effect)
    return arm[:, 0] - baseline


def by_seed(values: np.ndarray) -> dict[int, float]:
    return dict(enumerate(values.tolist()))


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_student_t_on_paired_differences_covers_95_percent(seeds: int) -> None:
    baseline, arm = sweeps(seeds, effect=-7.0)
    found = [paired_difference(by_seed(a[0]), by_seed(b)).difference for a, b in zip(arm, baseline, strict=True)]
    assert within(np.mean([one.low <= -7.0 <= one.high for one in found]), 0.95)


def test_at_three_seeds_a_percentile_bootstrap_covers_three_quarters() -> None:
    values = differences(3, effect=-7.0)
    draws = np.stack(np.meshgrid(*[range(3)] * 3), axis=-1).reshape(-1, 3)
    # All 27 resamples there are. One in 27 is the smallest value thrice, which is more than 2.5 %: the interval ends at the
    # smallest and the largest value, and three values lie on one side of the truth with probability 2 * (1 / 2)^3.
    low, high = np.quantile(values[:, draws].mean(axis=-1), [0.025, 0.975], axis=1, method="inverted_cdf")
    assert np.allclose(low, values.min(axis=1))
    assert within(np.mean((low <= -7.0) & (high >= -7.0)), 0.75)


def test_at_three_seeds_1_96_standard_errors_cover_four_fifths() -> None:
    values = differences(3, effect=-7.0)
    error = 1.96 * values.std(axis=1, ddof=1) / math.sqrt(3)
    assert within(np.mean(np.abs(values.mean(axis=1) + 7.0) <= error), 0.81)


def test_pairing_pays_where_seeds_matter() -> None:
    baseline, arm = sweeps(5, effect=-2.5)
    paired = [
        paired_difference(by_seed(a[0]), by_seed(b)).difference.excludes(0.0)
        for a, b in zip(arm, baseline, strict=True)
    ]
    spread = np.sqrt(baseline.var(axis=1, ddof=1) / 5 + arm[:, 0].var(axis=1, ddof=1) / 5)
    unpaired = np.abs(arm[:, 0].mean(axis=1) - baseline.mean(axis=1)) / spread > 2.306  # t, 8 degrees of freedom
    assert np.mean(paired) > 0.8
    assert np.mean(unpaired) < 0.25


def test_without_effects_holm_errs_in_at_most_5_percent_of_sweeps_and_single_tests_in_many_more() -> None:
    baseline, arms = sweeps(4, effect=0.0, arms=6)
    p = [
        [paired_difference(by_seed(arm), by_seed(b)).p_value for arm in a] for a, b in zip(arms, baseline, strict=True)
    ]
    single = np.mean([min(row) < 0.05 for row in p])
    whole = np.mean([min(holm(row)) < 0.05 for row in p])
    assert single > 0.13
    assert whole <= 0.05 + 3.5 * math.sqrt(0.05 * 0.95 / SWEEPS)
    assert whole > 0.01


def test_unpaired_means_have_students_interval_too() -> None:
    baseline, _ = sweeps(3, effect=0.0)
    found = [mean_interval(values) for values in baseline]
    assert within(np.mean([one.low <= 500.0 <= one.high for one in found]), 0.95)
