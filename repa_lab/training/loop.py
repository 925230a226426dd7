"""Train one run to its end, from its first step or from its last checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
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
from repa_lab.spec import ResolvedOptions, RunOptions
from repa_lab.spec.identity import Run
from repa_lab.tracking import Listener, Listeners
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
        """Append metric rows and pass them to the listeners; OSError if the samples before were not written."""
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

    def checkpoint(self, step: int, save: Callable[[Path], None], is_fork: bool = False) -> None:
        """Write a checkpoint with ``save(folder)``; the newest two stay, and all from which other runs begin."""
        if is_fork:
            self._announce_samples()  # for runs that begin here copy them
            checkpoints.commit(self._directory.forks, step, save, keep=_ALL)
        else:
            checkpoints.commit(self._directory.checkpoints, step, save)

    def begin(self, step: int, is_resumed: bool) -> None:
        """Record that the run trains from ``step`` on, and drop what it recorded after it."""
        if is_resumed:
            self._writer.event("resumed", step=step)
        self._writer.rewind(step)
        self._writer.state(State.RUNNING, step)


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
    is_main = PartialState(cpu=is_on_cpu(options)).is_main_process
    with RunWriter(directory) if is_main else nullcontext() as writer:
        if directory.status().is_final:
            return directory.state.state
        if writer is None:
            return fit(Trainer(run, options, cache), directory, None, lambda: None, kept, is_enough)
        trackers, trainer = Listeners(writer, listeners), None
        try:
            trainer = _open(run, writer, resolved(options), cache, fork, is_enough)
            with RunRecorder(writer, trackers) as recorder:
                state = fit(trainer, directory, recorder, should_stop, kept, is_enough)
        except Exception as error:
            step = trainer.progress.step if trainer else 0
            writer.state(State.FAILED, step, one_line(error), isinstance(error, DivergedError))
            trackers.finish(State.FAILED)
            raise
        writer.state(state, trainer.progress.step)
        trackers.finish(state)
        return state


def _open(
    run: Run, writer: RunWriter, options: ResolvedOptions, cache: Path, fork: Fork | None, is_enough: IsEnough
) -> Trainer:
    """Record what the run is, take its shared first steps if it has no checkpoint yet, and build its components."""
    started_with = {"options": options.model_dump(mode="json"), "processes": PartialState().num_processes}
    writer.describe(run.to_json(), provenance() | started_with)
    writer.plugins(Path(origin.file) for origin in plugins_of(run.config))
    if fork is not None and not checkpoints.steps(writer.run.checkpoints):
        _begin_from(fork, run, writer, options, is_enough)
    trainer = Trainer(run, options, cache)
    writer.protocols(trainer.protocols())
    if trainer.notes:
        writer.event("data", notes=trainer.notes)
    return trainer


def fit(
    trainer: Trainer,
    directory: RunDirectory,
    recorder: RunRecorder | None,
    should_stop: ShouldStop,
    kept: frozenset[int],
    is_enough: IsEnough,
) -> State:
    """Resume, and take all remaining steps: step, log, measure, save; without a recorder nothing is written.

    Rows are written before the checkpoint of their step. After a kill in between, the work since the previous
    checkpoint is repeated and its rows are dropped: nothing is lost and nothing appears twice.

    Raises:
        DivergedError: the loss or a sample is not finite.
    """
    if _resume(trainer, directory, recorder, is_enough):
        return State.STOPPED
    progress, last, measure_every = trainer.progress, trainer.config.train.steps, trainer.config.evaluate.every
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
                recorder.checkpoint(step, trainer.save, is_fork=True)
            meter.start()
        if stop and step < last:
            return stop
    return State.DONE


def _resume(trainer: Trainer, directory: RunDirectory, recorder: RunRecorder | None, is_enough: IsEnough) -> bool:
    """Load the newest usable checkpoint; return whether a measurement before it, also of a fork, ends the run."""
    with trainer.accelerator.main_process_first():  # the first process moves damaged checkpoints aside
        newest = checkpoints.resumable(directory.path)
    if newest:
        trainer.resume(newest[1])
    step = trainer.progress.step
    if recorder:
        recorder.begin(step, is_resumed=newest is not None)
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
    return broadcast_object_list([should_stop()])[0] if due else None
