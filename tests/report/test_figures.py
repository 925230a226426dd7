from __future__ import annotations

import math
import re
from html import unescape
from pathlib import Path

import matplotlib as mpl
import pytest
from matplotlib.figure import Figure
from PIL import Image

from repa_lab.report import curves, figure_data, figures
from repa_lab.report.figure_data import search_frame
from repa_lab.report.page import inline
from repa_lab.report.results import HOURS, Results, load_results
from repa_lab.report.statistics import mean_interval
from repa_lab.runs import RunsRoot, State, SweepDirectory, files

from .conftest import METRIC, STEPS, Build, FakeArm, FakeRun, constant_runs, decay


def test_the_frame_holds_what_the_figure_shows(quickstart: SweepDirectory) -> None:
    frame = figure_data.convergence_frame(load_results(quickstart.path))
    assert list(frame.columns) == figure_data.COLUMNS
    assert set(frame["group"]) == {"sit, baseline", "unet, baseline"}
    assert set(frame["name"]) == {"baseline", "aligned"}
    last = frame[(frame["arm"] == "sit, aligned") & (frame["step"] == 600)]
    expected = mean_interval(last["value"])
    assert last["mean"].unique().tolist() == [expected.mean]
    assert last["high"].unique().tolist() == [expected.high]
    assert set(frame.loc[frame["arm"] == frame["group"], "rank"]) == {-1}


def test_means_do_not_jump_as_seeds_drop_out(build: Build) -> None:
    arm = FakeArm("arm", [FakeRun(0, {100: 9.0, 200: 8.0, 300: 7.0}), FakeRun(1, {100: 1.0, 200: 1.0})])
    frame = figure_data.convergence_frame(load_results(build([arm]).path)).drop_duplicates("step").set_index("step")
    assert frame.loc[200, "mean"] == 4.5
    assert math.isnan(frame.loc[300, "mean"])


def test_arms_are_ranked_by_the_goal(build: Build) -> None:
    arms = [
        FakeArm("base", constant_runs([5.0])),
        *(FakeArm(f"a{v}", constant_runs([float(v)]), "base") for v in (3, 1, 2)),
    ]
    for goal, best in (("min", "a1"), ("max", "a3")):
        frame = figure_data.convergence_frame(load_results(build(arms, name=goal, goal=goal).path))
        assert frame.loc[frame["rank"] == 0, "arm"].unique().tolist() == [best]


def test_one_panel_per_group_with_a_dashed_baseline(quickstart: SweepDirectory) -> None:
    figure = curves.draw_convergence(figure_data.convergence_frame(load_results(quickstart.path)))
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["sit", "unet"]
    for axes in figure.axes:
        assert "frechet:efficientnet_lite0@500/ode-euler20" in axes.get_ylabel()
        styles = {line.get_label(): line.is_dashed() for line in axes.get_lines()}
        assert styles == {"baseline (n = 3)": True, "aligned (n = 3)": False}


def test_only_a_resolved_speedup_is_marked(quickstart: SweepDirectory) -> None:
    figure = curves.draw_convergence(figure_data.convergence_frame(load_results(quickstart.path)))
    marked = [any("sooner" in text.get_text() for text in axes.texts) for axes in figure.axes]
    assert marked == [True, False]


def test_two_seeds_are_drawn_one_by_one(build: Build) -> None:
    arms = [FakeArm("base", [FakeRun(s, decay(9, 2 + s)) for s in range(2)])]
    arms += [FakeArm("arm", [FakeRun(s, decay(9, 1 + s)) for s in range(2)], "base")]
    (axes,) = curves.draw_convergence(figure_data.convergence_frame(load_results(build(arms).path))).axes
    assert len(axes.get_lines()) == 2 * 3
    assert not any("sooner" in text.get_text() for text in axes.texts)


def test_a_seed_that_stopped_does_not_hide_the_others(build: Build) -> None:
    runs = [*(FakeRun(seed, decay(9, 2 + seed)) for seed in range(2)), FakeRun(2, {100: 8.0}, State.FAILED, "no")]
    frame = figure_data.convergence_frame(load_results(build([FakeArm("arm", runs)]).path))
    figure = curves.draw_convergence(frame)
    assert sorted(len(line.get_xdata()) for line in figure.axes[0].get_lines()) == [1, 1, 6, 6]
    assert "single seeds" in figure_data.caption(frame)


