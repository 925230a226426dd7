from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import spearmanr

from repa_lab.report import load_results
from repa_lab.report.published import Comparison, PublishedArm, compare_published, sentences, table_rows
from repa_lab.report.statistics import Estimate, paired_difference
from repa_lab.spec.options import PublishedConfig
from tests.report.conftest import METRIC, STEPS, FakeArm, FakeRun, constant_runs

FID, SFID, IS = (f"{kind}:inception@50k/sde250" for kind in ("fid", "sfid", "is"))


def published(tolerance=None, **arms):
    return PublishedConfig(source="a table", tolerance=tolerance or {}, arms=arms)


def test_rank_correlation_is_scipys_ties_included():
    def arm(published, measured):
        return PublishedArm("a", (), published, Estimate(1, measured, 0, 0), 0, paired_difference({}, {}), None)

    def rank_correlation(first, second):
        rows = tuple(map(arm, first, second))
        return Comparison("fid", METRIC, "a", rows, None).spearman

    draw = np.random.default_rng(0)
    for _ in range(20):
        first, second = draw.integers(0, 5, 7).tolist(), draw.normal(size=7).tolist()
        assert rank_correlation(first, second) == pytest.approx(spearmanr(first, second).statistic)
    assert rank_correlation([1, 2, 3], [30.0, 20.0, 10.0]) == pytest.approx(-1)
    assert math.isnan(rank_correlation([1, 2], [5.0, 5.0]))
    assert math.isnan(rank_correlation([1], [5.0]))


def test_values_differences_signs_and_order(build):
    """Three arms with paired seeds: b is 20 below a in every seed, c is 5 above a but for noise that hides it."""
    a = [100.0, 110.0, 120.0]
    arms = [("a", a), ("b", [80.0, 90.0, 101.0]), ("c", [135.0, 95.0, 131.0])]
    sweep = build([FakeArm(label, constant_runs(values)) for label, values in arms])
    said = published(a={"fid": 7.0}, b={"fid": 6.0}, c={"fid": 9.0})
    (one,) = compare_published(load_results(sweep.path), said, exact=False)
    assert (one.kind, one.metric, one.reference, one.tolerance) == ("fid", METRIC, "b", None)
    rows = {row.arm: row for row in one.rows}
    assert [rows[arm].measured.mean for arm in "abc"] == pytest.approx([110, 271 / 3, 361 / 3])
    assert [rows[arm].published_difference for arm in "abc"] == [1, 0, 3]
    assert rows["a"].difference.difference.mean == pytest.approx((20 + 20 + 19) / 3)
    assert [rows[arm].same_sign for arm in "abc"] == [True, None, None]
    assert one.pairs == (3, 3)
    assert one.spearman == pytest.approx(1)
    assert all(row.agrees is None for row in one.rows)
    texts = {row["arm"]: row for row in table_rows(one)}
    assert [texts[arm]["same sign"] for arm in ("a", "b  (reference)", "c")] == ["yes", "", "open"]
    assert not any("within" in key for key in texts["a"])
    first, second = sentences(one)
    assert first == "fid: 3 of 3 pairs of arms are in the published order; Spearman's rho +1.00 over 3 arms"
    assert second.startswith("fid: of 2 differences from 'b', 1 have the published sign, 0 the other, and 1 are open")


def test_the_reverse_order_is_told_as_such(build):
    sweep = build([FakeArm(label, constant_runs([v, v + 1, v + 2])) for label, v in (("a", 10.0), ("b", 20.0))])
    (one,) = compare_published(load_results(sweep.path), published(a={"fid": 7}, b={"fid": 6}), exact=False)
    assert one.pairs == (0, 1)
    assert one.spearman == pytest.approx(-1)
    assert {row.arm: row.same_sign for row in one.rows} == {"a": False, "b": None}
    assert table_rows(one)[0]["same sign"] == "no"


def test_two_seeds_decide_nothing(build):
    sweep = build([FakeArm(label, constant_runs([v, v])) for label, v in (("a", 10.0), ("b", 20.0))])
    (one,) = compare_published(load_results(sweep.path), published(a={"fid": 6}, b={"fid": 7}), exact=False)
    assert [row.same_sign for row in one.rows] == [None, None]
    assert table_rows(one)[1]["same sign"] == "open (fewer than 3 seeds)"


