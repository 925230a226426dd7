"""A sweep that is interrupted, edited and started again trains what is missing, and nothing else."""

import os
import signal
import subprocess
import sys

import yaml

from repa_lab import plan, sweep
from repa_lab.runs import RunsRoot, State
from tests.faults.processes import wait_until
from tests.orchestration.conftest import tiny

__all__ = ["tiny"]

WEIGHTS = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]
DONE_BEFORE = 7  # of 24: seed 0 of most arms


def write(file, tiny, weights):
    axes = {"regularizer.weight": weights}
    compare = {"baseline": {"regularizer.weight": weights[1]}}
    file.write_text(yaml.safe_dump(tiny(axes=axes, seeds=3, compare=compare), sort_keys=False))


def starts(run):
    return [event["step"] for event in run.events() if event["event"] == "running"]


def in_state(root, state):
    return {run.run_id for run in root.runs() if run.state.state is state}


def test_exactly_the_missing_runs_are_trained(tiny, tmp_path):
    file, root = tmp_path / "question.yaml", RunsRoot(tmp_path / "runs")
    write(file, tiny, WEIGHTS)
    asked = {entry.run.run_id for entry in plan(file, root.path).runs}
    assert len(asked) == 24
    command = [sys.executable, "-m", "repa_lab", "sweep", str(file), "--root", str(root.path), "--workers", "2"]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_until(lambda: len(in_state(root, State.DONE)) >= DONE_BEFORE)
    os.kill(first.pid, signal.SIGINT)
    assert first.wait() == 130
    done = in_state(root, State.DONE)
    before = {run.run_id: (starts(run), run.rows()) for run in root.runs() if run.run_id in done}
    assert DONE_BEFORE <= len(done) < 24

    write(file, tiny, [*WEIGHTS[1:], 0.9])  # an arm of which a run is done goes, and another comes
    planned = plan(file, root.path)
    missing = {run.run_id for run in planned.pending}
    edited = {entry.run.run_id for entry in planned.runs}
    assert len(edited & asked) == 21
    assert missing == edited - done
    gone = asked - edited
    left = {run.run_id: run.state for run in root.runs() if run.run_id in gone}
    second = sweep(file, root.path, workers=2)
    assert (second.trained, second.failures) == (len(missing), {})
    assert in_state(root, State.DONE) == done | missing
    assert {run_id: (starts(root.run(run_id)), root.run(run_id).rows()) for run_id in done} == before
    assert all(len(starts(root.run(run_id))) <= 2 for run_id in missing)
    assert {run_id: root.run(run_id).state for run_id in left} == left
    assert {orphan.run_id for orphan in plan(file, root.path).orphans} == set(left)
    assert sweep(file, root.path, workers=2).trained == 0
