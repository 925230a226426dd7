from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from repa_lab.report.results import Results, ResultsError, load_results
from repa_lab.runs import RunsRoot, RunWriter, State, SweepDirectory

from .conftest import METRIC, STEPS, Build, FakeArm, FakeRun, constant_runs


def row(results: Results, arm: str, metric: str = METRIC) -> pd.Series:
    summary = results.summary
    return summary[(summary["arm"] == arm) & (summary["metric"] == metric)].iloc[0]


def test_runs_have_a_row_per_arm_and_seed(quickstart: SweepDirectory) -> None:
    runs = load_results(quickstart.path).runs
    assert len(runs) == 12
    first = runs[(runs["arm"] == "sit, aligned") & (runs["seed"] == 1)].iloc[0]
    assert (first["sweep"], first["baseline"], first["state"], first["step"]) == ("quickstart", "sit, baseline", "done", 600)
    assert (first["denoiser"], first["alignment"]) == ("sit", "aligned")
    assert (first["regularizer.type"], first["train.steps"], first["images"]) == ("repa", 600, 38400)
    assert first["seconds"] == pytest.approx(60.0)


def test_curves_are_tidy(quickstart: SweepDirectory) -> None:
    curves = load_results(quickstart.path).curves
    assert list(curves.columns) == ["sweep", "arm", "seed", "run_id", "step", "images", "metric", "value"]
    assert set(curves["metric"]) == {METRIC, "heldout/cka", "heldout/cosine", "heldout/gap", "loss/total", "grad_norm"}
    assert curves["value"].dtype == float
    assert len(curves[(curves["metric"] == METRIC) & (curves["arm"] == "sit, baseline")]) == 3 * len(STEPS)


def test_summary_compares_with_the_matched_baseline(build: Build) -> None:
    arms = [FakeArm("base", constant_runs([10.0, 20.0, 30.0])), FakeArm("arm", constant_runs([9.0, 18.0, 27.0]), "base")]
    found = row(load_results(build(arms).path), "arm")
    assert (found["step"], found["n"], found["seeds"], found["n_pairs"]) == (600, 3, 3, 3)
    assert (found["mean"], found["baseline_mean"], found["diff"]) == (18.0, 20.0, -2.0)
    assert found["relative"] == pytest.approx(-0.1)
    assert found["diff_low"] == pytest.approx(-2 - 2.484138)


def test_summary_holds_evaluations_only_and_baselines_have_no_difference(quickstart: SweepDirectory) -> None:
    results = load_results(quickstart.path)
    assert set(results.summary["metric"]) == {METRIC, "heldout/cka", "heldout/cosine", "heldout/gap"}
    baseline = row(results, "sit, baseline")
    assert math.isnan(baseline["diff"])
    assert baseline["n_pairs"] == 0
    assert row(results, "sit, aligned", "heldout/cosine")["n_pairs"] == 0


def test_equal_progress(build: Build) -> None:
    half = {step: 1.0 for step in STEPS if step <= 300}
    behind = FakeRun(1, half, State.RUNNING)
    arms = [FakeArm("base", constant_runs([2.0, 3.0])), FakeArm("arm", [*constant_runs([1.0]), behind], "base")]
    results = load_results(build(arms).path)
    assert row(results, "arm")["step"] == 300
    assert row(results, "base")["step"] == 600


def test_a_baseline_that_is_behind_holds_its_arm_back(build: Build) -> None:
    behind = FakeRun(0, {100: 2.0, 200: 2.0}, State.INTERRUPTED)
    results = load_results(build([FakeArm("base", [behind]), FakeArm("arm", constant_runs([1.0]), "base")]).path)
    assert row(results, "arm")["step"] == 200


def test_runs_without_measurements_are_left_out_and_counted(build: Build) -> None:
    failed = FakeRun(1, {}, State.FAILED, "OutOfMemoryError: 3 GiB")
    arms = [FakeArm("base", constant_runs([2.0, 3.0, 4.0])), FakeArm("arm", [*constant_runs([1.0]), failed, 2], "base")]
    results = load_results(build(arms).path)
    found = row(results, "arm")
    assert (found["seeds"], found["n"], found["n_pairs"], found["diff"]) == (3, 1, 1, -1.0)
    states = results.runs[results.runs["arm"] == "arm"].set_index("seed")
    assert list(states["state"]) == ["done", "failed", "new"]
    assert states.loc[1, "error"] == "OutOfMemoryError: 3 GiB"


def test_null_is_nan_and_does_not_hide_the_run(build: Build) -> None:
    diverged = FakeRun(1, {**dict.fromkeys(STEPS, 5.0), 600: math.nan})
    results = load_results(build([FakeArm("arm", [*constant_runs([1.0]), diverged])]).path)
    found = row(results, "arm")
    assert (found["step"], found["n"], found["seeds"]) == (600, 1, 2)
    assert results.curves["value"].isna().sum() == 1


