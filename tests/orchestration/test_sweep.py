"""Real sweeps in real worker processes."""

import io
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pandas as pd
import pytest
import yaml
from rich.console import Console

from repa_lab import load_results, plan, sweep
from repa_lab.orchestration.api import run_one
from repa_lab.runs import RunsRoot, RunWriter, State, SweepManifest
from repa_lab.runs.files import LinkError
from repa_lab.spec import SpecError

METRIC = "frechet:efficientnet_lite0@16/ode2"


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """A sweep that was carried out with forked data loaders, and its root."""
    root = tmp_path_factory.mktemp("runs")
    return sweep(tiny(run={**tiny()["run"], "data_workers": 1}), root, workers=2), root


def test_every_run_ends_done_with_rows_checkpoint_and_samples(finished):
    outcome, root = finished
    assert (outcome.trained, outcome.failures) == (4, {})
    for run in RunsRoot(root).runs():
        assert run.state.state is State.DONE and run.state.step == 6
        assert [row["step"] for row in run.rows() if METRIC in row] == [3, 6]
        assert [row["step"] for row in run.rows() if "loss/total" in row] == [1, 2, 3, 4, 5, 6]
        assert set(run.sample_grids()) == {3, 6}


def test_the_report_states_the_answer_that_the_rows_give(finished):
    outcome, root = finished
    manifest = outcome.directory.manifest
    final = {
        arm.label: [RunsRoot(root).run(run.run_id).rows()[-1][METRIC] for run in arm.runs] for arm in manifest.arms
    }
    difference = sum(a - b for a, b in zip(final["aligned"], final["baseline"], strict=True)) / 2
    row = load_results(outcome.path).summary.query("arm == 'aligned' and metric == @METRIC").iloc[0]
    assert row["diff"] == pytest.approx(difference)
    text = (outcome.path / "report.md").read_text()
    assert "two seeds are too few to conclude" in text and METRIC in text
    assert (outcome.path / "report.html").stat().st_size > 10_000


def test_paired_arms_share_their_first_images_noise_and_initial_loss(finished):
    _, root = finished
    by_seed = {}
    for run in RunsRoot(root).runs():
        by_seed.setdefault(run.spec["seed"], set()).add(run.rows()[0]["loss/denoise"])
    assert [len(losses) for losses in by_seed.values()] == [1, 1]


def test_a_second_sweep_trains_nothing_and_starts_no_worker(finished, tiny, audited):
    _, root = finished
    before = {path: path.stat().st_mtime_ns for path in root.glob("by-id/*/*.jsonl")}
    with audited("subprocess.Popen") as started:
        outcome = sweep(tiny(), root, workers=2)
    assert outcome.trained == 0
    assert [command for _, command, *_ in started if any("worker" in str(part) for part in command)] == []
    assert {path: path.stat().st_mtime_ns for path in root.glob("by-id/*/*.jsonl")} == before


def test_another_sweep_shares_runs_of_equal_content(finished, tiny):
    _, root = finished
    planned = plan(tiny(name="other", seeds=3), root)
    assert len(planned.pending) == 2
    assert {run.seed for run in planned.pending} == {2}


def test_another_sweep_takes_the_place_of_one_if_it_is_told_to(finished, tiny, tmp_path):
    outcome, root = finished
    copy = RunsRoot(Path(shutil.copytree(root, tmp_path / "runs", symlinks=True)))
    runs = [{"seed": 0, "run_id": "f" * 12}]
    other = {"name": "tiny", "question": "?", "compare": {"metric": "m"}, "arms": [{"label": "stranger", "runs": runs}]}
    copy.sweep("tiny").record(SweepManifest.model_validate(other))
    with pytest.raises(SpecError, match="holds another sweep, of which this one has no run"):
        sweep(tiny(), copy.path)
    again = sweep(tiny(), copy.path, replace=True)
    assert (again.trained, again.directory.manifest) == (0, outcome.directory.manifest)
    assert "stranger" not in (again.path / "report.md").read_text()


@pytest.mark.parametrize("part", ["the root", "the sweep's folder"])
def test_a_copy_with_its_links_followed_is_the_same_sweep(finished, tiny, tmp_path, part):
    outcome, root = finished
    name = outcome.path.name
    shutil.copytree(*((root, tmp_path / "runs") if part == "the root" else (outcome.path, tmp_path / "runs" / name)))
    copy, rows = RunsRoot(tmp_path / "runs"), {run.run_id: run.rows() for run in RunsRoot(root).runs()}
    links = copy.sweep(name).links
    assert not any(path.is_symlink() for path in links.iterdir())
    pd.testing.assert_frame_equal(load_results(copy.sweep(name).path).summary, load_results(outcome.path).summary)
    assert plan(tiny(), copy.path).pending == ()
    for _ in range(2):
        again = sweep(tiny(), copy.path)
        assert (again.trained, again.failures) == (0, {})
    assert {run.run_id: run.rows() for run in RunsRoot(copy.path).runs()} == rows
    assert all((copy.path / "by-id" / run_id / "spec.json").is_file() for run_id in rows)
    assert {path.resolve().parent.name for path in links.iterdir()} == {"runs" if part == "the root" else "by-id"}


