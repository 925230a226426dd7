"""A sweep that is told to stop, or whose scheduler is shot, goes on where it was."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from repa_lab.data.cache import RECORD
from repa_lab.report import load_results
from repa_lab.runs import RunsRoot, State
from tests.faults.processes import wait_until
from tests.orchestration.conftest import TINY

STEPS = 300  # long enough to be stopped from another process, which takes seconds to start
PATIENCE_S = 120
INTERRUPTED = "interrupted; run the same command again to go on from the last checkpoints\n"


@pytest.fixture
def spec(tmp_path):
    """One run of many small steps, measured only at its end."""
    changed = {
        **TINY,
        "axes": {},
        "seeds": 1,
        "train": {**TINY["train"], "steps": STEPS},
        "evaluate": {**TINY["evaluate"], "every": STEPS},
    }
    file = tmp_path / "spec.yaml"
    file.write_text(yaml.safe_dump(changed, sort_keys=False))
    return file


def start(spec):
    command = [
        sys.executable,
        "-m",
        "repa_lab",
        "sweep",
        str(spec),
        "--root",
        str(spec.parent / "runs"),
        "--workers",
        "1",
    ]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_rows(root, count):
    """The run, once it has written that many rows."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        for run in root.runs():
            if len(run.rows()) >= count:
                return run
        time.sleep(0.02)
    raise AssertionError("the run wrote nothing")


def stop_from_another_terminal(spec, process):
    command = [sys.executable, "-m", "repa_lab", "stop", "tiny", "--root", str(spec.parent / "runs")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("end", "status"),
    [
        pytest.param(
            lambda spec, process: os.kill(process.pid, signal.SIGINT), 130, marks=pytest.mark.slow
        ),  # test_edit has it too
        (stop_from_another_terminal, 130),
        (lambda spec, process: os.kill(process.pid, signal.SIGKILL), -signal.SIGKILL),
    ],
    ids=["ctrl-c", "repa-lab stop", "killed"],
)
def test_the_run_in_hand_is_checkpointed_and_taken_up_again(spec, end, status):
    root = RunsRoot(spec.parent / "runs")
    first = start(spec)
    run = wait_for_rows(root, 5)
    end(spec, first)
    _, error = first.communicate(timeout=PATIENCE_S)
    assert first.returncode == status
    if status == 130:
        assert error == INTERRUPTED
    deadline = time.monotonic() + PATIENCE_S
    while run.state.state is State.RUNNING and time.monotonic() < deadline:
        time.sleep(0.05)  # the worker has noticed by its closed input, and is writing the checkpoint
    assert run.state.state is State.INTERRUPTED
    stopped = run.state.step
    assert 0 < stopped < STEPS

    second = start(spec)
    output, error = second.communicate(timeout=PATIENCE_S)
    assert second.returncode == 0, error
    assert "1 runs trained now, 0 failed" in output
    assert run.state.state is State.DONE
    assert [row["step"] for row in run.rows() if "loss/total" in row] == list(range(1, STEPS + 1))
    assert [event["step"] for event in run.events() if event["event"] == "resumed"] == [stopped]


def shown(command, spec, *options):
    given = [sys.executable, "-m", "repa_lab", command, *options, "--root", str(spec.parent / "runs")]
    return subprocess.run(given, capture_output=True, text=True, check=True).stdout


def test_a_run_whose_scheduler_and_workers_are_killed_has_one_status_everywhere(spec):
    settings = yaml.safe_load(spec.read_text())
    settings["train"]["steps"] = 100 * STEPS
    settings["regularizer"] = {"type": "none"}  # no features, which take longer than all the rest
    del settings["evaluate"]["encoder"]
    spec.write_text(yaml.safe_dump(settings, sort_keys=False))
    root = RunsRoot(spec.parent / "runs")
    first = start(spec)
    run = wait_for_rows(root, 1)
    said = {"status": json.loads(shown("status", spec, "tiny", "--json"))[0]["state"]}
    said["plan"] = json.loads(shown("plan", spec, str(spec), "--json"))["runs"][0]["state"]
    assert said == {"status": "running", "plan": "running"}
    workers = children_of(first)
    for pid in (first.pid, *workers):
        os.kill(pid, signal.SIGKILL)
    first.communicate(timeout=PATIENCE_S)
    wait_until(lambda: not run.is_held)
    assert run.state.state is State.RUNNING  # nobody was left to record anything else
    assert load_results(root.path / "tiny").runs["state"].tolist() == ["resumable"]
    assert "seed 0 is resumable at step" in shown("report", spec, "tiny")
    assert json.loads(shown("status", spec, "tiny", "--json"))[0]["state"] == "resumable"
    assert json.loads(shown("plan", spec, str(spec), "--json"))["runs"][0]["state"] == "resumable"


def children_of(process):
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def features_done(root):
    """The records of every cache of features."""
    return [np.fromfile(path, RECORD) for path in root.cache.glob("features/*/images.bin")]


def assert_ends_at_once(process, workers, root):
    """As one that is interrupted, its workers too, before the features are there, and leaves no sweep."""
    _, error = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, error) == (130, INTERRUPTED)
    assert workers and not [pid for pid in workers if Path(f"/proc/{pid}").exists()]
    assert not (root.path / "tiny").exists() and root.runs() == []
    assert all(not records["done"].all() for records in features_done(root))


def test_a_sweep_that_is_told_to_stop_while_it_prepares_ends_at_once_and_can_be_run_again(spec):
    """By `repa-lab stop` while its worker starts, then by Ctrl-C while features are computed; then it is let be."""
    settings = yaml.safe_load(spec.read_text())
    for encoder in (settings["regularizer"]["encoder"], settings["evaluate"]["encoder"]):
        encoder["image_size"] = 96  # which takes some five times longer than a worker is given to end
    settings["train"]["steps"] = settings["evaluate"]["every"] = 3
    spec.write_text(yaml.safe_dump(settings, sort_keys=False))
    root = RunsRoot(spec.parent / "runs")

    first = start(spec)
    wait_until(lambda: root.sweep("tiny").is_held and children_of(first))
    workers = children_of(first)
    stop_from_another_terminal(spec, first)
    assert_ends_at_once(first, workers, root)

    second = start(spec)
    wait_until(lambda: list(root.cache.glob("features/*")))
    workers = children_of(second)
    os.kill(second.pid, signal.SIGINT)
    assert_ends_at_once(second, workers, root)

    third = start(spec)
    output, error = third.communicate(timeout=PATIENCE_S)
    assert third.returncode == 0, error
    assert "1 runs trained now, 0 failed" in output
    assert [run.state.state for run in root.runs()] == [State.DONE]
    assert [records["done"].all() for records in features_done(root)] == [True]
