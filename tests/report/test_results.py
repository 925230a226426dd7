from __future__ import annotations

import math
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from repa_lab.report.leaderboard import leaderboards
from repa_lab.report.page import write_report
from repa_lab.report.results import Results, ResultsError, load_results
from repa_lab.runs import RunsRoot, RunWriter, State, SweepDirectory, files
from repa_lab.runs.files import LinkError

from .conftest import METRIC, STEPS, Build, FakeArm, FakeRun, constant_runs


def row(results: Results, arm: str, metric: str = METRIC) -> pd.Series:
    summary = results.summary
    return summary[(summary["arm"] == arm) & (summary["metric"] == metric)].iloc[0]


def test_runs_have_a_row_per_arm_and_seed(quickstart: SweepDirectory) -> None:
    runs = load_results(quickstart.path).runs
    assert len(runs) == 12
    first = runs[(runs["arm"] == "sit, aligned") & (runs["seed"] == 1)].iloc[0]
    assert (first["sweep"], first["baseline"], first["state"], first["step"]) == (
        "quickstart",
        "sit, baseline",
        "done",
        600,
    )
    assert (first["denoiser"], first["alignment"]) == ("sit", "aligned")
    assert (first["regularizer.type"], first["train.steps"], first["images"]) == ("repa", 600, 38400)
    assert first["seconds"] == pytest.approx(60.0)


def test_curves_are_tidy(quickstart: SweepDirectory) -> None:
    curves = load_results(quickstart.path).curves
    assert list(curves.columns) == [
        *("sweep", "arm", "seed", "run_id", "step", "images", "hours", "flops", "metric", "value")
    ]
    assert set(curves["metric"]) == {METRIC, "heldout/cka", "heldout/cosine", "heldout/gap", "loss/total", "grad_norm"}
    assert curves.loc[curves["step"] == 600, "hours"].unique().tolist() == [pytest.approx(60 / 3600)]
    assert curves["value"].dtype == float
    assert len(curves[(curves["metric"] == METRIC) & (curves["arm"] == "sit, baseline")]) == 3 * len(STEPS)


def test_samples_have_a_row_per_grid_of_every_run(build: Build, root: RunsRoot) -> None:
    sweep = build([FakeArm("a", [FakeRun(0, {100: 1.0}, run_id="one"), 1]), FakeArm("b", constant_runs([2.0]))])
    (root.run("one").samples / "step-00000050.png").write_bytes(b"earlier")
    samples = load_results(sweep.path).samples
    assert samples[["sweep", "arm", "seed", "step"]].to_numpy().tolist() == [
        *(["trial", "a", 0, 50], ["trial", "a", 0, 100]),
        *(["trial", "b", 0, 500], ["trial", "b", 0, 600]),
    ]
    assert samples.loc[0, "path"].read_bytes() == b"earlier"
    build([FakeArm("c", constant_runs([1.0]))], name="other")
    assert load_results(root.path).only("other").samples["arm"].tolist() == ["c", "c"]


def test_summary_compares_with_the_matched_baseline(build: Build) -> None:
    arms = [
        FakeArm("base", constant_runs([10.0, 20.0, 30.0])),
        FakeArm("arm", constant_runs([9.0, 18.0, 27.0]), "base"),
    ]
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
    assert results.compared_metrics["arm"] is None
    assert results.compared_metrics["base"] == other


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


def test_a_copy_of_a_sweep_beside_it_is_another_sweep_of_the_same_runs(build: Build, root: RunsRoot) -> None:
    sweep = build([FakeArm("a", constant_runs([1.0, 2.0]))])
    shutil.copytree(sweep.path, root.path / "backup", symlinks=True)
    both = load_results(root.path)
    assert [manifest.name for manifest in both.sweeps] == ["backup", "trial"]
    for name in ("backup", "trial"):
        assert row(both.only(name), "a")["mean"] == 1.5
        assert both.only(name).runs["seed"].tolist() == [0, 1]
    (board,) = leaderboards(root.path, METRIC)
    assert board.frame[["arm", "sweeps", "seeds"]].to_numpy().tolist() == [["a", "backup, trial", 2]]


