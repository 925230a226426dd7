"""A sweep that is told to stop, or whose scheduler is shot, goes on where it was."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from repa_lab import sweep
from repa_lab.data.cache import RECORD
from repa_lab.report import load_results
from repa_lab.runs import RunsRoot, State
from tests.faults.processes import steps_of, wait_until
from tests.orchestration.conftest import tiny
from tests.test_cli import cli

__all__ = ["tiny"]

STEPS = 300
INTERRUPTED = "interrupted; run the same command again to go on from the last checkpoints\n"
# An encoder whose features are not ready before there is a file.
WAITING = """\
import time
from pathlib import Path

import torch

from repa_lab.plugins import encoder

FOLDER = Path(__file__).parent


class Patches(torch.nn.PixelUnshuffle):
    def forward(self, pixels):
        while list(FOLDER.glob("runs/cache/features/*")) and not (FOLDER / "go").exists():
            time.sleep(0.01)
        return super().forward(pixels)


@encoder("waiting", patch_size=4, dim=48, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), resize="bilinear")
def waiting(weights):
    return Patches(4)
"""


@pytest.fixture
def root(tmp_path) -> RunsRoot:
    return RunsRoot(tmp_path / "runs")


@pytest.fixture
def ask(tiny, tmp_path):
    """Writes a spec of one run, measured only at its end."""

    def write(steps: int, **changes) -> Path:
        train, evaluate = {**tiny()["train"], "steps": steps}, {**tiny()["evaluate"], "every": steps}
        spec = tiny(axes={}, seeds=1, train=train, **changes)
        spec["evaluate"] = evaluate | changes.get("evaluate", {})
        file = tmp_path / "spec.yaml"
        file.write_text(yaml.safe_dump(spec, sort_keys=False))
        return file

    return write


def start(file: Path, root: RunsRoot) -> subprocess.Popen:
    command = [sys.executable, "-m", "repa_lab", "sweep", str(file), "--root", str(root.path), "--workers", "1"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def stop(root: RunsRoot) -> None:
    assert cli("stop", "tiny", "--root", root.path).returncode == 0


def wait_for_steps(root: RunsRoot, count: int):
    """The run, once it has taken so many steps."""
    wait_until(lambda: any(len(steps_of(run)) >= count for run in root.runs()))
    (run,) = root.runs()
    return run


def assert_interrupted(process: subprocess.Popen) -> None:
    _, error = process.communicate()
    assert (process.returncode, error) == (130, INTERRUPTED)


def test_a_run_that_is_stopped_and_then_killed_is_checkpointed_and_taken_up_again(ask, root):
    file = ask(STEPS)
    first = start(file, root)
    run = wait_for_steps(root, 5)
    stop(root)
    assert_interrupted(first)
    assert run.state.state is State.INTERRUPTED
    stopped = run.state.step
    assert 0 < stopped < STEPS

    second = start(file, root)
    wait_for_steps(root, stopped + 5)
    second.kill()
    second.communicate()
    assert second.returncode == -signal.SIGKILL
    # The worker notices by its closed input, and writes a checkpoint.
    wait_until(lambda: run.state.state is not State.RUNNING)
    assert run.state.state is State.INTERRUPTED
    killed = run.state.step
    assert stopped < killed < STEPS

    outcome = sweep(file, root.path, workers=1)
    assert (outcome.trained, outcome.failures) == (1, {})
    assert run.state.state is State.DONE
    assert steps_of(run) == list(range(1, STEPS + 1))
    assert [event["step"] for event in run.events() if event["event"] == "resumed"] == [stopped, killed]


def test_a_run_whose_scheduler_and_workers_are_killed_has_one_status_everywhere(ask, root):
    # Without features, and with more steps than there is time for.
    file = ask(100 * STEPS, regularizer={"type": "none"}, evaluate={"encoder": None})

    def told() -> dict[str, str]:
        (run,) = json.loads(cli("status", "tiny", "--json", "--root", root.path).stdout)
        (planned,) = json.loads(cli("plan", file, "--json", "--root", root.path).stdout)["runs"]
        return {"status": run["state"], "plan": planned["state"]}

    process = start(file, root)
    run = wait_for_steps(root, 1)
    assert told() == {"status": "running", "plan": "running"}
    for pid in (process.pid, *children_of(process.pid)):
        os.kill(pid, signal.SIGKILL)
    process.communicate()
    wait_until(lambda: not run.is_held)
    assert run.state.state is State.RUNNING  # nobody was left to record anything else
    assert load_results(root.path / "tiny").runs["state"].tolist() == ["resumable"]
    assert "seed 0 is resumable at step" in cli("report", "tiny", "--root", root.path).stdout
    assert told() == {"status": "resumable", "plan": "resumable"}


def children_of(pid: int) -> list[int]:
    """The processes that a process has started, and theirs."""
    children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [*children, *(grandchild for child in children for grandchild in children_of(child))]


def test_a_sweep_that_is_told_to_stop_while_it_prepares_ends_at_once_and_can_be_run_again(ask, root, tmp_path):
    """By `repa-lab stop` while its worker starts, then by Ctrl-C while features are computed; then it is let be."""
    (tmp_path / "waiting.py").write_text(WAITING)
    encoder = {"name": "waiting", "image_size": 8}
    regularizer = {"type": "repa", "encoder": encoder, "projector": {"width": 16}}
    file = ask(3, plugins=["waiting.py"], regularizer=regularizer, evaluate={"encoder": encoder})

    def features_done() -> list[bool]:
        return [np.fromfile(path, RECORD)["done"].all() for path in root.cache.glob("features/*/images.bin")]

    def assert_ends_at_once(process: subprocess.Popen, workers: list[int]) -> None:
        """Its workers too, before the features are there, and leaves no sweep."""
        assert_interrupted(process)
        assert workers
        wait_until(lambda: not [pid for pid in workers if Path(f"/proc/{pid}").exists()])
        assert not (root.path / "tiny").exists() and root.runs() == []
        assert not any(features_done())

    first = start(file, root)
    wait_until(lambda: root.sweep("tiny").is_held and children_of(first.pid))
    workers = children_of(first.pid)
    stop(root)
    assert_ends_at_once(first, workers)

    second = start(file, root)
    wait_until(lambda: list(root.cache.glob("features/*")))
    workers = children_of(second.pid)
    second.send_signal(signal.SIGINT)
    assert_ends_at_once(second, workers)

    (tmp_path / "go").touch()
    assert sweep(file, root.path, workers=1).trained == 1
    assert [run.state.state for run in root.runs()] == [State.DONE]
    assert features_done() == [True]