@pytest.mark.parametrize(("end", "scale"), [(100.0, "linear"), (1.0, "log")])
def test_more_than_a_decade_is_logarithmic(build: Build, end: float, scale: str) -> None:
    results = load_results(build([FakeArm("arm", [FakeRun(0, decay(500, end, rate=60))])]).path)
    assert curves.draw_convergence(figure_data.convergence_frame(results)).axes[0].get_yscale() == scale


def test_every_value_is_inside_the_panel(build: Build) -> None:
    wild = [FakeRun(0, decay(9, 5)), FakeRun(1, decay(30, 20))]
    frame = figure_data.convergence_frame(load_results(build([FakeArm("arm", wild)]).path))
    low, high = curves.draw_convergence(frame).axes[0].get_ylim()
    assert low < frame["value"].min()
    assert frame["value"].max() < high
    assert high - low < 2 * (frame["value"].max() - frame["value"].min())


def test_many_arms_keep_six_colours_and_count_the_rest(build: Build) -> None:
    arms = [
        FakeArm("base", constant_runs([50.0])),
        *(FakeArm(f"a{v}", constant_runs([v]), "base") for v in range(1, 10)),
    ]
    (axes,) = curves.draw_convergence(figure_data.convergence_frame(load_results(build(arms).path))).axes
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels[0] == "a1 (n = 1)"
    assert "3 other arms" in labels
    assert len(labels) == 8


def test_groups_of_different_protocols_have_their_own_panels(build: Build) -> None:
    other = "fid:inception@10000/sde250"
    arms = [FakeArm("a", constant_runs([1.0])), FakeArm("b", constant_runs([2.0], metric=other))]
    figure = curves.draw_convergence(figure_data.convergence_frame(load_results(build(arms).path)))
    assert len(figure.axes) == 2
    assert other in figure.axes[1].get_ylabel()


def test_alignment_has_a_column_per_measure(quickstart: SweepDirectory) -> None:
    figure = curves.draw_alignment(figure_data.alignment_frame(load_results(quickstart.path)))
    assert [axes.get_ylabel().splitlines()[-1] for axes in figure.axes] == 2 * list(figure_data.ALIGNMENT)
    assert [len(axes.get_lines()) for axes in figure.axes] == [2, 1, 1, 2, 1, 1]


def test_quality_joins_both_metrics(quickstart: SweepDirectory) -> None:
    frame = figure_data.quality_frame(load_results(quickstart.path))
    assert len(frame) == 12 * len(STEPS)
    assert len(curves.draw_quality(frame).axes) == 2


def test_nothing_measured_is_said(build: Build) -> None:
    results = load_results(build([FakeArm("arm", [0])]).path)
    for frame, draw in (
        (figure_data.convergence_frame(results), curves.draw_convergence),
        (figure_data.alignment_frame(results), curves.draw_alignment),
        (figure_data.quality_frame(results), curves.draw_quality),
    ):
        assert "Nothing to show" in draw(frame).texts[0].get_text()


def test_save_writes_150_dots_per_inch_and_leaves_the_style_alone(quickstart: SweepDirectory, tmp_path: Path) -> None:
    before = dict(mpl.rcParams)
    figure = curves.draw_convergence(figure_data.convergence_frame(load_results(quickstart.path)))
    path = figures.save(figure, tmp_path / "deep" / "figure.png")
    assert dict(mpl.rcParams) == before
    assert Image.open(path).size == tuple(int(150 * inches) for inches in figure.get_size_inches())
    assert [entry.name for entry in path.parent.iterdir()] == ["figure.png"]


def test_an_arrow_needs_a_difference_that_holds_among_all_comparisons(build: Build) -> None:
    # Alone its difference is resolved; among ten comparisons it is not.
    ends = {"base": (5.0, 5.2, 5.4), "arm": (4.0, 4.4, 4.3)}
    runs = {arm: [FakeRun(s, decay(9, end)) for s, end in enumerate(values)] for arm, values in ends.items()}
    pair = [FakeArm("base", runs["base"]), FakeArm("arm", runs["arm"], "base")]
    others = [FakeArm(f"later{place}", [0], "base") for place in range(9)]
    marked = []
    for name, arms in (("alone", pair), ("among", [*pair, *others])):
        (axes,) = curves.draw_convergence(figure_data.convergence_frame(load_results(build(arms, name=name).path))).axes
        marked.append(any("sooner" in text.get_text() for text in axes.texts))
    assert marked == [True, False]


