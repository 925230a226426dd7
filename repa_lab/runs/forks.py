"""Runs that begin where another one was: what two runs have in common is trained once.

forks/step-00000600/   in the other run's directory: a checkpoint that is kept until nobody needs it
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from repa_lab.files import fsync
from repa_lab.runs import checkpoints
from repa_lab.runs.directory import RunDirectory, RunWriter
from repa_lab.runs.files import Row


@dataclass(frozen=True)
class Fork:
    """The first ``step`` steps are those of the run ``parent``."""

    parent: str
    step: int


def available(run: RunDirectory) -> list[int]:
    """The steps at which others can take a run's state, ascending."""
    return sorted({*checkpoints.steps(run.forks), *checkpoints.steps(run.checkpoints)})


def take(parent: RunDirectory, step: int, child: RunWriter, is_childs: Callable[[Row], bool]) -> bool:
    """Give a run that has no checkpoint yet another's state after ``step``, and what was written up to there.

    Args:
        parent: the run whose steps are shared.
        step: how many of them.
        child: the run that goes on from there.
        is_childs: whether the child would have written a row of the parent's, whose rhythm may differ.

    Returns:
        False where the parent has no such checkpoint, or a damaged one: the child then trains from the start.
    """
    source = _whole(parent, step)
    if source is None:
        return False
    rows = [row for row in parent.rows() if row["step"] <= step and is_childs(row)]
    measured = {row["step"] for row in rows if not _is_of_training(row)}
    child.run.samples.mkdir(exist_ok=True)
    for at, grid in parent.sample_grids().items():
        if at in measured:
            shutil.copyfile(grid, child.run.samples / grid.name)
    child.replace_rows(rows)
    child.event("forked", parent=parent.run_id, step=step)
    checkpoints.commit(child.run.checkpoints, step, lambda folder: _copy(source, folder, child.run.path))
    return True


def written_by(row: Row, last: int, measure_every: int, save_every: int, log_every: int) -> bool:
    """Whether a run of ``last`` steps with this rhythm writes a row; see :func:`repa_lab.training.loop.fit`."""
    step = row["step"]
    measures = step % measure_every == 0 or step == last
    return measures or (_is_of_training(row) and (step % save_every == 0 or step % log_every == 0))


def clear(run: RunDirectory) -> None:
    """Drop the checkpoints that were kept for others."""
    shutil.rmtree(run.forks, ignore_errors=True)


def _is_of_training(row: Row) -> bool:
    return "loss/total" in row


def _whole(run: RunDirectory, step: int) -> Path | None:
    for folder in (run.forks, run.checkpoints):
        path = folder / f"step-{step:08d}"
        if path.is_dir() and checkpoints.is_whole(path):
            return path
    return None


def _copy(source: Path, folder: Path, child: Path) -> None:
    """Link the files of a checkpoint, or copy them if the file system cannot link, and sign it for the child run."""
    for path in source.iterdir():
        if path.name in (checkpoints.MANIFEST, checkpoints.SIGNATURE):
            continue
        try:
            os.link(path, folder / path.name)
        except OSError:
            shutil.copyfile(path, folder / path.name)
        fsync(folder / path.name)
    checkpoints.sign(folder, child)
