"""Interrupt anywhere, lose nothing: real processes, killed without warning."""

from __future__ import annotations

import multiprocessing
import random
import shutil
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from repa_lab.runs import RunDirectory, State, checkpoints
from tests.training.conftest import assert_same, cache, make_run, rows, run_to_end, weights

__all__ = ["cache"]

SETTINGS = {
    "train.steps": 18,
    "evaluate.every": 9,
    "regularizer.schedule": {"type": "linear", "warmup_steps": 2, "decay_steps": 12},
}
OPTIONS = {"log_every": 2, "checkpoint_every": 3}
PROCESSES = multiprocessing.get_context("fork")  # of this process, which has torch imported; killing them is real


def train_to_end(directory: RunDirectory, cache: Path) -> RunDirectory:
    return run_to_end(make_run(**SETTINGS), directory, cache, **OPTIONS)


def kill_when(process: BaseProcess, reached: Callable[[], bool]) -> bool:
    """Start a process and kill it as soon as ``reached``; whether it was still alive."""
    process.start()
    while process.is_alive() and not reached():
        time.sleep(0.001)
    killed = process.is_alive()
    process.kill()
    process.join()
    return killed


@pytest.fixture(scope="module")
def whole(cache, tmp_path_factory) -> RunDirectory:
    """The run, uninterrupted."""
    return train_to_end(RunDirectory(tmp_path_factory.mktemp("whole")), cache)


def assert_nothing_lost(directory: RunDirectory, whole: RunDirectory) -> None:
    assert directory.state.state is State.DONE
    assert_same(weights(directory), weights(whole))
    assert rows(directory) == rows(whole)
    assert len({(row["step"], "loss/total" in row) for row in rows(directory)}) == len(rows(directory))
    assert checkpoints.steps(directory.checkpoints) == checkpoints.steps(whole.checkpoints)
    assert not list(directory.checkpoints.glob(".tmp-*"))


def being_saved(directory: RunDirectory) -> bool:
    return any(directory.checkpoints.glob(".tmp-*/*"))


def measured(directory: RunDirectory) -> bool:
    return any("heldout/cka" in row for row in directory.rows())


MOMENTS = {
    "while a checkpoint is written": being_saved,
    "between a measurement and its checkpoint": measured,
    "between checkpoints": lambda directory: any(row["step"] >= 4 for row in directory.rows()),
}


@pytest.mark.parametrize("reached", MOMENTS.values(), ids=MOMENTS.keys())
def test_killed_at_a_given_moment(whole, cache, tmp_path, reached):
    directory, is_killed = RunDirectory(tmp_path / "run"), False
    while not is_killed:  # on a busy machine the moment may pass unseen, and the run end
        shutil.rmtree(directory.path, ignore_errors=True)
        process = PROCESSES.Process(target=train_to_end, args=(directory, cache))
        is_killed = kill_when(process, lambda: reached(directory)) and directory.state.state is State.RUNNING
    train_to_end(directory, cache)
    assert_nothing_lost(directory, whole)


def test_killed_at_random_again_and_again(whole, cache, tmp_path):
    seed = random.randrange(2**32)
    print(f"the random moments are those of seed {seed}")
    directory, chance, kills = RunDirectory(tmp_path / "run"), random.Random(seed), 0
    for _ in range(4):
        steps = [row["step"] for row in directory.rows()]
        goal, delay = max(steps, default=0) + 1, chance.uniform(0, 0.15)
        started: list[float] = []

        def reached(goal: int = goal, delay: float = delay, started: list[float] = started) -> bool:
            if not started and any(row["step"] >= goal for row in directory.rows()):
                started.append(time.monotonic())
            return bool(started) and time.monotonic() - started[0] >= delay

        kills += kill_when(PROCESSES.Process(target=train_to_end, args=(directory, cache)), reached)
    assert kills >= 1
    train_to_end(directory, cache)
    assert_nothing_lost(directory, whole)