def test_curves_over_hours_are_at_the_mean_hours_of_the_seeds_and_in_a_unit_that_suits(
    build: Build, root: RunsRoot
) -> None:
    sweep = build([FakeArm("arm", [FakeRun(s, decay(9, 2 + s), run_id=f"run{s}") for s in range(2)])])
    provenance = root.run("run1").provenance
    files.write_record(root.run("run1").path / "provenance.json", {**provenance, "processes": 3})
    frame = figure_data.convergence_frame(load_results(sweep.path), HOURS)
    last = frame[frame["step"] == 600]
    assert last["progress"].tolist() == [pytest.approx(60 / 3600), pytest.approx(180 / 3600)]
    assert last["place"].unique().tolist() == [pytest.approx(120 / 3600)]
    (axes,) = curves.draw_convergence(frame, axis=HOURS).axes
    assert axes.get_xlabel() == "device seconds of training"
    assert max(axes.get_lines()[0].get_xdata()) == pytest.approx(120)


@pytest.mark.parametrize(("hours", "unit"), [(0.05, "seconds"), (4.0, "minutes"), (40.0, "hours")])
def test_hours_are_shown_in_what_can_be_read(hours: float, unit: str) -> None:
    factor, label = HOURS.scale(hours)
    assert label == f"device {unit} of training"
    assert factor == {"seconds": 3600, "minutes": 60, "hours": 1}[unit]


def test_arms_measured_by_other_protocols_than_their_baseline_are_not_drawn_beside_it(build: Build) -> None:
    arms = [
        FakeArm("base", constant_runs([2.0] * 3, protocol={"reference": "train"})),
        FakeArm("arm", constant_runs([1.0] * 3, protocol={"reference": "val"}), "base"),
    ]
    assert set(figure_data.convergence_frame(load_results(build(arms).path))["arm"]) == {"base"}


def test_panels_can_be_drawn_alone_in_the_same_colours(quickstart: SweepDirectory) -> None:
    frame = figure_data.convergence_frame(load_results(quickstart.path))
    whole = curves.draw_convergence(frame)
    alone = [curves.draw_convergence(panel) for panel in figure_data.panels(frame)]
    assert [axes.get_title(loc="left") for figure in alone for axes in figure.axes] == ["sit", "unet"]
    colors = [[line.get_color() for line in axes.get_lines()] for axes in whole.axes]
    assert [[line.get_color() for line in figure.axes[0].get_lines()] for figure in alone] == colors


def test_differences_are_coloured_where_they_are_resolved(build: Build) -> None:
    arms = [
        FakeArm("base", constant_runs([10.0, 20.0, 30.0])),
        FakeArm("better", constant_runs([5.0, 15.0, 25.01]), "base"),
        FakeArm("worse", constant_runs([15.0, 25.0, 35.01]), "base"),
        FakeArm("unclear", constant_runs([1.0, 29.0, 31.0]), "base"),
        FakeArm("single", constant_runs([1.0]), "base"),
    ]
    frame = figure_data.differences_frame(load_results(build(arms).path))
    assert frame["verdict"].tolist() == ["resolved", "resolved", "not resolved", "insufficient"]
    (axes,) = figures.draw_differences(frame).axes
    dots = [line for line in axes.get_lines() if line.get_marker() == "o"]
    assert [float(dot.get_xdata()[0]) for dot in dots] == pytest.approx([-4.99667, 5.00333, 0.33333, -9.0], abs=5e-6)
    assert dots[2].get_color() == dots[3].get_color()
    assert len({dot.get_color() for dot in dots}) == 3
    assert [label.get_text() for label in axes.get_yticklabels()][3] == "single  (n = 1)"


def trials(pairs: list[tuple[float, float]], states: str = "") -> dict[str, object]:
    names = {"c": "complete", "p": "pruned"}
    records = [
        {
            **{"arm": f"t{place}", "state": names[(states or "c" * len(pairs))[place]], "value": one},
            **{
                "values": {METRIC: one, "gpu_hours": other},
                "params": {"weight": 0.01 * 4**place, "loss": "ab"[place % 2]},
            },
        }
        for place, (one, other) in enumerate(pairs)
    ]
    aims = [{"metric": METRIC, "goal": "min"}, {"metric": "gpu_hours", "goal": "min"}]
    return {"metric": METRIC, "goal": "min", "objectives": aims, "trials": records}


