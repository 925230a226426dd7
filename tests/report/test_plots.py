from __future__ import annotations

import pandas as pd
import pytest

from repa_lab.report import figure_data, plots
from repa_lab.report.figure_data import search_frame
from repa_lab.report.results import ResultsError, load_results
from repa_lab.runs import RunsRoot, SweepDirectory

from .conftest import Build, FakeArm, constant_runs

TRIALS = [
    {
        "arm": "t0",
        "state": "complete",
        "value": 30.0,
        "params": {"regularizer.weight": 0.1, "regularizer.type": "repa"},
    },
    {"arm": "t1", "state": "pruned", "value": 10.0, "params": {"regularizer.weight": 1.0, "regularizer.type": "urepa"}},
    {
        "arm": "t2",
        "state": "complete",
        "value": 20.0,
        "params": {"regularizer.weight": 10.0, "regularizer.type": "repa"},
    },
    {"arm": "t3", "state": "running", "value": None, "params": {"regularizer.weight": 2.0}},
]


def searched(build: Build, goal: str = "min") -> SweepDirectory:
    arms = [FakeArm(trial["arm"], constant_runs([1.0])) for trial in TRIALS]
    return build(arms, name="hunt", search={"metric": "frechet:x@16/ode2", "goal": goal, "trials": TRIALS})


def curves(figure, panel: int = 0) -> list[list[tuple[float, float]]]:
    return [
        list(map(tuple, line.get_xydata().tolist()))
        for line in figure.axes[panel].get_lines()
        if len(line.get_xydata()) > 1
    ]


def test_a_helper_returns_the_frame_that_its_figure_shows(quickstart: SweepDirectory):
    results = load_results(quickstart.path)
    for drawn, frame in (
        (plots.convergence(results), figure_data.convergence_frame(results)),
        (plots.alignment(results), figure_data.alignment_frame(results)),
        (plots.quality(results), figure_data.quality_frame(results)),
    ):
        pd.testing.assert_frame_equal(drawn.frame, frame)
    drawn = plots.convergence(results)
    for panel, group in enumerate(drawn.frame["group"].unique()):
        rows = drawn.frame[drawn.frame["group"] == group].drop_duplicates(["arm", "step"])
        means = {arm: list(zip(one["step"], one["mean"], strict=True)) for arm, one in rows.groupby("arm")}
        assert all(curve in curves(drawn.figure, panel) for curve in means.values())


def test_several_sweeps_have_their_panels_with_their_names(build: Build, root: RunsRoot):
    for name, base, value in (("one", "base", 3.0), ("two", "plain", 2.0)):
        build(
            [FakeArm(base, constant_runs([value, value])), FakeArm(f"{name}s", constant_runs([1.0, value / 2]), base)],
            name=name,
        )
    drawn = plots.convergence(load_results(root.path))
    assert drawn.frame["group"].unique().tolist() == ["one, base", "two, plain"]
    assert set(drawn.frame["arm"]) == {"one, base", "one, ones", "two, plain", "two, twos"}
    assert [axes.get_title(loc="left") for axes in drawn.figure.axes] == ["one", "two"]
    last = drawn.frame[(drawn.frame["arm"] == "two, plain") & (drawn.frame["step"] == 600)]
    assert last["mean"].tolist() == [2.0, 2.0]


def test_sweeps_with_opposite_goals_are_not_drawn_together(build: Build, root: RunsRoot):
    for name, goal in (("one", "min"), ("two", "max")):
        build([FakeArm("base", constant_runs([1.0]))], name=name, goal=goal)
    with pytest.raises(ResultsError, match=r"one, two: .* opposite directions.*\.only\(name\)"):
        plots.convergence(load_results(root.path))


def test_a_search_is_drawn_from_the_frame_that_is_returned(build: Build):
    results = load_results(searched(build).path)
    drawn = plots.search(results)
    pd.testing.assert_frame_equal(drawn.frame, search_frame(results))
    assert [axes.get_xlabel() for axes in drawn.figure.axes] == ["trial", "regularizer.weight", "regularizer.type"]
    assert [axes.get_xscale() for axes in drawn.figure.axes] == ["linear", "log", "linear"]


def test_a_papers_values_and_ours_stand_on_their_own_axes(tmp_path):
    text = "arm,kind,published,metric,n,measured,low,high\nbase,fid,24.4,fid:inception@50k/sde250,3,25,24,26\narm,fid,12.5,fid:inception@50k/sde250,3,13,,\nbase,is,60,is:inception@50k/sde250,3,59,58,60\n"
    (tmp_path / "reproduce.csv").write_text(text)
    (tmp_path / "reproduce.md").write_text("# it\n")
    markdown, figure, frame = plots.reproduction(tmp_path)
    assert markdown == "# it\n" and frame["published"].tolist() == [24.4, 12.5, 60.0]
    points = [[tuple(map(float, point)) for point in axes.collections[-1].get_offsets()] for axes in figure.axes]
    assert points == [[(24.4, 1), (12.5, 0)], [(25.0, 1), (13.0, 0)], [(60.0, 0)], [(59.0, 0)]]
    (tmp_path / "reproduce.csv").write_text("arm,kind\nbase,fid\n")
    with pytest.raises(ResultsError, match=r"reproduce\.csv' cannot be read"):
        plots.reproduction(tmp_path)


def test_what_is_not_there_is_said(build: Build, quickstart: SweepDirectory):
    with pytest.raises(ResultsError, match="quickstart is no search"):
        plots.search(load_results(quickstart.path))
    with pytest.raises(ResultsError, match="no run of quickstart has a profile; make some with `repa-lab profile"):
        plots.layers(quickstart.path)
    with pytest.raises(ResultsError, match=r"no reproduce\.csv in .*`repa-lab reproduce`"):
        plots.reproduction(quickstart.path)
    empty = build([FakeArm("t", [0])], name="hunt", search={"metric": "m", "goal": "min", "trials": []})
    assert plots.search(load_results(empty.path)).frame.empty
