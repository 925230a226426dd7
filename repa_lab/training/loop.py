"""Train one run to its end, from its first step or from its last checkpoint."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Self

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from repa_lab.registry import one_line
from repa_lab.runs import RunDirectory, RunWriter, State, checkpoints
from repa_lab.runs.checkpoints import Fork
from repa_lab.runs.directory import provenance
from repa_lab.runs.files import Row
from repa_lab.spec import RunOptions
from repa_lab.spec.identity import Run
from repa_lab.tracking import Listener, Listeners
from repa_lab.training.checkpoint import Progress
from repa_lab.training.device import is_on_cpu, resolved
from repa_lab.training.evaluate import DivergedError, write_grid
from repa_lab.training.resolve import milestone_names, plugins_of
from repa_lab.training.speed import SpeedMeter
from repa_lab.training.trainer import Trainer

ShouldStop = Callable[[], State | None]
IsEnough = Callable[[Row], bool]
_ALL = 1 << 30


class RunRecorder:
    """Writes the results of a training loop to the run directory; only the first process of a run has one.

    As a context manager it waits, at the end, for the samples that are being written.
    """

    def __init__(self, writer: RunWriter, listeners: Listeners) -> None:
        self._directory, self._writer, self._listeners = writer.run, writer, listeners
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._grid: tuple[int, Path, Future[None]] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        with self._thread:
            self._announce_samples()

    def rows(self, rows: Sequence[Row]) -> None:
        """Append metric rows and pass them to the listeners.

        Raises:
            OSError: the samples before them could not be written.
        """
        self._announce_samples()
        for row in rows:
            self._writer.row(row)
            self._listeners.row(row)

    def samples(self, step: int, pixels: torch.Tensor) -> None:
        """Write samples, uint8 ``(n, C, H, W)``, as one PNG in a thread, while the next steps run.

        A process that is killed meanwhile leaves no PNG of this step, or the whole one.
        """
        path = self._directory.samples / f"step-{step:08d}.png"
        self._grid = step, path, self._thread.submit(write_grid, pixels, path)

    def _announce_samples(self) -> None:
        """Wait until the last samples are written, and pass them to the listeners."""
        if self._grid is not None:
            (step, path, written), self._grid = self._grid, None
            written.result()
            self._listeners.image(step, path)

    def checkpoint(self, step: int, save: Callable[[Path], None]) -> None:
        """Write a checkpoint with ``save(folder)`` and delete all but the newest two."""
        checkpoints.commit(self._directory.checkpoints, step, functools.partial(self._save, save))

    def fork(self, step: int, save: Callable[[Path], None]) -> None:
        """Write a checkpoint that is kept for runs that begin from it, after the samples that they copy."""
        self._announce_samples()
        checkpoints.commit(self._directory.forks, step, functools.partial(self._save, save), keep=_ALL)

    def _save(self, save: Callable[[Path], None], folder: Path) -> None:
        save(folder)
        checkpoints.sign(folder, self._directory.path)


def train(
    run: Run,
    directory: RunDirectory,
    options: RunOptions,
    cache: Path,
    listeners: Sequence[Listener] = (),
    should_stop: ShouldStop = lambda: None,
    fork: Fork | None = None,
    kept: frozenset[int] = frozenset(),
    is_enough: IsEnough = lambda row: False,
) -> State:
    """Train a run to its end, from its last checkpoint if there is one, and measure it on the way.

    Args:
        cache: folder of encoder features, latents and reference statistics, shared by all runs.
        should_stop: asked after every step (with several processes, in the first one at logged steps); a state ends the
            run there with a checkpoint.
        fork: the run whose first steps this one shares; used if this run has no checkpoint yet.
        kept: steps whose state is kept for runs that begin from it.
        is_enough: asked about every measurement; True ends the run there with a checkpoint, as ``stopped``.

    Returns:
        The state in which the run ended.

    Raises:
        RunBusyError: another process trains the run.
        DivergedError: the loss or a sample is not finite.
        DamagedFileError: no checkpoint fits the metric rows.
    """
    if not PartialState(cpu=is_on_cpu(options)).is_main_process:
        if directory.status().is_final:
            return directory.state.state
        trainer = Trainer(run, options, cache)
        _resume(trainer, directory)
        if _is_over(trainer, directory, is_enough):
            return State.STOPPED
        return fit(trainer, None, lambda: None, kept, is_enough)
    with RunWriter(directory) as writer:
        if directory.status().is_final:
            return directory.state.state
        options = resolved(options)
        started_with = {"options": options.model_dump(mode="json"), "processes": PartialState().num_processes}
        writer.describe(run.to_json(), provenance() | started_with)
        writer.plugins(Path(origin.file) for origin in plugins_of(run.config))
        trackers, progress = Listeners(writer, listeners), Progress()
        try:
            if fork is not None and not checkpoints.steps(directory.checkpoints):
                _begin_from(fork, run, writer, options, is_enough)
            trainer = Trainer(run, options, cache)
            progress = trainer.progress
            writer.protocols(trainer.protocols())
            if trainer.notes:
                writer.event("data", notes=trainer.notes)
            if _resume(trainer, directory):
                writer.event("resumed", step=progress.step)
            writer.rewind(progress.step)
            writer.state(State.RUNNING, progress.step)
            is_over = _is_over(trainer, directory, is_enough)
            with RunRecorder(writer, trackers) as recorder:
                state = State.STOPPED if is_over else fit(trainer, recorder, should_stop, kept, is_enough)
        except Exception as error:
            writer.state(State.FAILED, progress.step, one_line(error), isinstance(error, DivergedError))
            trackers.finish(State.FAILED)
            raise
        writer.state(state, progress.step)
        trackers.finish(state)
        return state


def fit(
    trainer: Trainer,
    recorder: RunRecorder | None,
    should_stop: ShouldStop,
    kept: frozenset[int] = frozenset(),
    is_enough: IsEnough = lambda row: False,
) -> State:
    """Take all remaining steps: step, log, measure, save.

    Rows are written before the checkpoint of their step. After a kill in between, the work since the previous
    checkpoint is repeated and its rows are dropped: nothing is lost and nothing appears twice.

    Raises:
        DivergedError: the loss or a sample is not finite.
    """
    progress, last = trainer.progress, trainer.config.train.steps
    measure_every = trainer.config.evaluate.every
    save_every = trainer.options.checkpoint_every or measure_every
    meter = SpeedMeter(trainer.config, trainer.options, progress, trainer.device, trainer.accelerator.num_processes)
    for batch in meter.waiting_for(trainer.batches()):
        outcome = trainer.step(batch)
        step = progress.step
        measure = step % measure_every == 0 or step == last
        due = measure or step % save_every == 0 or step % trainer.options.log_every == 0
        stop = _agreed(trainer, should_stop, due)
        if due or stop or step in kept:
            row = outcome.row()  # waits for the device, so that the seconds are those of finished steps
            trainer.note_encoder_seconds()
            speed = meter.row()
            if not math.isfinite(row["loss/total"]):
                raise DivergedError(f"the loss is {row['loss/total']} at step {step}")
            if recorder and due:  # not for a stop alone: the rows of a run do not depend on interruptions
                recorder.rows([{**progress.row(), **row, **speed}])
            if measure:
                rows, samples = trainer.measure()
                if any(is_enough(measured) for measured in rows):
                    stop = stop or State.STOPPED
                if recorder:
                    recorder.rows(rows)
                    recorder.samples(step, samples)
            if recorder and (measure or stop or step % save_every == 0):
                recorder.checkpoint(step, trainer.save)
            if recorder and step in kept:
                recorder.fork(step, trainer.save)
            meter.start()
        if stop and step < last:
            return stop
    return State.DONE


def _resume(trainer: Trainer, directory: RunDirectory) -> bool:
    """Load the newest usable checkpoint; return whether there is one."""
    with trainer.accelerator.main_process_first():  # the first process moves damaged checkpoints aside
        newest = checkpoints.resumable(directory.path)
    if newest:
        trainer.resume(newest[1])
    return newest is not None


def _is_over(trainer: Trainer, directory: RunDirectory, is_enough: IsEnough) -> bool:
    """Return whether a measurement before the resumed step, of this run or of its fork, already ends the run."""
    step = trainer.progress.step
    measured = (row for row in directory.rows() if row["step"] <= step)  # later rows will be measured again
    return step < trainer.config.train.steps and any(is_enough(row) for row in measured)


def _begin_from(fork: Fork, run: Run, writer: RunWriter, options: RunOptions, is_enough: IsEnough) -> None:
    """Copy the first steps of another run, up to the step at which this run would have ended."""
    parent = RunDirectory(writer.run.path.with_name(fork.parent))
    last, every, milestones = run.config.train.steps, run.config.evaluate.every, run.config.milestones
    at_milestones = milestone_names(run.config)

    def is_written(row: Row) -> bool:
        """Return whether this run would write the row itself; the runs may log at different steps."""
        if at_milestones & row.keys():
            return row["step"] in milestones
        return checkpoints.written_by(row, last, every, options.checkpoint_every or every, options.log_every)

    ends = (row["step"] for row in parent.rows() if is_written(row) and is_enough(row))
    last_shared = min([fork.step, *ends])
    if steps := [step for step in checkpoints.forkable_steps(parent) if step <= last_shared]:
        checkpoints.take_fork(parent, max(steps), writer, is_written)


def _agreed(trainer: Trainer, should_stop: ShouldStop, due: bool) -> State | None:
    """Return the stop that the first process asks for; several processes synchronise at logged steps only."""
    if trainer.accelerator.num_processes == 1:
        return should_stop()
    answer = [should_stop()] if due else [None]
    return broadcast_object_list(answer)[0] if due else None