def searched(build: Build, search: dict[str, object]) -> Results:
    return load_results(
        build([FakeArm(trial["arm"], [FakeRun(0, {100: 1.0})]) for trial in search["trials"]], search=search).path
    )


def test_slices_mark_the_best_completed_trial_of_every_objective(build: Build) -> None:
    search = trials([(5.0, 1.0), (3.0, 2.0), (1.0, 9.0), (4.0, 0.5)], states="ccpc")
    results = searched(build, search)
    figure = figures.draw_slices(search_frame(results), results.objectives)
    assert [axes.get_xlabel() for axes in figure.axes] == ["trial", "weight", "loss"] * 2
    assert [axes.get_xscale() for axes in figure.axes] == ["linear", "log", "linear"] * 2
    stars = [axes.collections[-1].get_offsets().data[0].tolist() for axes in (figure.axes[1], figure.axes[4])]
    assert stars == [[0.04, 3.0], [pytest.approx(0.64), 0.5]]


@pytest.mark.parametrize(("goal", "best"), [("min", [5.0, 3.0, 3.0]), ("max", [5.0, 5.0, 5.0])])
def test_the_best_so_far_is_of_completed_trials_in_the_order_they_were_begun(
    build: Build, goal: str, best: list[float]
) -> None:
    search = trials([(5.0, 1.0), (3.0, 2.0), (9.0, 9.0), (4.0, 0.5)], states="ccpc")
    figure = figures.draw_slices(search_frame(searched(build, search)), {METRIC: goal, "gpu_hours": "min"})
    line = figure.axes[0].get_lines()[0].get_xydata()
    assert line[:, 0].tolist() == [0, 1, 3]  # the pruned trial's value is no result
    assert line[:, 1].tolist() == best


def test_the_front_is_joined_in_order(build: Build) -> None:
    results = searched(
        build, {**trials([(5.0, 1.0), (3.0, 2.0), (1.0, 9.0), (6.0, 8.0)]), "pareto": ["t0", "t2", "t1"]}
    )
    (axes,) = figures.draw_pareto(search_frame(results)).axes
    assert axes.get_lines()[0].get_xydata().tolist() == [[1.0, 9.0], [3.0, 2.0], [5.0, 1.0]]
    assert axes.collections[0].get_offsets().data.tolist() == [[6.0, 8.0]]


def test_svg_takes_the_colours_of_the_page_and_has_ids_of_its_own(quickstart: SweepDirectory) -> None:
    frame = figure_data.convergence_frame(load_results(quickstart.path))
    one, other = (
        inline(figures.svg(curves.draw_convergence(panel), name), name)
        for panel, name in zip(figure_data.panels(frame), "ab", strict=True)
    )
    assert one.startswith("<svg")
    assert "var(--ink)" in one
    assert "var(--series-0)" in one
    assert "var(--series-1)" in other
    assert not re.search(r"#(24292f|0b6fb8|ffffff)", one)
    assert ">optimizer steps</text>" in one
    ids = [set(re.findall(r'\bid="([^"]+)"', svg)) for svg in (one, other)]
    assert not ids[0] & ids[1]
    assert set(re.findall(r'(?:url\(#|href="#)([^")]+)', one)) <= ids[0]


def test_what_was_measured_differently_under_one_name_has_a_panel_of_its_own(build: Build, root: RunsRoot) -> None:
    def arm(label: str, encoder: str, value: float) -> FakeArm:
        return FakeArm(
            label, [FakeRun(s, decay(9, value + s), cka=0.3, run_id=f"{label}{s}") for s in range(2)], "base"
        )

    sweep = build(
        [FakeArm("base", [FakeRun(s, decay(9, 4 + s)) for s in range(2)]), arm("a", "dino", 1), arm("b", "mae", 2)]
    )
    for label, encoder in (("a", "dino"), ("b", "mae")):
        for seed in range(2):
            files.write_record(
                root.run(f"{label}{seed}").path / "protocols.json", {"heldout/cka": {"encoder": {"name": encoder}}}
            )
    results = load_results(sweep.path)
    names = [f"heldout/cka (encoder.name: {encoder})" for encoder in ("dino", "mae")]
    assert figure_data.alignment_frame(results).groupby("metric")["arm"].unique().map(list).to_dict() == {
        names[0]: ["a"],
        names[1]: ["b"],
    }
    figure = curves.draw_alignment(figure_data.alignment_frame(results))
    assert [axes.get_ylabel() for axes in figure.axes] == [f"CKA with the encoder\n{name}" for name in names]
    # Quality was measured alike; the panels are of one protocol along either axis.
    quality = curves.draw_quality(figure_data.quality_frame(results))
    assert [axes.get_xlabel() for axes in quality.axes] == [f"CKA with the encoder\n{name}" for name in names]
    assert [axes.get_ylabel() for axes in quality.axes] == [METRIC, METRIC]