def test_a_run_behind_a_link_is_read_and_never_trained(finished, tiny, tmp_path):
    outcome, root = finished
    ours, theirs = (Path(shutil.copytree(root, tmp_path / name, symlinks=True)) for name in ("ours", "theirs"))
    run_id = outcome.directory.manifest.run_ids[0]
    shutil.rmtree(ours / "by-id" / run_id)
    (ours / "by-id" / run_id).symlink_to(theirs / "by-id" / run_id)
    assert plan(tiny(), ours).blocked is None
    (state,) = theirs.glob(f"by-id/{run_id}/state.json")
    state.write_text(state.read_text().replace("done", "interrupted"))
    before = {path: path.read_bytes() for path in theirs.rglob("*") if path.is_file()}
    match = f"ours/by-id/{run_id}' is a link to '{theirs}/by-id/{run_id}', and nothing behind a link is changed; work"
    with pytest.raises(SpecError, match=match):
        sweep(tiny(), ours)
    with pytest.raises(SpecError, match=match):
        run_one(tiny(), "baseline", 0, ours)
    with pytest.raises(LinkError, match=match), RunWriter(RunsRoot(ours).run(run_id)):
        pass
    assert {path: path.read_bytes() for path in theirs.rglob("*") if path.is_file()} == before


def test_a_worker_that_is_killed_costs_one_run_and_a_rerun_repairs_it(tiny, tmp_path):
    spec = tiny(train={"steps": 60, "batch_size": 8, "lr": 1e-3}, evaluate=tiny()["evaluate"] | {"every": 60}, seeds=1)
    root = RunsRoot(tmp_path)
    victim = plan(spec, tmp_path).pending[0].run_id
    killer = threading.Thread(target=_kill_the_worker_of, args=(root, victim), daemon=True)
    killer.start()
    first = sweep(spec, tmp_path, workers=2)
    killer.join()
    assert list(first.failures) == [victim] and "signal 9" in first.failures[victim]
    assert root.run(victim).state.state is State.FAILED
    assert "signal 9" in (first.path / "report.md").read_text()
    second = sweep(spec, tmp_path, workers=2)
    assert (second.trained, second.failures) == (1, {})
    steps = [row["step"] for row in root.run(victim).rows() if "loss/total" in row]
    assert steps == list(range(1, 61))


def _kill_the_worker_of(root, run_id):
    """Once a run has written rows, SIGKILL the process that holds its metrics file's lock."""
    while len(root.run(run_id).rows()) < 5:
        time.sleep(0.02)
    lock = (root.run(run_id).path / ".lock").resolve()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (
                any(os.path.realpath(link) == str(lock) for link in (process / "fd").iterdir())
                and int(process.name) != os.getpid()
            ):
                os.kill(int(process.name), signal.SIGKILL)
        except OSError:
            continue


def test_a_search_prunes_completes_to_its_number_and_is_not_repeated(tiny, tmp_path):
    search = {
        "space": {"regularizer.weight": {"log": [0.1, 1.0]}},
        "trials": 4,
        "prune": "median",
        "sampler": "random",
        "seed": 1,
    }
    spec = tiny(axes={}, search=search)
    outcome = sweep(spec, tmp_path, workers=2)
    record = outcome.directory.manifest.search
    assert record.metric == METRIC
    assert len(record.trials) == 4 and {trial.state for trial in record.trials} <= {"complete", "pruned"}
    arms = {arm.label: arm for arm in outcome.directory.manifest.arms}
    for trial in record.trials:
        runs = [RunsRoot(tmp_path).run(run.run_id) for run in arms[trial.arm].runs]
        assert [run.spec["regularizer"]["weight"] for run in runs] == [trial.params["regularizer.weight"]] * 2
        if trial.state == "complete":
            assert trial.value == pytest.approx(sum(run.rows()[-1][METRIC] for run in runs) / 2)
    again = sweep(spec, tmp_path, workers=2)
    assert (again.trained, again.directory.manifest.search) == (0, record)


def test_what_only_loading_can_show_is_refused_before_anything_is_created(tiny, tmp_path):
    spec = tiny()
    spec["regularizer"]["encoder"]["name"] = "resnet_nonsense"
    file = tmp_path / "spec.yaml"
    file.write_text(yaml.safe_dump(spec, sort_keys=False))
    with pytest.raises(SpecError) as caught:
        sweep(file, tmp_path / "runs", workers=1)
    (line,) = str(caught.value).splitlines()
    number = 1 + file.read_text().splitlines().index("    name: resnet_nonsense")
    assert line.startswith(f"{file}:{number}:5: regularizer.encoder.name: unknown encoder 'resnet_nonsense'; allowed: ")
    assert not list((tmp_path / "runs").glob("by-id")) and not list((tmp_path / "runs").glob("tiny"))


def test_a_run_warns_of_an_average_that_will_hold_initial_weights(tiny, tmp_path):
    shown = io.StringIO()
    spec = tiny(train={**tiny()["train"], "steps": 2, "ema": 0.9}, evaluate={**tiny()["evaluate"], "encoder": None})
    _, state = run_one(spec, "baseline", 0, tmp_path, console=Console(file=shown))
    warning = "train.ema: at decay 0.9 the measured average still holds 81 % of the initial weights after 2 steps;"
    assert state is State.DONE and shown.getvalue().startswith(warning)
