from __future__ import annotations

import numpy as np
import pytest

from repa_lab.report.figure_data import MIN_TRIALS, importance_frame, search_frame
from repa_lab.report.results import Results, load_results
from repa_lab.report.tables import importance_table

from .conftest import METRIC, Build, FakeArm, FakeRun


def searched(build: Build, count: int, **fixed: object) -> Results:
    """A search whose objective is the square of log10(weight) and, at a tenth of its size, the choice of the loss."""
    rng = np.random.default_rng(0)
    trials = []
    for place in range(count):
        exponent, loss = float(rng.uniform(-2, 2)), ["cosine", "nt_xent"][place % 2]
        value = exponent**2 + 0.1 * (loss == "nt_xent")
        params = {"weight": 10**exponent, "loss": loss, "heads": [1, 2], **fixed}
        trials.append({"arm": f"t{place}", "state": "complete", "value": value, "params": params})
    trials.append({"arm": "failed", "state": "failed", "value": None, "params": {"weight": 1.0, "loss": "cosine"}})
    search = {"metric": METRIC, "goal": "min", "trials": trials}
    return load_results(
        build([FakeArm(trial["arm"], [FakeRun(0, {100: 1.0})]) for trial in trials], search=search).path
    )


def test_the_setting_that_matters_is_found(build: Build) -> None:
    frame = importance_frame(searched(build, 40))
    shares = dict(zip(frame["param"], frame["importance"], strict=True))
    assert shares.keys() == {"weight", "loss"}  # what never varies has no share
    assert shares["weight"] > 0.8
    assert sum(shares.values()) == pytest.approx(1.0)
    assert list(importance_table(frame).rows[0].values())[:2] == [METRIC, "weight"]


def test_few_trials_or_one_setting_have_no_importance(build: Build) -> None:
    assert importance_frame(searched(build, MIN_TRIALS - 1)).empty


def test_the_frame_has_a_row_for_every_trial(build: Build) -> None:
    frame = search_frame(searched(build, 3, flag=True))
    assert frame["arm"].tolist()[-1] == "failed"
    assert frame[f"value/{METRIC}"].iloc[:3].is_monotonic_increasing
    assert frame["param/heads"].tolist()[:3] == ["[1, 2]"] * 3
    assert frame["param/flag"].tolist()[0] == "true"


def test_a_sweep_without_a_search_has_no_trials(build: Build) -> None:
    results = load_results(build([FakeArm("a", [0])]).path)
    assert search_frame(results).empty
    assert importance_frame(results).empty