def test_an_arrow_compares_steps_that_both_have(build: Build) -> None:
    # The same curve, looked at five times as often; at its end the arm is a little better in every seed.
    def runs(every: int, better: float) -> list[FakeRun]:
        steps = range(every, 3001, every)
        return [FakeRun(s, {n: 20 + 0.1 * s - better + 400 * math.exp(-n / 300) for n in steps}) for s in range(3)]

    arms = [FakeArm("base", runs(1000, 0.0)), FakeArm("arm", runs(200, 0.001), "base")]
    own, other = load_results(build(arms).path).paired_curves("arm", METRIC)
    assert (
        [sorted(curve) for curve in own.values()]
        == [sorted(curve) for curve in other.values()]
        == 3 * [[1000, 2000, 3000]]
    )


# ---- labels are the user's words

LONG = [f"an arm with a very long label that says much too much about every one of its settings: {n}" for n in (1, 2)]
WORDS = [r"$\frac{$", "price $5 to $9", "_hidden", *LONG, "line\nbreak"]


def worded(build: Build, words: list[str] = WORDS) -> Results:
    runs = {word: constant_runs([9.0 - place, 8.0, 7.0], cka=0.3) for place, word in enumerate(words)}
    arms = [FakeArm("$base$", constant_runs([10.0] * 3, cka=0.3))]
    return load_results(build([*arms, *(FakeArm(word, runs[word], "$base$") for word in words)]).path)


def drawn_texts(figure: Figure, path: Path) -> list[str]:
    """What stands in the SVG of a figure, math rendered as math would be split into glyphs."""
    svg = figures.svg(figure, path.name)
    figures.save(figure, path)
    return [unescape(re.sub("<[^>]+>", "", text)) for text in re.findall(r"<text[^>]*>(.*?)</text>", svg, re.DOTALL)]


def test_every_arm_is_in_every_legend_as_text(build: Build, tmp_path: Path) -> None:
    results = worded(build)
    shown = [*(f"{word} (n = 3)" for word in (*WORDS[:3], "line break", "$base$"))]
    for draw, frame in (
        (curves.draw_convergence, figure_data.convergence_frame(results)),
        (curves.draw_alignment, figure_data.alignment_frame(results)),
    ):
        figure = draw(frame)
        texts = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
        assert len(texts) == len(WORDS) + 1
        assert set(shown) <= set(texts)
        assert set(texts) <= set(drawn_texts(figure, tmp_path / "figure.png"))
        long = [text for text in texts if text.startswith("an arm with")]
        assert len(set(long)) == 2 and all(len(text) < 50 and "\u2026" in text for text in long)
    quality = curves.draw_quality(figure_data.quality_frame(results))
    assert "_hidden" in [text.get_text() for text in quality.axes[0].get_legend().get_texts()]
    differences = drawn_texts(figures.draw_differences(figure_data.differences_frame(results)), tmp_path / "figure.png")
    assert {"$\\frac{$  (n = 3)", "_hidden  (n = 3)", "price $5 to $9  (n = 3)"} <= set(differences)


def test_long_labels_that_differ_in_the_middle_are_numbered(build: Build) -> None:
    middle = [f"{'a' * 40}{n}{'b' * 40}" for n in (1, 2, 3)]
    (axes,) = figures.draw_differences(figure_data.differences_frame(worded(build, middle))).axes
    labels = [label.get_text().removesuffix("  (n = 3)") for label in axes.get_yticklabels()]
    assert labels[1:] == [f"{labels[0]} #2", f"{labels[0]} #3"]


def test_choices_of_a_search_are_text(build: Build, tmp_path: Path) -> None:
    search = trials([(5.0, 1.0), (3.0, 2.0)])
    for trial, choice in zip(search["trials"], (r"$\frac{$", "$a$ and $b$"), strict=True):
        trial["params"] = {"data.path": choice}
    results = searched(build, search)
    texts = drawn_texts(figures.draw_slices(search_frame(results), results.objectives), tmp_path / "figure.png")
    assert {r"$\frac{$", "$a$ and $b$"} <= set(texts)
