from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from repa_lab.report.statistics import (
    headline,
    holm,
    mean_interval,
    pair_curves,
    paired_difference,
    ratio_interval,
    speedup,
    steps_to_reach,
    verdict,
)
from repa_lab.runs.root import ComparisonRecord


def test_mean_interval_by_hand() -> None:
    # mean 2, standard deviation 1, t(2, 97.5 %) = 4.302653 -> half width 4.302653 / sqrt(3)
    found = mean_interval([1.0, 2.0, 3.0])
    assert (found.n, found.mean) == (3, 2.0)
    assert found.high - 2.0 == pytest.approx(2.484138, abs=1e-6)
    assert 2.0 - found.low == pytest.approx(2.484138, abs=1e-6)


@pytest.mark.parametrize("n", [2, 3, 5, 30])
def test_mean_interval_is_scipys(n: int) -> None:
    values = np.random.default_rng(n).normal(200, 10, n)
    low, high = stats.t.interval(0.95, n - 1, loc=values.mean(), scale=stats.sem(values))
    found = mean_interval(values)
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
    assert found.p_value == pytest.approx(stats.ttest_rel(arm, baseline).pvalue)
    assert found.correlation == pytest.approx(stats.pearsonr(arm, baseline).statistic)


def test_pairs_are_made_by_seed_and_only_where_both_are_finite() -> None:
    found = paired_difference({3: 9.0, 1: 8.0, 2: 1.0, 4: math.nan}, {1: 10.0, 3: 12.0, 5: 0.0, 4: 1.0})
    assert found.difference.n == 2
    assert found.difference.mean == -2.5
    assert found.baseline_mean == 11.0
    assert found.relative == pytest.approx(-2.5 / 11)


def test_what_seeds_share_cancels() -> None:
    baseline = {0: 100.0, 1: 200.0, 2: 300.0}
    found = paired_difference({seed: value - 5 - 0.1 * seed for seed, value in baseline.items()}, baseline)
    assert found.is_resolved
    assert found.correlation == pytest.approx(1.0)
    assert mean_interval(baseline.values()).high - mean_interval(baseline.values()).low > 400


def test_two_seeds_are_insufficient_however_sure_they_seem() -> None:
    found = paired_difference({0: 1.0, 1: 1.0}, {0: 2.0, 1: 2.0})
    assert found.difference.excludes(0.0)
    assert (found.p_value, verdict(2, found.p_value)) == (0.0, "insufficient")
    assert not found.is_resolved
    assert math.isnan(found.correlation)


def test_an_interval_without_0_and_a_p_below_5_percent_are_one_thing() -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        values = dict(enumerate(rng.normal(1, 1, 3)))
        found = paired_difference(values, dict.fromkeys(values, 0.0))
        assert found.difference.excludes(0.0) == (found.p_value < 0.05)


def test_no_spread_is_certain_and_no_difference_is_none() -> None:
    assert paired_difference({0: 1.0, 1: 1.0, 2: 1.0}, {0: 1.0, 1: 1.0, 2: 1.0}).p_value == 1.0
    assert math.isnan(paired_difference({0: 1.0}, {0: 2.0}).p_value)


def test_holm_by_hand() -> None:
    # 0.01 * 4 = 0.04; 0.015 * 3 = 0.045; 0.03 * 2 = 0.06; 0.04 * 1 is below what came before it.
    assert holm([0.03, 0.01, 0.04, 0.015]) == pytest.approx([0.06, 0.04, 0.06, 0.045])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_holm_counts_comparisons_that_are_still_to_come() -> None:
    found = holm([0.01, math.nan], comparisons=5)
    assert found[0] == pytest.approx(0.05)
    assert math.isnan(found[1])
    assert holm([0.02]) == [0.02]
    assert holm([0.02, math.nan], comparisons=1)[0] == 0.02


def test_the_mean_of_ratios_by_hand() -> None:
    # Logarithms 0, log 2, 2 log 2: mean log 2, standard deviation log 2, half width log 2 * 4.302653 / sqrt(3).
    found = ratio_interval([1.0, 2.0, 4.0])
    assert (found.n, found.mean) == (3, pytest.approx(2.0))
    assert (found.low, found.high) == (
        pytest.approx(2 / 2**2.484138, rel=1e-6),
        pytest.approx(2 * 2**2.484138, rel=1e-6),
    )
    assert mean_interval([1.0, 2.0, 4.0]).low < 0 < found.low  # which no ratio can be
    one = ratio_interval([1.5])
    assert (one.n, one.mean, math.isnan(one.low)) == (1, pytest.approx(1.5), True)


def test_the_interval_of_ratios_is_scipys_of_their_logarithms() -> None:
    ratios = np.exp(np.random.default_rng(5).normal(0.2, 0.3, 4))
    bounds = stats.t.interval(0.95, 3, loc=np.log(ratios).mean(), scale=stats.sem(np.log(ratios)))
    found = ratio_interval(ratios)
    assert found.mean == pytest.approx(stats.gmean(ratios))
    assert (found.low, found.high) == tuple(pytest.approx(bound) for bound in np.exp(bounds))


