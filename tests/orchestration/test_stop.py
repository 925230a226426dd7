"""Rules that end runs early, outside of their identity: a sweep with the rule, the same without, and with it again."""

import pytest

from repa_lab import plan, sweep
from repa_lab.report import load_results
from repa_lab.runs import RunsRoot, State
from repa_lab.spec import SpecError

METRIC = "frechet:efficientnet_lite0@16/ode2"


def measured(root):
    """Steps of the measurements of every run, by seed."""
    return {run.spec["seed"]: [row["step"] for row in run.rows() if METRIC in row] for run in root.runs()}


def word(spec, root):
    return [one.word for one in plan(spec, root).runs]


def test_a_rule_ends_runs_where_it_holds_and_a_sweep_without_it_takes_them_up(tiny, tmp_path):
    root, without = RunsRoot(tmp_path), tiny(axes={}, seeds=2)
    without["train"] |= {"steps": 9}
    ruled = {**without, "stop": {"metric": "frechet", "above": 0, "after": 4}}
    outcome = sweep(ruled, tmp_path, workers=1)
    assert (outcome.trained, outcome.failures) == (2, {})
    assert measured(root) == {0: [3, 6], 1: [3, 6]}
    assert {run.state.state for run in root.runs()} == {State.STOPPED}
    assert word(ruled, tmp_path) == ["stopped", "stopped"]
    assert load_results(outcome.path).runs["state"].tolist() == ["stopped", "stopped"]
    assert sweep(ruled, tmp_path, workers=1).trained == 0

    assert word(without, tmp_path) == ["resumable", "resumable"]
    assert sweep(without, tmp_path, workers=1).trained == 2
    assert measured(root) == {0: [3, 6, 9], 1: [3, 6, 9]}
    assert [event["step"] for run in root.runs() for event in run.events() if event["event"] == "resumed"] == [6, 6]
    assert word(ruled, tmp_path) == ["done", "done"]


@pytest.mark.slow
def test_a_rule_that_never_holds_changes_nothing(tiny, tmp_path):
    spec = tiny(axes={}, seeds=1, stop=[{"below": 0.0}, {"above": 0.0, "after": 7}])
    sweep(spec, tmp_path, workers=1)
    (run,) = RunsRoot(tmp_path).runs()
    assert run.state.state is State.DONE
    assert measured(RunsRoot(tmp_path)) == {0: [3, 6]}


@pytest.mark.parametrize(
    ("stop", "place"),
    [({"metric": "fid", "below": 1}, "stop.metric"), ([{"below": 1}, {"metric": "loss", "above": 1}], "stop.1.metric")],
)
def test_a_rule_about_what_is_not_measured_is_refused(tiny, tmp_path, stop, place):
    with pytest.raises(SpecError, match="is not measured by this spec; measured: frechet:efficientnet_lite0") as caught:
        plan(tiny(stop=stop), tmp_path)
    assert [problem.path for problem in caught.value.problems] == [place]


def test_a_search_takes_no_rules(tiny, tmp_path):
    search = {"space": {"regularizer.weight": {"log": [0.1, 1]}}}
    with pytest.raises(
        SpecError, match=r"stop: a search compares groups at equal progress: leave stop out, and set search.prune"
    ):
        plan(tiny(axes={}, search=search, stop={"below": 1}), tmp_path)
