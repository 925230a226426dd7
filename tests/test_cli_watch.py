"""Commands that look at runs and change where they stand, on real run directories."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading

import pytest
from filelock import FileLock

from repa_lab.runs import RunsRoot, RunWriter, State, SweepManifest, checkpoints
from tests.test_cli import cli


@pytest.fixture
def root(tmp_path):
    return RunsRoot(tmp_path / "runs")


def make(root, name="abc", state=State.FAILED, error="DivergedError: the loss is nan at step 7"):
    run = root.run(name)
    with RunWriter(run) as writer:
        writer.describe({"train": {"steps": 100}, "seed": 0}, {})
        writer.state(State.RUNNING, 0)
        writer.row({"step": 5, "seconds": 10.0, "loss/total": 1.5})
        checkpoints.commit(run.checkpoints, 5, lambda folder: (folder / "weights").write_bytes(b"x") and None)
        if state is not State.RUNNING:
            writer.state(state, 7, error if state is State.FAILED else None)
    return run


def manifest(name, arms):
    return SweepManifest(name=name, compare={"metric": "m"}, arms=arms)


def test_why_tells_a_runs_history_and_the_reason(root):
    make(root)
    done = cli("why", "abc", "--root", root.path)
    assert done.returncode == 0
    assert [line.split("│")[2].strip() for line in done.stdout.splitlines() if line.startswith("│")] == [
        "running",
        "failed",
    ]
    assert "step 7, error DivergedError: the loss is nan at step 7" in done.stdout
    events = json.loads(cli("why", "abc", "--root", root.path, "--json").stdout)
    assert [event["event"] for event in events] == ["running", "failed"]
    missing = cli("why", "nope", "--root", root.path)
    assert (missing.returncode, missing.stderr) == (2, f"no run 'nope' in {root.path}; `repa-lab status` lists them\n")


def test_status_says_how_long_a_run_still_takes(root):
    with FileLock(make(root, "running", State.RUNNING).lock):
        (row,) = json.loads(cli("status", "--root", root.path, "--json").stdout)
    assert (row["state"], row["step"], row["left"]) == ("running", 5, "0:03:10")  # 95 steps of 2 s


def test_status_of_a_root_calls_runs_as_their_sweeps_do(root):
    for name in ("asked", "shared", "lone"):
        make(root, name)
    arms = [{"label": "weight=0.5", "runs": [{"seed": 3, "run_id": "asked"}, {"seed": 4, "run_id": "shared"}]}]
    for sweep, label in (("a", "weight=0.5"), ("b", "baseline")):
        root.sweep(sweep).record(
            manifest(sweep, [{**arms[0], "label": label, "runs": arms[0]["runs"][sweep == "b" :]}])
        )
    (root.path / "c").mkdir()
    (root.path / "c/sweep.json").write_text("{")
    rows = json.loads(cli("status", "--root", root.path, "--json").stdout)
    assert {row["run_id"]: row["run"] for row in rows} == {
        "asked": "a: weight=0.5, seed 3",
        "shared": "a: weight=0.5, seed 4",
        "lone": "",
    }
    (row,) = json.loads(cli("status", "b", "--root", root.path, "--json").stdout)
    assert (row["run"], row["run_id"]) == ("baseline, seed 4", "shared")
    twins = [{"label": label, "runs": [{"seed": 0, "run_id": "lone"}]} for label in ("x", "y")]
    root.sweep("d").record(manifest("d", twins))
    assert [row["run"] for row in json.loads(cli("status", "d", "--root", root.path, "--json").stdout)] == [
        "x, seed 0",
        "y, seed 0",
    ]


def test_a_run_that_was_killed_does_not_seem_to_go_on(root):
    make(root, "killed", State.RUNNING)
    (row,) = json.loads(cli("status", "--root", root.path, "--json").stdout)
    assert (row["state"], row["step"], row["left"]) == ("resumable", 5, "")
    assert "resumable" in cli("status", "--watch", "--root", root.path).stdout  # ends at once


def test_status_goes_on_until_all_runs_have_come_to_rest(root):
    first, last = make(root, "one", State.RUNNING), make(root, "two", State.RUNNING)
    command = [sys.executable, "-m", "repa_lab", "status", "--watch", "--root", str(root.path)]

    def shown(name):
        """The next line on a run; a pipe gets another table whenever a status changes."""
        while name not in (line := process.stdout.readline()):
            assert line
        return line

    with RunWriter(last) as writer:
        with RunWriter(first) as other:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            assert "running" in shown("one") and "running" in shown("two")
            other.state(State.DONE, 100)
        assert "done" in shown("one") and "running" in shown("two")
        writer.state(State.DONE, 100)
    output, _ = process.communicate()
    assert process.returncode == 0
    assert output.count("done") == 2 and "running" not in output


@pytest.mark.parametrize("state", [State.FAILED, State.PRUNED])
def test_retry_has_a_run_taken_up_again_from_where_it_was(root, state):
    run = make(root, state=state)
    assert cli("retry", "abc", "--root", root.path).returncode == 0
    assert (run.state.state, run.state.step) == (State.NEW, 7)
    assert checkpoints.steps(run.checkpoints) == [5]
    assert [row["step"] for row in run.rows()] == [5]


def test_a_run_that_is_done_is_trained_anew_only_from_scratch(root):
    run = make(root, state=State.DONE)
    refused = cli("retry", "abc", "--root", root.path)
    assert (refused.returncode, run.state.state) == (2, State.DONE)
    assert "give --from-scratch to train it anew" in refused.stderr
    assert cli("retry", "abc", "--root", root.path, "--from-scratch").returncode == 0
    assert (run.state.state, run.rows(), run.checkpoints.exists()) == (State.NEW, [], False)
    assert [event["event"] for event in run.events()][-2:] == ["started over", "new"]


def test_a_run_that_a_rule_ended_is_left_to_the_rule(root):
    run = make(root, state=State.STOPPED)
    refused = cli("retry", "abc", "--root", root.path)
    assert (refused.returncode, run.state.state) == (2, State.STOPPED)
    assert "a stop rule ended the run; a sweep without the rule takes it up" in refused.stderr


def test_a_run_in_training_is_not_touched(root):
    run = make(root, state=State.RUNNING)
    with RunWriter(run):
        refused = cli("retry", "abc", "--root", root.path, "--from-scratch")
    assert refused.returncode == 1
    assert refused.stderr == "run abc is being trained by another process\n"
    assert checkpoints.steps(run.checkpoints) == [5]


def test_gc_deletes_what_it_says_and_keeps_what_is_pinned(root):
    pruned, kept = "0123456789ab", "ba9876543210"
    make(root, pruned, State.PRUNED)
    make(root, kept, State.PRUNED)
    assert cli("pin", kept, "--root", root.path).returncode == 0
    dry = cli("gc", "--dry-run", "--root", root.path)
    assert "would go" in dry.stdout and pruned in dry.stdout and kept not in dry.stdout
    assert checkpoints.steps(root.run(pruned).checkpoints) == [5]
    done = cli("gc", "--root", root.path)
    assert done.returncode == 0 and "0.00 GiB freed" in done.stdout
    assert checkpoints.steps(root.run(pruned).checkpoints) == []
    assert checkpoints.steps(root.run(kept).checkpoints) == [5]
    assert cli("pin", kept, "--off", "--root", root.path).returncode == 0
    assert kept in cli("gc", "--root", root.path).stdout
    assert (
        "cannot free enough space: 0 GiB requested, and nothing more can be deleted"
        in cli("gc", "--root", root.path, "--disk-gib", "0").stdout
    )


@pytest.mark.parametrize(
    "words",
    [
        ("plan", "experiments/quickstart.yaml"),
        ("sweep", "experiments/quickstart.yaml"),
        ("status",),
        ("gc",),
        ("leaderboard",),
    ],
)
def test_a_root_that_is_a_file_is_refused(tmp_path, words):
    file = tmp_path / "file"
    file.touch()
    shown = cli(*words, "--root", file)
    assert (shown.returncode, shown.stdout) == (2, "")
    assert shown.stderr == f"'{file}' is a file; the root of all runs is a folder\n"


def test_a_disk_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "by-id").touch()
    shown = cli("sweep", "experiments/quickstart.yaml", "--root", tmp_path)
    assert shown.returncode == 1
    assert re.fullmatch(rf"'{tmp_path}/by-id/\w+/state.json': Not a directory\n", shown.stderr)


def test_stop_is_for_a_sweep_that_somebody_carries_out(root):
    directory = root.sweep("mine")
    directory.path.mkdir(parents=True)
    directory.record(manifest("mine", []))
    nobody = cli("stop", "mine", "--root", root.path)
    assert (nobody.returncode, directory.stop.exists()) == (2, False)
    assert "nobody is carrying out this sweep" in nobody.stderr
    held, released = threading.Event(), threading.Event()

    def hold() -> None:
        with FileLock(directory.lock, timeout=0):
            held.set()
            released.wait()

    holder = threading.Thread(target=hold)
    holder.start()
    assert held.wait()
    try:
        assert cli("stop", "mine", "--root", root.path).returncode == 0
        assert directory.stop.exists()
    finally:
        released.set()
        holder.join()
