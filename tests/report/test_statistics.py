from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from repa_lab.report.statistics import mean_interval, paired_difference, speedup, steps_to_reach


def test_mean_interval_by_hand() -> None:
    # mean 2, standard deviation 1, t(2, 97.5 %) = 4.302653 -> half width 4.302653 / sqrt(3)
    found = mean_interval([1.0, 2.0, 3.0])
    assert (found.n, found.mean) == (3, 2.0)
    assert found.high - 2.0 == pytest.approx(2.484138, abs=1e-6)
    assert 2.0 - found.low == pytest.approx(2.484138, abs=1e-6)


@pytest.mark.parametrize("level", [0.5, 0.9, 0.95, 0.99])
@pytest.mark.parametrize("n", [2, 3, 5, 30])
def test_mean_interval_is_scipys(n: int, level: float) -> None:
    values = np.random.default_rng(n).normal(200, 10, n)
    low, high = stats.t.interval(level, n - 1, loc=values.mean(), scale=stats.sem(values))
    found = mean_interval(values, level)
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))


def test_one_value_has_no_interval_and_none_has_no_mean() -> None:
    one, none = mean_interval([5.0]), mean_interval([])
    assert (one.n, one.mean, none.n) == (1, 5.0, 0)
    assert all(math.isnan(value) for value in (one.low, one.high, none.mean, none.low))
    assert not one.excludes(0.0)


def test_values_that_are_not_finite_do_not_count() -> None:
    assert mean_interval([1.0, math.nan, 3.0, math.inf]) == mean_interval([1.0, 3.0])


def test_paired_difference_is_scipys_paired_test() -> None:
    rng = np.random.default_rng(0)
    arm, baseline = rng.normal(1, 1, 6), rng.normal(0, 1, 6)
    found = paired_difference(dict(enumerate(arm)), dict(enumerate(baseline)))
    reference = stats.ttest_rel(arm, baseline).confidence_interval(0.95)
    assert found.difference.low == pytest.approx(reference.low)
    assert found.difference.high == pytest.approx(reference.high)


def test_pairs_are_made_by_seed_and_only_where_both_are_finite() -> None:
    found = paired_difference({3: 9.0, 1: 8.0, 2: 1.0, 4: math.nan}, {1: 10.0, 3: 12.0, 5: 0.0, 4: 1.0})
    assert found.seeds == (1, 3)
    assert found.difference.mean == -2.5
    assert found.baseline_mean == 11.0
    assert found.relative == pytest.approx(-2.5 / 11)


def test_what_seeds_share_cancels() -> None:
    baseline = {0: 100.0, 1: 200.0, 2: 300.0}
    found = paired_difference({seed: value - 5 - 0.1 * seed for seed, value in baseline.items()}, baseline)
    assert found.is_resolved
    assert mean_interval(baseline.values()).high - mean_interval(baseline.values()).low > 400


def test_two_seeds_never_resolve() -> None:
    found = paired_difference({0: 1.0, 1: 1.0}, {0: 2.0, 1: 2.0})
    assert found.difference.excludes(0.0)
    assert not found.is_resolved


def test_relative_to_nothing_is_nan() -> None:
    assert math.isnan(paired_difference({0: 1.0}, {0: 0.0}).relative)
    assert math.isnan(paired_difference({}, {}).relative)


def test_steps_to_reach_interpolates() -> None:
    assert steps_to_reach({100: 10.0, 200: 5.0, 300: 1.0}, 7.5) == 150.0
    assert steps_to_reach({300: 1.0, 100: 10.0, 200: 5.0}, 5.0) == 200.0
    assert steps_to_reach({100: 0.1, 200: 0.5}, 0.3, goal="max") == 150.0


def test_steps_to_reach_at_the_edges() -> None:
    curve = {100: 10.0, 200: 5.0}
    assert steps_to_reach(curve, 20.0) == 100.0
    assert steps_to_reach(curve, 4.9) is None
    assert steps_to_reach({}, 1.0) is None
    assert steps_to_reach({100: 10.0, 150: math.nan, 200: 0.0}, 5.0) == 150.0


def test_first_crossing_counts() -> None:
    assert steps_to_reach({100: 10.0, 200: 4.0, 300: 8.0, 400: 2.0}, 7.0) == 150.0


def test_an_arm_is_no_faster_than_itself() -> None:
    noisy = {seed: {100: 9.0, 200: 4.0 - seed, 300: 7.0, 400: 5.0} for seed in range(3)}
    found = speedup(noisy, noisy)
    assert found is not None
    assert (found.ratio.mean, found.ratio.low, found.ratio.high) == (1.0, 1.0, 1.0)


def test_speedup_by_hand() -> None:
    baseline = {0: {100: 20.0, 200: 10.0}, 1: {100: 20.0, 200: 12.0}, 2: {100: 20.0, 200: 11.0}}
    arm = {0: {100: 10.0, 200: 5.0}, 1: {100: 16.0, 200: 8.0}, 2: {100: 30.0, 200: 15.0}}
    found = speedup(arm, baseline)
    assert found is not None
    # seed 0 is there at 100 (2x), seed 1 at 150 (4/3x), seed 2 never.
    assert (found.reached, found.n, found.steps) == (2, 3, 125.0)
    assert found.ratio.mean == pytest.approx((2 + 4 / 3) / 2)


def test_speedup_without_pairs_or_without_reaching() -> None:
    assert speedup({0: {100: 1.0}}, {1: {100: 1.0}}) is None
    assert speedup({0: {100: math.nan}}, {0: {100: 1.0}}) is None
    never = speedup({0: {100: 2.0}}, {0: {100: 1.0}})
    assert never is not None
    assert (never.reached, never.n) == (0, 1)
    assert math.isnan(never.ratio.mean)


def test_step_0_does_not_divide() -> None:
    found = speedup({0: {0: 1.0, 100: 1.0}}, {0: {0: 1.0, 100: 1.0}})
    assert found is not None
    assert found.ratio.mean == 1.0