def test_protocols_never_meet(build: Build) -> None:
    other = "frechet:efficientnet_lite0@100/ode-euler20"
    arms = [FakeArm("base", constant_runs([2.0], metric=other)), FakeArm("arm", constant_runs([1.0]), "base")]
    results = load_results(build(arms).path)
    assert results.summary["diff"].isna().all()
    assert results.compared_metric("arm") is None
    assert results.compared_metric("base") == other


def test_arms_with_one_run_id_are_read_twice(build: Build) -> None:
    shared = [FakeRun(0, dict.fromkeys(STEPS, 1.0), run_id="shared")]
    results = load_results(build([FakeArm("a", shared), FakeArm("b", shared, "a")]).path)
    assert list(results.runs["run_id"]) == ["shared", "shared"]
    assert row(results, "b")["diff"] == 0.0


def test_an_axis_named_after_its_field_holds_the_value(build: Build) -> None:
    levels, config = {"regularizer.weight": "weight=0.5"}, {"regularizer": {"type": "repa", "weight": 0.5}}
    results = load_results(build([FakeArm("weight=0.5", [*constant_runs([1.0]), 1], None, levels, config)]).path)
    assert results.runs["regularizer.weight"].tolist()[0] == 0.5
    assert math.isnan(results.runs["regularizer.weight"].tolist()[1])


def test_a_torn_last_row_is_left_out(build: Build, root: RunsRoot) -> None:
    sweep = build([FakeArm("arm", [FakeRun(0, dict.fromkeys(STEPS, 1.0), run_id="torn")])])
    with (root.run("torn").path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 700, "los')
    assert load_results(sweep.path).curves["step"].max() == 600


def test_a_row_logged_twice_counts_once(build: Build, root: RunsRoot) -> None:
    sweep = build([FakeArm("arm", [FakeRun(0, dict.fromkeys(STEPS, 1.0), run_id="twice")])])
    with RunWriter(root.run("twice")) as writer:
        writer.row({"step": 600, "images": 38400, METRIC: 2.0})
    curves = load_results(sweep.path).curves
    assert curves[(curves["metric"] == METRIC) & (curves["step"] == 600)]["value"].tolist() == [2.0]


def test_a_runs_root_holds_all_its_sweeps(build: Build, root: RunsRoot) -> None:
    build([FakeArm("arm", constant_runs([1.0]))], name="one")
    assert load_results(root.path).name == "one"
    build([FakeArm("arm", constant_runs([1.0]))], name="two")
    both = load_results(str(root.path))
    assert list(both.runs["sweep"]) == ["one", "two"]
    assert list(both.summary["sweep"]) == ["one", "two"]
    assert both.only("two").name == "two"
    with pytest.raises(ResultsError, match=r"2 sweeps .*only"):
        _ = both.sweep
    with pytest.raises(ResultsError, match="no sweep 'three'"):
        both.only("three")


def test_a_single_run_even_through_a_link(build: Build, root: RunsRoot) -> None:
    sweep = build([FakeArm("arm", [FakeRun(7, dict.fromkeys(STEPS, 1.0), run_id="single")])])
    for path in (root.run("single").path, sweep.path / "runs" / "arm-seed7"):
        results = load_results(path)
        assert results.runs[["arm", "seed", "run_id"]].to_numpy().tolist() == [["single", 7, "single"]]
        assert results.metric == METRIC


def test_a_sweep_that_has_not_started(build: Build) -> None:
    results = load_results(build([FakeArm("base", [0, 1]), FakeArm("arm", [0, 1], "base")]).path)
    assert list(results.runs["state"]) == ["new"] * 4
    assert results.curves.empty
    assert results.summary.empty


def test_a_relative_path(quickstart: SweepDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(quickstart.path)
    assert len(load_results(".").runs) == 12
    assert load_results(".").runs["state"].eq("done").all()


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match=r"no results at .*nowhere.*no such folder"):
        load_results(tmp_path / "nowhere")
    with pytest.raises(ResultsError, match=r"sweep\.json .*spec\.json .*runs root"):
        load_results(tmp_path)


def test_a_broken_file_is_said(quickstart: SweepDirectory) -> None:
    (quickstart.path / "sweep.json").write_text("{")
    with pytest.raises(ResultsError, match="cannot be read"):
        load_results(quickstart.path)


def test_the_tables_load_without_torch_and_without_the_drawing_library() -> None:
    probe = "import sys, repa_lab; repa_lab.load_results; print({'torch', 'matplotlib'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