def test_a_single_run_even_through_a_link(build: Build, root: RunsRoot) -> None:
    sweep = build([FakeArm("arm", [FakeRun(7, dict.fromkeys(STEPS, 1.0), run_id="single")])])
    for path in (root.run("single").path, sweep.path / "runs" / "arm-seed7"):
        results = load_results(path)
        assert results.runs[["arm", "seed", "run_id"]].to_numpy().tolist() == [["single", 7, "single"]]
        assert results.metric == METRIC


def test_a_sweep_copied_with_its_links_followed_has_its_results(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = build([FakeArm("arm", [FakeRun(7, dict.fromkeys(STEPS, 1.0), run_id="single")])])
    copy = Path(shutil.copytree(sweep.path, tmp_path / "laptop" / "of_mine"))  # as scp -r does
    assert row(load_results(copy), "arm")["mean"] == row(load_results(sweep.path), "arm")["mean"] == 1.0
    monkeypatch.chdir(copy)
    for path in (copy / "runs" / "arm-seed7", "runs/arm-seed7"):
        assert load_results(path).runs[["arm", "seed", "run_id"]].to_numpy().tolist() == [["single", 7, "single"]]
    alone = Path(shutil.copytree(copy / "runs" / "arm-seed7", tmp_path / "laptop" / "elsewhere"))
    results = load_results(alone)
    assert (results.runs["step"].tolist(), results.metric) == ([STEPS[-1]], METRIC)


def test_a_linked_sweep_is_read_with_the_runs_of_its_own_root(build: Build, tmp_path: Path) -> None:
    sweep = build([FakeArm("arm", constant_runs([1.0, 2.0]))])
    (tmp_path / "mine").symlink_to(sweep.path)
    assert row(load_results(tmp_path / "mine"), "arm")["mean"] == 1.5
    before = sorted(sweep.path.rglob("*"))
    with pytest.raises(LinkError, match=r"mine' is a link to '.*', and nothing behind a link is changed"):
        write_report(SweepDirectory(tmp_path / "mine"))
    assert sorted(sweep.path.rglob("*")) == before


def test_a_sweep_that_has_not_started(build: Build) -> None:
    results = load_results(build([FakeArm("base", [0, 1]), FakeArm("arm", [0, 1], "base")]).path)
    assert list(results.runs["state"]) == ["new"] * 4
    assert results.curves.empty
    assert results.summary.empty
    assert results.samples.empty


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


# ---- several comparisons


def verdicts(results: Results) -> dict[str, tuple[float, str]]:
    rows = results.summary[results.summary["metric"] == METRIC]
    return {
        row["arm"]: (row["p_holm"], row["verdict"]) for _, row in rows.iterrows() if isinstance(row["baseline"], str)
    }


def test_holm_is_over_the_arms_of_a_sweep_those_not_measured_yet_included(build: Build) -> None:
    base = FakeArm("base", constant_runs([10.0, 20.0, 30.0]))
    arm = FakeArm("arm", constant_runs([9.0, 19.5, 29.0]), "base")  # differences -1, -0.5, -1: t = -5, p = 0.0377
    alone = verdicts(load_results(build([base, arm], name="alone").path))
    assert alone["arm"] == (pytest.approx(0.0377, abs=5e-5), "resolved")
    among = load_results(build([base, arm, FakeArm("later", [0, 1, 2], "base")], name="among").path)
    assert verdicts(among) == {"arm": (pytest.approx(0.0755, abs=5e-5), "not resolved")}
    assert row(among, "arm")["comparisons"] == 2


def test_the_same_run_under_two_labels_is_no_comparison(build: Build) -> None:
    shared = [FakeRun(seed, dict.fromkeys(STEPS, 10.0 + seed), run_id=f"shared{seed}") for seed in range(3)]
    arms = [
        FakeArm("base", shared),
        FakeArm("weight=0", shared, "base"),
        FakeArm("arm", constant_runs([9.0, 9.8, 11.2]), "base"),
    ]
    assert row(load_results(build(arms).path), "arm")["comparisons"] == 1


def test_pairing_is_measured(build: Build) -> None:
    arms = [
        FakeArm("base", constant_runs([10.0, 20.0, 30.0])),
        FakeArm("arm", constant_runs([19.0, 9.0, 29.0]), "base"),
    ]
    assert row(load_results(build(arms).path), "arm")["correlation"] == pytest.approx(0.5)


# ---- protocols


def with_protocol(values: list[float], **protocol: object) -> list[FakeRun]:
    return constant_runs(values, protocol={"samples": 500, "seed": 0, "versions": {"torch": "2.9"}, **protocol})


def test_one_name_over_different_protocols_is_refused(build: Build) -> None:
    base = FakeArm("base", with_protocol([10.0, 20.0, 30.0], reference="train"))
    arm = FakeArm("arm", with_protocol([1.0, 2.0, 3.0], reference="val"), "base")
    results = load_results(build([base, arm]).path)
    found = row(results, "arm")
    assert (found["verdict"], found["conflicts"], found["n_pairs"]) == ("refused", "reference (val / train)", 0)
    assert math.isnan(found["diff"])
    assert found["mean"] == 2.0
    assert results.compared_metrics["arm"] is None


def test_seeds_and_versions_may_differ(build: Build) -> None:
    base = FakeArm("base", with_protocol([10.0, 20.0, 30.0], versions={"torch": "2.9"}, seed=0))
    arm = FakeArm("arm", with_protocol([9.0, 19.0, 28.0], versions={"torch": "2.10"}, seed=1), "base")
    assert row(load_results(build([base, arm]).path), "arm")["diff"] == pytest.approx(-4 / 3)


def test_seeds_of_one_arm_that_were_measured_differently_have_no_mean(build: Build) -> None:
    runs = [
        *with_protocol([1.0], reference="train"),
        FakeRun(1, dict.fromkeys(STEPS, 9.0), protocol={"samples": 500, "reference": "val"}),
    ]
    found = row(load_results(build([FakeArm("arm", runs)]).path), "arm")
    assert math.isnan(found["mean"])
    assert found["conflicts"] == "reference (train / val)"


def test_runs_without_a_record_are_compared_by_name(build: Build) -> None:
    arms = [
        FakeArm("base", constant_runs([10.0, 20.0, 30.0])),
        FakeArm("arm", with_protocol([9.0, 19.0, 28.0]), "base"),
    ]
    assert row(load_results(build(arms).path), "arm")["n_pairs"] == 3


# ---- measures of progress


def test_progress_is_known_by_steps_images_hours_and_flops(build: Build, root: RunsRoot) -> None:
    sweep = build([FakeArm("arm", [FakeRun(0, {100: 2.0, 200: 1.0}, flops=1e12, run_id="costly")])])
    provenance = root.run("costly").provenance
    files.write_record(root.run("costly").path / "provenance.json", {**provenance, "processes": 4})
    results = load_results(sweep.path)
    assert [axis.name for axis in results.axes] == ["step", "images", "hours", "flops"]
    assert results.seed_curves("arm", METRIC, "flops") == {0: {1e14: 2.0, 2e14: 1.0}}
    assert results.seed_curves("arm", METRIC, "hours") == {0: {4 * 10 / 3600: 2.0, 4 * 20 / 3600: 1.0}}


def test_a_measure_that_one_run_lacks_is_no_axis(build: Build) -> None:
    runs = [FakeRun(0, {100: 2.0}, flops=1e12), FakeRun(1, {100: 2.0})]
    assert [axis.name for axis in load_results(build([FakeArm("arm", runs)]).path).axes] == ["step", "images", "hours"]


# ---- damage


def broken(build: Build, root: RunsRoot, line: str) -> Results:
    runs = [FakeRun(seed, dict.fromkeys(STEPS, 1.0 + seed), run_id=f"run{seed}") for seed in range(2)]
    sweep = build([FakeArm("arm", runs)])
    path = root.run("run1").path / "metrics.jsonl"
    lines = path.read_text().splitlines()
    lines[-1] = line  # the measurement at step 600
    path.write_text("\n".join(lines) + "\n")
    return load_results(sweep.path)


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ('{"step": 600, "frech', "not JSON"),
        ("\x00\x00\x00", "not JSON"),
        ("[1, 2]", "no JSON object"),
        ('{"frechet": 3.0}', "no step"),
        ('{"step": -1}', "no step"),
        ('{"step": true}', "no step"),
    ],
)
def test_a_damaged_line_is_named_and_never_makes_a_wrong_mean(
    build: Build, root: RunsRoot, line: str, what: str
) -> None:
    results = broken(build, root, line)
    (trouble,) = results.troubles.to_dict("records")
    assert (trouble["arm"], trouble["seed"], trouble["where"]) == ("arm", 1, "metrics.jsonl:13")
    assert what in trouble["what"]
    # Both seeds are compared where both were measured, not one seed at 600.
    found = row(results, "arm")
    assert (found["step"], found["n"], found["mean"]) == (500, 2, 1.5)