def test_which_side_is_the_baseline_does_not_matter_to_a_speedup() -> None:
    # Both sides reach 5: at 100 and 200 against 200 and 100, so that neither is faster.
    fast, slow = {100: 5.0, 200: 5.0}, {100: 9.0, 200: 5.0}
    one, other = (
        speedup(*sides, target=5.0) for sides in (({0: fast, 1: slow}, {0: slow, 1: fast}), ({0: slow}, {0: fast}))
    )
    assert one is not None and other is not None
    assert one.ratio.mean == pytest.approx(1.0)
    assert one.ratio.low * one.ratio.high == pytest.approx(1.0)
    assert other.ratio.mean == pytest.approx(0.5)


def test_relative_to_what_is_below_0_keeps_the_sign_of_the_difference() -> None:
    # Unbiased estimates, as of KID and CKA, may be below 0: from -0.2 to -0.3 is a fall by half.
    assert paired_difference({0: -0.3, 1: -0.3}, {0: -0.2, 1: -0.2}).relative == pytest.approx(-0.5)


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
    assert found.ratio.mean == pytest.approx(math.sqrt(2 * 4 / 3))


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


def test_curves_may_be_over_anything_that_grows() -> None:
    hours = {0.25: 10.0, 0.5: 5.0}
    assert steps_to_reach(hours, 7.5) == 0.375
    assert steps_to_reach({1e18: 10.0, 3e18: 5.0}, 7.5) == 2e18


def test_speedup_to_a_target_counts_the_seeds_in_which_both_get_there() -> None:
    baseline = {0: {100: 20.0, 200: 10.0}, 1: {100: 20.0, 200: 16.0}, 2: {100: 20.0, 200: 10.0}}
    arm = {0: {100: 15.0, 200: 5.0}, 1: {100: 10.0}, 2: {100: 20.0, 200: 10.0}}
    found = speedup(arm, baseline, target=15.0)
    assert found is not None
    # Seed 0: 150 against 100; seed 1: its baseline never does; seed 2: both at 150.
    assert (found.reached, found.n, found.steps) == (2, 3, 125.0)
    assert found.ratio.mean == pytest.approx(math.sqrt(1.5 * 1.0))


def test_curves_are_compared_where_both_were_measured_or_one_had_ended() -> None:
    def common(first: list[int], second: list[int]) -> list[list[float]]:
        sides = pair_curves({0: dict.fromkeys(first, 1.0)}, {0: dict.fromkeys(second, 1.0)})
        return [list(side[0]) for side in sides]

    assert common([100, 200, 300, 400], [200, 400, 600]) == [[200, 400], [200, 400, 600]]
    assert common([100, 200], []) == [[100, 200], []]
    assert common([100, 200], [200, 100]) == [[100, 200], [200, 100]]


def test_a_first_measurement_that_is_there_already_is_counted() -> None:
    baseline = {0: {100: 9.0, 200: 5.0}, 1: {100: 4.0, 200: 5.0}, 2: {100: 9.0, 200: 5.0}}
    arm = {0: {100: 5.0, 200: 1.0}, 1: {100: 6.0, 200: 4.0}, 2: {100: 7.0, 200: 3.0}}
    found = speedup(arm, baseline)
    assert found is not None
    # In seed 0 the arm's, in seed 1 the baseline's; in seed 2 both cross between measurements.
    assert (found.reached, found.early) == (3, 2)


# ---- the headline of a run

FID = "fid:inception@10k/ode50"
ROWS = [
    {"step": 100, "loss/total": 1.0},
    {"step": 100, FID: 50.0},
    {"step": 200, FID: 20.0, "fid:inception@50k/sde250": 1.0},
    {"step": 300, FID: None},
    {"step": 400, FID: 24.0},
]


def test_final_best_and_targets():
    found = headline(ComparisonRecord(metric=FID, targets={FID: [35.0, 20.0, 10.0], "heldout/cka": [0.5]}), ROWS)
    # 35 is half-way between 50 at step 100 and 20 at step 200; 10 was never reached.
    assert found == {
        "metric": FID,
        "final": 24.0,
        "best": 20.0,
        "best_step": 200,
        "steps_to/35": 150.0,
        "steps_to/20": 200.0,
    }


def test_where_large_values_are_good():
    rows = [{"step": step, "is:inception@10k/ode50": value} for step, value in ((1, 2.0), (2, 6.0), (3, 5.0))]
    compared = ComparisonRecord(metric="is:inception@10k/ode50", goal="max", targets={"is:inception@10k/ode50": [4.0]})
    assert headline(compared, rows) == {
        "metric": compared.metric,
        "final": 5.0,
        "best": 6.0,
        "best_step": 2,
        "steps_to/4": 1.5,
    }


def test_nothing_is_said_before_it_was_measured():
    assert headline(ComparisonRecord(metric=FID), ROWS[:1]) == {}
    assert headline(ComparisonRecord(metric="fid:inception@10k/sde250"), ROWS) == {}
