from __future__ import annotations

import pytest

from repa_lab.report.statistics import ComparedMetric, headline

FID = "fid:inception@10k/ode50"
ROWS = [
    {"step": 100, "loss/total": 1.0},
    {"step": 100, FID: 50.0},
    {"step": 200, FID: 20.0, "fid:inception@50k/sde250": 1.0},
    {"step": 300, FID: None},
    {"step": 400, FID: 24.0},
]


def test_final_best_and_targets():
    found = headline(ComparedMetric(FID, "min", {FID: [35.0, 20.0, 10.0], "heldout/cka": [0.5]}), ROWS)
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
    compared = ComparedMetric("is:inception@10k/ode50", "max", {"is:inception@10k/ode50": [4.0]})
    assert headline(compared, rows) == {
        "metric": compared.metric,
        "final": 5.0,
        "best": 6.0,
        "best_step": 2,
        "steps_to/4": 1.5,
    }


def test_nothing_is_said_before_it_was_measured():
    assert headline(ComparedMetric(FID), ROWS[:1]) == {}
    assert headline(ComparedMetric("fid:inception@10k/sde250"), ROWS) == {}


@pytest.mark.parametrize("goal", ["min", "max"])
def test_it_is_what_the_manifest_compares(goal):
    manifest = {"name": "x", "compare": {"metric": FID, "goal": goal, "targets": {FID: [3.0]}}}
    assert ComparedMetric.from_manifest(manifest) == ComparedMetric(FID, goal, {FID: [3.0]})