def test_a_value_that_is_no_number_is_left_out(build: Build, root: RunsRoot) -> None:
    results = broken(build, root, f'{{"step": 600, "{METRIC}": "12", "heldout/cka": 0.5}}')
    assert results.troubles["what"].tolist() == [f"{METRIC} at step 600 is no number; it is left out"]
    assert row(results, "arm")["step"] == 500
    assert results.seed_curves("arm", "heldout/cka") == {1: {600: 0.5}}


@pytest.mark.parametrize("name", ["state.json", "spec.json", "provenance.json", "protocols.json", "events.jsonl"])
@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[3]\n", b"3\n"])
def test_any_damaged_file_of_a_run_costs_no_more_than_itself(
    build: Build, root: RunsRoot, name: str, content: bytes
) -> None:
    sweep = build([FakeArm("arm", [FakeRun(0, dict.fromkeys(STEPS, 1.0), run_id="hurt")])])
    (root.run("hurt").path / name).write_bytes(content)
    results = load_results(sweep.path)
    assert row(results, "arm")["mean"] == 1.0
    if name != "events.jsonl" or content.endswith(b"\n"):  # else it is a last line that a kill tore
        assert name in results.troubles["where"].tolist()


def test_contradicting_rows_are_named_and_the_last_counts(build: Build, root: RunsRoot) -> None:
    sweep = build([FakeArm("arm", [FakeRun(0, dict.fromkeys(STEPS, 1.0), run_id="twice")])])
    with RunWriter(root.run("twice")) as writer:
        writer.row({"step": 600, METRIC: 2.0})
    results = load_results(sweep.path)
    assert row(results, "arm")["mean"] == 2.0
    assert results.troubles["what"].tolist() == [f"{METRIC} at step 600 is there twice, differently; the last counts"]


