from __future__ import annotations

import math
from pathlib import Path

import matplotlib as mpl
import pytest
from PIL import Image

from repa_lab.report import figures
from repa_lab.report.results import load_results
from repa_lab.report.statistics import mean_interval
from repa_lab.runs import State, SweepDirectory

from .conftest import STEPS, Build, FakeArm, FakeRun, constant_runs, decay


def test_the_frame_holds_what_the_figure_shows(quickstart: SweepDirectory) -> None:
    frame = figures.convergence_frame(load_results(quickstart.path))
    assert list(frame.columns) == figures.COLUMNS
    assert set(frame["group"]) == {"sit, baseline", "unet, baseline"}
    assert set(frame["name"]) == {"baseline", "aligned"}
    last = frame[(frame["arm"] == "sit, aligned") & (frame["step"] == 600)]
    expected = mean_interval(last["value"])
    assert last["mean"].unique().tolist() == [expected.mean]
    assert last["high"].unique().tolist() == [expected.high]
    assert set(frame.loc[frame["is_baseline"], "rank"]) == {-1}


def test_means_do_not_jump_as_seeds_drop_out(build: Build) -> None:
    arm = FakeArm("arm", [FakeRun(0, {100: 9.0, 200: 8.0, 300: 7.0}), FakeRun(1, {100: 1.0, 200: 1.0})])
    frame = figures.convergence_frame(load_results(build([arm]).path)).drop_duplicates("step").set_index("step")
    assert frame.loc[200, "mean"] == 4.5
    assert math.isnan(frame.loc[300, "mean"])


def test_arms_are_ranked_by_the_goal(build: Build) -> None:
    arms = [FakeArm("base", constant_runs([5.0])), *(FakeArm(f"a{v}", constant_runs([float(v)]), "base") for v in (3, 1, 2))]
    for goal, best in (("min", "a1"), ("max", "a3")):
        frame = figures.convergence_frame(load_results(build(arms, name=goal, goal=goal).path))
        assert frame.loc[frame["rank"] == 0, "arm"].unique().tolist() == [best]


def test_one_panel_per_group_with_a_dashed_baseline(quickstart: SweepDirectory) -> None:
    figure = figures.draw_convergence(figures.convergence_frame(load_results(quickstart.path)))
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["sit", "unet"]
    for axes in figure.axes:
        assert "frechet:efficientnet_lite0@500/ode-euler20" in axes.get_ylabel()
        styles = {line.get_label(): line.is_dashed() for line in axes.get_lines()}
        assert styles == {"baseline (n = 3)": True, "aligned (n = 3)": False}


def test_only_a_resolved_speedup_is_marked(quickstart: SweepDirectory) -> None:
    figure = figures.draw_convergence(figures.convergence_frame(load_results(quickstart.path)))
    marked = [any("sooner" in text.get_text() for text in axes.texts) for axes in figure.axes]
    assert marked == [True, False]


def test_two_seeds_are_drawn_one_by_one(build: Build) -> None:
    arms = [FakeArm("base", [FakeRun(s, decay(9, 2 + s)) for s in range(2)])]
    arms += [FakeArm("arm", [FakeRun(s, decay(9, 1 + s)) for s in range(2)], "base")]
    (axes,) = figures.draw_convergence(figures.convergence_frame(load_results(build(arms).path))).axes
    assert len(axes.get_lines()) == 2 * 3
    assert not any("sooner" in text.get_text() for text in axes.texts)


def test_a_seed_that_stopped_does_not_hide_the_others(build: Build) -> None:
    runs = [*(FakeRun(seed, decay(9, 2 + seed)) for seed in range(2)), FakeRun(2, {100: 8.0}, State.FAILED, "no")]
    figure = figures.draw_convergence(figures.convergence_frame(load_results(build([FakeArm("arm", runs)]).path)))
    assert sorted(len(line.get_xdata()) for line in figure.axes[0].get_lines()) == [1, 1, 6, 6]
    assert "single seeds" in figure.get_supxlabel()


@pytest.mark.parametrize(("end", "scale"), [(100.0, "linear"), (1.0, "log")])
def test_more_than_a_decade_is_logarithmic(build: Build, end: float, scale: str) -> None:
    results = load_results(build([FakeArm("arm", [FakeRun(0, decay(500, end, rate=60))])]).path)
    assert figures.draw_convergence(figures.convergence_frame(results)).axes[0].get_yscale() == scale


def test_every_value_is_inside_the_panel(build: Build) -> None:
    wild = [FakeRun(0, decay(9, 5)), FakeRun(1, decay(30, 20))]
    frame = figures.convergence_frame(load_results(build([FakeArm("arm", wild)]).path))
    low, high = figures.draw_convergence(frame).axes[0].get_ylim()
    assert low < frame["value"].min()
    assert frame["value"].max() < high
    assert high - low < 2 * (frame["value"].max() - frame["value"].min())


def test_many_arms_keep_six_colours_and_count_the_rest(build: Build) -> None:
    arms = [FakeArm("base", constant_runs([50.0])), *(FakeArm(f"a{v}", constant_runs([v]), "base") for v in range(1, 10))]
    (axes,) = figures.draw_convergence(figures.convergence_frame(load_results(build(arms).path))).axes
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels[0] == "a1 (n = 1)"
    assert "3 other arms" in labels
    assert len(labels) == 8


def test_groups_of_different_protocols_have_their_own_panels(build: Build) -> None:
    other = "fid:inception@10000/sde250"
    arms = [FakeArm("a", constant_runs([1.0])), FakeArm("b", constant_runs([2.0], metric=other))]
    figure = figures.draw_convergence(figures.convergence_frame(load_results(build(arms).path)))
    assert len(figure.axes) == 2
    assert other in figure.axes[1].get_ylabel()


def test_alignment_has_a_column_per_measure(quickstart: SweepDirectory) -> None:
    figure = figures.draw_alignment(figures.alignment_frame(load_results(quickstart.path)))
    assert [axes.get_ylabel().splitlines()[-1] for axes in figure.axes] == 2 * list(figures.ALIGNMENT)
    assert [len(axes.get_lines()) for axes in figure.axes] == [2, 1, 1, 2, 1, 1]


def test_quality_joins_both_metrics(quickstart: SweepDirectory) -> None:
    frame = figures.quality_frame(load_results(quickstart.path))
    assert len(frame) == 12 * len(STEPS)
    assert len(figures.draw_quality(frame).axes) == 2


def test_nothing_measured_is_said(build: Build) -> None:
    results = load_results(build([FakeArm("arm", [0])]).path)
    for frame, draw in (
        (figures.convergence_frame(results), figures.draw_convergence),
        (figures.alignment_frame(results), figures.draw_alignment),
        (figures.quality_frame(results), figures.draw_quality),
    ):
        assert "Nothing to show" in draw(frame).texts[0].get_text()


def test_save_writes_150_dots_per_inch_and_leaves_the_style_alone(quickstart: SweepDirectory, tmp_path: Path) -> None:
    before = dict(mpl.rcParams)
    figure = figures.draw_convergence(figures.convergence_frame(load_results(quickstart.path)))
    path = figures.save(figure, tmp_path / "deep" / "figure.png")
    assert dict(mpl.rcParams) == before
    assert Image.open(path).size == tuple(int(150 * inches) for inches in figure.get_size_inches())
    assert [entry.name for entry in path.parent.iterdir()] == ["figure.png"]