class TestExact:
    def sweep(self, build, values=(8.2, 7.4)):
        arms = []
        for label, value in zip("ab", values, strict=True):
            runs = [FakeRun(seed, dict.fromkeys(STEPS, value), metric=FID) for seed in range(3)]
            arms.append(FakeArm(label, runs))
        return build(arms, metric=FID)

    def test_values_agree_within_the_tolerance_and_not_beyond(self, build):
        said = published({"fid": 0.5}, a={"fid": 8.6}, b={"fid": 8.0})
        (one,) = compare_published(load_results(self.sweep(build).path), said, exact=True)
        assert [row.agrees for row in one.rows] == [True, False]
        assert [row["within 0.5"] for row in table_rows(one)] == ["yes", "no"]

    def test_without_a_tolerance_nothing_is_said_to_agree(self, build):
        (one,) = compare_published(
            load_results(self.sweep(build).path), published(a={"fid": 8.6}, b={"fid": 8}), exact=True
        )
        assert [row.agrees for row in one.rows] == [None, None]

    def test_another_metric_is_never_taken_for_the_papers(self, build):
        said = published({"fid": 0.5}, a={"sfid": 8.2, "is": 9}, b={"sfid": 7.4, "is": 9})
        assert compare_published(load_results(self.sweep(build).path), said, exact=True) == ()
        sweep = build([FakeArm(label, constant_runs([8.0] * 3)) for label in "cd"], name="other")
        assert compare_published(load_results(sweep.path), published(c={"fid": 8}, d={"fid": 9}), exact=True) == ()

    def test_large_inception_scores_are_good(self, build):
        arms = [
            FakeArm(label, [FakeRun(seed, dict.fromkeys(STEPS, value), metric=IS) for seed in range(3)])
            for label, value in (("a", 120.0), ("b", 124.0))
        ]
        said = published(a={"is": 118.6}, b={"is": 122.6})
        (one,) = compare_published(load_results(build(arms, metric=IS, goal="max").path), said, exact=True)
        assert (one.reference, one.pairs) == ("b", (1, 1))


def test_what_was_not_measured_is_said(build):
    sweep = build(
        [FakeArm("a", constant_runs([8.0] * 3)), FakeArm("b", constant_runs([9.0] * 3)), FakeArm("c", [0, 1])]
    )
    said = published(a={"fid": 1}, b={"fid": 2}, c={"fid": 3}, d={"fid": 4})
    (one,) = compare_published(load_results(sweep.path), said, exact=False)
    assert [row.arm for row in one.rows] == ["a", "b", "c"]
    assert [row.arm for row in one.measured] == ["a", "b"]
    assert one.pairs == (1, 1)
    assert "fid: not every arm was measured" in list(sentences(one))


def test_arms_that_share_their_runs_are_named(build):
    runs = [FakeRun(seed, dict.fromkeys(STEPS, 8.0), run_id=f"{seed}" * 12) for seed in range(3)]
    sweep = build([FakeArm("a", runs), FakeArm("b", runs), FakeArm("c", constant_runs([9.0] * 3))])
    (one,) = compare_published(
        load_results(sweep.path), published(a={"fid": 1}, b={"fid": 2}, c={"fid": 3}), exact=False
    )
    assert list(sentences(one))[-1] == "the same runs, because their settings are the same here: a, b"


def test_arms_are_set_beside_each_other_at_equal_progress(build):
    """`b` got to step 600, `a` to step 200 so far: what `b` is at step 600 says nothing about the two."""
    ahead = [FakeRun(seed, {200: 50.0 + seed, 600: 10.0}) for seed in range(3)]
    behind = [FakeRun(seed, {200: 40.0 + seed}) for seed in range(3)]
    sweep = build([FakeArm("a", behind), FakeArm("b", ahead)])
    (one,) = compare_published(load_results(sweep.path), published(a={"fid": 7}, b={"fid": 6}), exact=False)
    assert {row.arm: row.measured.mean for row in one.rows} == {"a": 41, "b": 51}
    assert one.rows[0].difference.difference.mean == -10


def test_values_of_another_protocol_are_left_out_and_named(build):
    def runs(value, weights):
        return constant_runs([value, value + 1, value + 2], protocol={"weights": weights})

    sweep = build([FakeArm("a", runs(10.0, "x")), FakeArm("b", runs(20.0, "y")), FakeArm("c", runs(30.0, "y"))])
    said = published(a={"fid": 7}, b={"fid": 6}, c={"fid": 8})
    (one,) = compare_published(load_results(sweep.path), said, exact=False)
    assert {row.arm: row.measured.n for row in one.rows} == {"a": 0, "b": 3, "c": 3}
    assert one.refused == ("a",)
    assert f"fid: a left out, because under the name {METRIC} they were measured unlike 'b'" in list(sentences(one))