def test_a_protocol_that_changed_while_a_run_went_on_is_named(build: Build, root: RunsRoot) -> None:
    sweep = build(
        [FakeArm("arm", [FakeRun(0, {100: 1.0}, run_id="changed", protocol={"samples": 500, "versions": {"a": 1}})])]
    )
    with RunWriter(root.run("changed")) as writer:
        writer.protocols({METRIC: {"samples": 500, "versions": {"a": 2}}})
        assert load_results(sweep.path).troubles.empty
        writer.protocols({METRIC: {"samples": 600, "versions": {"a": 2}}})
    (what,) = load_results(sweep.path).troubles["what"]
    assert "changed in samples;" in what


@pytest.mark.parametrize(
    ("what", "value"),
    [
        ("compare", None),
        ("compare", {"metric": METRIC, "goal": "least"}),
        ("arms", 3),
        ("arms", [{"label": 1}]),
        ("name", 7),
        ("question", []),
    ],
)
def test_a_manifest_that_is_not_sound_is_one_error(quickstart: SweepDirectory, what: str, value: object) -> None:
    manifest = quickstart.manifest.model_dump()
    files.write_record(quickstart.path / "sweep.json", {**manifest, what: value})
    with pytest.raises(ResultsError, match=rf"cannot be read as results: .*/sweep\.json' is damaged: {what}"):
        load_results(quickstart.path)


def test_a_run_id_leads_nowhere_else(quickstart: SweepDirectory) -> None:
    manifest = quickstart.manifest.model_dump()
    manifest["arms"][0]["runs"][0]["run_id"] = "../../secret"
    files.write_record(quickstart.path / "sweep.json", manifest)
    with pytest.raises(ResultsError, match="cannot be the name of a run"):
        load_results(quickstart.path)


def test_the_tables_load_without_torch_and_without_the_drawing_library() -> None:
    probe = "import sys, repa_lab; repa_lab.load_results; print({'torch', 'matplotlib'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_run_on_its_own_is_judged_by_its_metrics_direction(build: Build, root: RunsRoot) -> None:
    build([FakeArm("arm", [FakeRun(0, {100: 0.1}, metric="precision:inception@10k/ode50", run_id="alone")])])
    assert load_results(root.run("alone").path).goal == "max"
