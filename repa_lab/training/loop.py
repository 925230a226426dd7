"""Train one run, from its first step or from its last checkpoint, to its end."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from repa_lab.registry import one_line
from repa_lab.runs import RunDirectory, RunWriter, State, checkpoints, forks
from repa_lab.runs.files import Row
from repa_lab.runs.forks import Fork
from repa_lab.runs.provenance import provenance
from repa_lab.spec import RunOptions
from repa_lab.spec.identity import Run
from repa_lab.tracking import Journal, Listener
from repa_lab.training.checkpoint import Progress
from repa_lab.training.needs import plugins_of
from repa_lab.training.protocol import milestone_names
from repa_lab.training.quality import DivergedError
from repa_lab.training.record import Dropped, Kept, Record
from repa_lab.training.trainer import Trainer

ShouldStop = Callable[[], State | None]
IsEnough = Callable[[Row], bool]


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
    """Train a run to its end and measure it on the way; what an earlier call left off is taken up at its last
    checkpoint.

    Args:
        run: what to train.
        directory: where it is recorded.
        options: device, precision, logging.
        cache: encoder features, latents and reference statistics, shared by all runs.
        listeners: hear the run's rows.
        should_stop: asked after every step (of several processes, the first is asked at logged steps); a state ends the
            run there, with a checkpoint.
        fork: where the run begins if it has no checkpoint yet: another run's first steps are its own as well.
        kept: steps whose state is kept for runs that begin from it.
        is_enough: asked about every measurement; yes ends the run there, with a checkpoint, as ``stopped``.

    Returns:
        The state in which the run came to rest.

    Raises:
        RunBusyError: another process trains it.
        DivergedError: the loss became infinite or NaN.
    """
    if not PartialState(cpu=options.device == "cpu").is_main_process:
        return _follow(run, directory, options, cache, kept, is_enough)
    with RunWriter(directory) as writer:
        if directory.status().is_final:
            return directory.state.state
        how = {"options": options.model_dump(mode="json"), "processes": PartialState().num_processes}
        writer.describe(run.to_json(), provenance() | how)
        writer.plugins(Path(origin.file) for origin in plugins_of(run.config))
        journal, progress = Journal(writer, listeners), Progress()
        try:
            if fork is not None and not checkpoints.steps(directory.checkpoints):
                _take(fork, run, writer, options, is_enough)
            trainer = Trainer(run, options, cache)
            progress = trainer.progress
            writer.protocols(trainer.protocols())
            if trainer.notes:
                writer.event("data", notes=trainer.notes)
            if _resume(trainer, directory):
                writer.event("resumed", step=progress.step)
            writer.rewind(progress.step)
            journal.state(State.RUNNING, progress.step)
            is_over = _is_over(trainer, directory, is_enough)
            state = State.STOPPED if is_over else fit(trainer, Kept(directory, journal), should_stop, kept, is_enough)
        except Exception as error:
            journal.state(State.FAILED, progress.step, one_line(error), isinstance(error, DivergedError))
            raise
        journal.state(state, progress.step)
        return state


def _follow(
    run: Run, directory: RunDirectory, options: RunOptions, cache: Path, kept: frozenset[int], is_enough: IsEnough
) -> State:
    """What all processes of a run but the first do: the same steps on their part of each batch, and no writing."""
    if directory.status().is_final:
        return directory.state.state
    trainer = Trainer(run, options, cache)
    _resume(trainer, directory)
    if _is_over(trainer, directory, is_enough):
        return State.STOPPED
    return fit(trainer, Dropped(), lambda: None, kept, is_enough)


def _take(fork: Fork, run: Run, writer: RunWriter, options: RunOptions, is_enough: IsEnough) -> None:
    """Begin with the first steps of another run, as many as there are, but none from beyond where this one would have ended."""
    parent, writes = RunDirectory(writer.run.path.with_name(fork.parent)), _writes(run, options)
    ends = [row["step"] for row in parent.rows() if writes(row) and is_enough(row)]
    last = min([fork.step, *ends])
    if steps := [step for step in forks.available(parent) if step <= last]:
        forks.take(parent, max(steps), writer, writes)


def _is_over(trainer: Trainer, directory: RunDirectory, is_enough: IsEnough) -> bool:
    """Whether a measurement up to where a run is taken up ends it: its own before a kill, or one that a fork gave it."""
    step = trainer.progress.step
    measured = (row for row in directory.rows() if row["step"] <= step)  # later ones are measured again
    return step < trainer.config.train.steps and any(is_enough(row) for row in measured)


def _writes(run: Run, options: RunOptions) -> Callable[[Row], bool]:
    """Whether a run writes a row by itself, for another one's rhythm may differ."""
    last, every, milestones = run.config.train.steps, run.config.evaluate.every, run.config.milestones
    rare = milestone_names(run.config)

    def writes(row: Row) -> bool:
        if rare & row.keys():
            return row["step"] in milestones
        return forks.written_by(row, last, every, options.checkpoint_every or every, options.log_every)

    return writes


def _resume(trainer: Trainer, directory: RunDirectory) -> bool:
    with trainer.accelerator.main_process_first():  # which moves damaged checkpoints out of the way
        found = checkpoints.latest(directory.checkpoints)
    if found:
        trainer.resume(found[1])
    return found is not None


def fit(
    trainer: Trainer,
    record: Record,
    should_stop: ShouldStop,
    kept: frozenset[int] = frozenset(),
    is_enough: IsEnough = lambda row: False,
) -> State:
    """Run all steps that are left: step, log, measure, save.

    Rows are written before the checkpoint of their step. A kill in between repeats the work from the checkpoint before,
    whose later rows are dropped on resuming: nothing is lost and nothing appears twice.

    Raises:
        DivergedError: the loss, or what the denoiser draws, is not finite.
    """
    progress, last = trainer.progress, trainer.config.train.steps
    measure_every = trainer.config.evaluate.every
    save_every = trainer.options.checkpoint_every or measure_every
    started = time.perf_counter()
    for batch in trainer.batches():
        outcome = trainer.step(batch)
        step = progress.step
        measure = step % measure_every == 0 or step == last
        due = measure or step % save_every == 0 or step % trainer.options.log_every == 0
        stop = _agreed(trainer, should_stop, due)
        if due or stop or step in kept:
            row = outcome.row()  # waits for the device, so that the seconds are those of finished steps
            progress.seconds += time.perf_counter() - started
            if not math.isfinite(row["loss/total"]):
                raise DivergedError(f"the loss is {row['loss/total']} at step {step}")
            if due:  # not for the stop: a run's rows do not tell where it was interrupted
                record.row({**progress.row(), **row})
            if measure:
                rows, samples = trainer.measure()
                for found in rows:
                    record.row(found)
                    stop = stop or (State.STOPPED if is_enough(found) else None)
                record.samples(step, samples)
            if measure or stop or step % save_every == 0:
                record.checkpoint(step, trainer.save)
            if step in kept:
                record.fork(step, trainer.save)
            started = time.perf_counter()
        if stop and step < last:
            return stop
    return State.DONE


def _agreed(trainer: Trainer, should_stop: ShouldStop, due: bool) -> State | None:
    """Whether to stop, as the first process says; asking all of them costs a wait, so they are asked at logged steps only."""
    if trainer.accelerator.num_processes == 1:
        return should_stop()
    answer = [should_stop()] if due else [None]
    return broadcast_object_list(answer)[0] if due else None
