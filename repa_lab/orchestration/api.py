"""Plan a sweep, carry it out, or train one of its runs: from a program as from the command line."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console

from repa_lab.align.settings import REPASettings
from repa_lab.errors import StateError
from repa_lab.orchestration.checks import check
from repa_lab.orchestration.cost import require_budget
from repa_lab.orchestration.executors import join_processes
from repa_lab.orchestration.executors.local import LocalExecutor, local_slots
from repa_lab.orchestration.plan import Plan, PlannedRun, identify_run, make_plan
from repa_lab.orchestration.progress import ProgressView, default_console
from repa_lab.orchestration.scheduler import Executor, ExecutorError, Scheduler, SweepBrokenError, TrainJob, Work
from repa_lab.orchestration.sharing import RunList
from repa_lab.runs import RunDirectory, RunsRoot, State
from repa_lab.runs.files import Row, require_no_links
from repa_lab.runs.root import DEFAULT_ROOT, SweepDirectory
from repa_lab.spec import Arm, Experiment, RunConfig, RunOptions, SpecError, load_spec
from repa_lab.tracking.server import WandbRefusalError, settle_mode
from repa_lab.tracking.wandb import untracked

_LOCK_PATIENCE_S = 0.5  # a process that only looks whether a sweep is locked holds the lock for a moment

Source = str | Path | Mapping[str, Any] | Experiment


class SweepBusyError(StateError):
    """Another process is carrying out this sweep."""


@dataclass(frozen=True)
class SweepOutcome:
    """What came of a sweep.

    Attributes:
        directory: the sweep's folder, with its report; `load_results` takes its path.
        trained: the number of runs trained now; runs that were done before are not among them.
        failures: the reason of every run that failed now, by its id.
        diverged: the reason of every run of a search that diverged now, by its id; such a run is a result.
        stopped: why runs were not started; None if none were left out.
        untracked: why W&B lacks a run or some of its rows, by the run's id; empty if W&B is disabled.
    """

    directory: SweepDirectory
    trained: int
    failures: Mapping[str, str]
    diverged: Mapping[str, str] = field(default_factory=dict)
    stopped: str | None = None
    untracked: Mapping[str, str] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        """The sweep's folder."""
        return self.directory.path


def plan(
    source: Source,
    root: str | Path = DEFAULT_ROOT,
    overrides: Mapping[str, Any] | None = None,
    fragments: Sequence[str | Path] = (),
) -> Plan:
    """Plan a sweep: its runs, which of them are done, and what stands in the way. Creates nothing.

    Args:
        source: a spec file, its fields as a mapping, or an experiment from `load_spec`.
        root: the runs root.
        overrides: dotted paths to values, laid over the spec.
        fragments: files laid between the spec and the overrides; see `load_spec`.

    Raises:
        SpecError: with every problem of the spec.
    """
    return make_plan(_load(source, overrides, fragments), RunsRoot(Path(root)))


def sweep(
    source: Source,
    root: str | Path = DEFAULT_ROOT,
    overrides: Mapping[str, Any] | None = None,
    workers: int | None = None,
    console: Console | None = None,
    rehearse: bool = False,
    fragments: Sequence[str | Path] = (),
    replace: bool = False,
) -> SweepOutcome:
    """Train what a sweep asks for and is not done yet, then write its report.

    Args:
        source: as for :func:`plan`, like ``root``, ``overrides`` and ``fragments``.
        workers: the number of runs that go on at a time; None takes ``run.workers``, else one for each GPU slot, one
            for each core without a GPU, or as many as the cluster has room for.
        console: where progress is shown; None is a bar in a notebook, and nothing elsewhere.
        rehearse: whether to go through all of it with tiny random models and a few images instead, in another root.
        replace: whether to take the place of another sweep that stands under this name, whose runs stay.

    Raises:
        SpecError: the spec is wrong, asks for what cannot be had, or has another sweep's name; nothing was created.
        SweepBusyError: another process carries out this sweep.
        SweepBrokenError: the workers cannot work at all, or the first runs all failed for the same reason.
    """
    experiment, console = _load(source, overrides, fragments), console or default_console()
    planned = _rehearsed(experiment, Path(root)) if rehearse else make_plan(experiment, RunsRoot(Path(root)))
    if problem := planned.blocked or (None if replace or rehearse else planned.other_sweep):
        raise SpecError([problem])
    if not rehearse:
        require_budget(planned)
        for warning in planned.warnings:
            console.out(warning, highlight=False)
    directory = planned.root.sweep(planned.experiment.name)
    with _locked(directory):
        planned.root.adopt_copies()
        outcome = _carry_out(planned, directory, workers, console, rehearse)
    from repa_lab.report.page import write_report  # imports pandas and matplotlib, which `plan` does not need

    write_report(directory)
    return outcome


def run_one(
    source: Source,
    arm: str | None,
    seed: int | None,
    root: str | Path = DEFAULT_ROOT,
    overrides: Mapping[str, Any] | None = None,
    console: Console | None = None,
    fragments: Sequence[str | Path] = (),
) -> tuple[RunDirectory, State]:
    """Train one run of an experiment in this process: for debugging, and under another scheduler.

    Args:
        source: as for :func:`sweep`, like all that is not named here.
        arm: the arm's label; None takes the first arm.
        seed: one of the experiment's seeds; None takes the first.

    Returns:
        The run's directory, and the state in which the run came to rest.

    Raises:
        SpecError: the spec is wrong, has no such arm or seed, or asks for what cannot be had.
        LauncherError: the environment announces other processes of the run, and they do not come.
    """
    planned, console = plan(source, root, overrides, fragments), console or default_console()
    entry, name, cache = _choose(planned, arm, seed), planned.experiment.name, planned.root.cache
    if entry.blocked:
        raise SpecError([entry.blocked])
    join_processes(planned.experiment.run)
    planned.root.adopt_copies()
    from repa_lab.orchestration.worker import open_trackers
    from repa_lab.training.loop import train

    options, unreachable = _settle_tracking(planned.experiment)
    run, directory, task = entry.run, planned.root.run(entry.run.run_id), entry.task
    for warning in filter(None, (unreachable, *planned.warnings)):
        console.out(warning, highlight=False)
    with ProgressView(console, name, 1) as view:
        _prepare([run.config], entry.arm, options, cache, view)
        trackers = open_trackers(TrainJob(task, name, options, planned.root))
        view.started(run.run_id, task.name, run.config.train.steps)
        listeners = [_ViewListener(view, run.run_id), *trackers]
        state = train(run, directory, options, cache, listeners, is_enough=task.is_enough)
    for why in untracked([directory], planned.experiment.run.wandb.mode, unreachable).values():
        console.out(
            f"W&B lacks the run or some of its rows: {why}; `repa-lab sync {directory.run_id}` sends them",
            highlight=False,
        )
    return directory, state


def bench(
    source: Source | None = None,
    root: str | Path = DEFAULT_ROOT,
    overrides: Mapping[str, Any] | None = None,
    fragments: Sequence[str | Path] = (),
    rounds: int = 5,
    steps: int = 5,
    console: Console | None = None,
) -> dict[str, Any]:
    """Measure training steps of a spec's arm against other ways to take them.

    The arm is the first with `repa` or `urepa`, else the first with another regularizer, else the first.

    Args:
        source: as for :func:`sweep`, like all that is not named here; None measures a tiny model on digits.
        rounds: turns that every way takes.
        steps: steps of a turn.

    Returns:
        What :func:`repa_lab.training.speed.bench` returns.

    Raises:
        SpecError: the spec is wrong, or asks for what cannot be had.
    """
    from repa_lab.training import speed

    experiment = _load(speed.TINY if source is None else source, overrides, fragments)
    arm = max(  # the first of the best
        experiment.arms,
        key=lambda arm: (isinstance(arm.config.regularizer, REPASettings), bool(arm.config.regularizers)),
    )
    cache = RunsRoot(Path(root)).cache
    with ProgressView(console or default_console(), experiment.name, 1) as view:
        _prepare((config for _, config in speed.variants(arm.config)), arm, experiment.run, cache, view)
        run = identify_run(arm.config, experiment.seeds[0])
        return {"arm": arm.label, **speed.bench(run, experiment.run, cache, rounds, steps)}


class _ViewListener:
    """Shows a run's rows on a view."""

    def __init__(self, view: ProgressView, run_id: str) -> None:
        self._view, self._run_id = view, run_id

    def row(self, row: Row) -> None:
        self._view.row(self._run_id, row)

    def image(self, step: int, path: Path) -> None:
        pass

    def finish(self, state: State) -> None:
        self._view.finished(self._run_id, state.status, None)


def _settle_tracking(experiment: Experiment) -> tuple[RunOptions, str | None]:
    """Return the options of the runs with W&B's mode, and why W&B's server cannot be told, if it should be."""
    wandb = experiment.run.wandb
    try:
        mode, unreachable = settle_mode(wandb.mode)
    except WandbRefusalError as error:
        raise SpecError(experiment.problem("run.wandb.mode", line) for line in str(error).splitlines()) from None
    settled = wandb.model_copy(update={"mode": mode})
    return experiment.run.model_copy(update={"wandb": settled}), unreachable


def _prepare(configs: Iterable[RunConfig], arm: Arm, options: RunOptions, cache: Path, view: ProgressView) -> None:
    """Fill the caches for settings of an arm, in this process.

    Raises:
        SpecError: a setting cannot be met, at its place in the spec.
    """
    from repa_lab.orchestration.worker import RefusedError, prepare

    try:
        prepare(configs, options, cache, lambda activity: partial(view.progress, activity))
    except RefusedError as error:
        raise SpecError([arm.problem(error.path, str(error))]) from None


def _rehearsed(experiment: Experiment, root: Path) -> Plan:
    from repa_lab.orchestration.rehearsal import rehearsal_root, rehearse_experiment

    check(experiment, inventory=None)
    root = rehearsal_root(root)
    return make_plan(rehearse_experiment(experiment, root), RunsRoot(root))


def _choose(planned: Plan, arm: str | None, seed: int | None) -> PlannedRun:
    labels, seeds = [arm.label for arm in planned.experiment.arms], planned.experiment.seeds
    if arm is not None and arm not in labels:
        raise SpecError([planned.experiment.problem("axes", f"no arm '{arm}'; there are: {'; '.join(labels)}")])
    if seed is not None and seed not in seeds:
        known = ", ".join(map(str, seeds))
        raise SpecError([planned.experiment.problem("seeds", f"no seed {seed}; there are: {known}")])
    chosen = (arm or labels[0], seeds[0] if seed is None else seed)
    return next(entry for entry in planned.runs if (entry.arm.label, entry.run.seed) == chosen)


def _load(source: Source, overrides: Mapping[str, Any] | None, fragments: Sequence[str | Path]) -> Experiment:
    return source if isinstance(source, Experiment) else load_spec(source, overrides, fragments)


def _carry_out(
    planned: Plan, directory: SweepDirectory, workers: int | None, console: Console, is_rehearsal: bool
) -> SweepOutcome:
    experiment, unreachable = planned.experiment, None
    if _is_complete(planned, directory):
        _make_work(planned, directory)
        outcome = SweepOutcome(directory, 0, {})
    else:
        options, unreachable = _settle_tracking(experiment)
        if unreachable:
            console.out(f"{unreachable}; `repa-lab sync {experiment.name}` sends the rows later", highlight=False)
        options = options.model_copy(update={"workers": workers or options.workers})
        outcome = _train(planned, options, directory, console, is_rehearsal)
    runs = map(directory.root.run, dict.fromkeys(directory.manifest.run_ids))
    return dataclasses.replace(outcome, untracked=untracked(runs, experiment.run.wandb.mode, unreachable))


def _train(
    planned: Plan, options: RunOptions, directory: SweepDirectory, console: Console, is_rehearsal: bool
) -> SweepOutcome:
    experiment = planned.experiment
    runs = None if experiment.search else len(planned.pending)
    # The sweep's folder stays only once nothing was refused, so the workers' log starts elsewhere.
    with tempfile.TemporaryDirectory(prefix="repa-lab-") as scratch:
        log, executor = Path(scratch) / "workers.log", None
        try:
            executor = _open_executor(options, planned.root, experiment.name, runs, log)
            with ProgressView(console, experiment.name, executor.slots) as view:
                scheduler = Scheduler(executor, planned.root, options, experiment.name, view, is_rehearsal)
                scheduler.prepare({entry.run.config: entry.arm for entry in planned.runs})
                scheduler.run(_make_work(planned, directory))
        except SweepBrokenError as error:
            message, lines = str(error), log.read_text(encoding="utf-8").splitlines() if log.exists() else []
            last = next(filter(str.strip, reversed(lines)), "").strip()  # of the workers' log
            is_said = message.endswith(last.rpartition(": ")[2])
            raise SweepBrokenError(message if is_said else f"{message}; {last}") from None
        except ExecutorError as error:
            raise SpecError([experiment.problem(f"run.{error.field}", str(error))]) from None
        finally:
            if executor:
                executor.close()
            if directory.is_recorded and log.exists():
                shutil.copyfile(log, directory.path / "workers.log")
    return SweepOutcome(directory, scheduler.trained, scheduler.failures, scheduler.diverged, scheduler.stopped or None)


def _open_executor(options: RunOptions, root: RunsRoot, sweep: str, runs: int | None, log: Path) -> Executor:
    """Open the executor of the options; ``runs`` is None for a search, which finds its runs as it goes.

    Raises:
        ExecutorError: the executor cannot be had here.
    """
    workers = options.workers
    if options.executor == "ray":
        from repa_lab.orchestration.executors.ray import RayExecutor

        return RayExecutor(options, root, sweep, workers)
    if options.executor == "slurm":
        from repa_lab.orchestration.executors.slurm import SlurmExecutor

        # A search learns from runs that have ended, so it must not submit all of its trials at once.
        return SlurmExecutor(options, root, sweep, workers or runs or options.slurm.array_parallelism)
    return LocalExecutor(local_slots(options, runs, workers), log, options.gpus_per_run)


@contextmanager
def _locked(directory: SweepDirectory) -> Iterator[None]:
    """Hold the sweep's lock, and take away what was made for a sweep that was refused."""
    require_no_links(directory.path, directory.links)
    made = [path for path in (directory.path, *directory.path.parents) if not path.exists()]
    directory.path.mkdir(parents=True, exist_ok=True)
    lock = FileLock(directory.lock, timeout=_LOCK_PATIENCE_S)
    try:
        lock.acquire()
    except Timeout:
        raise SweepBusyError(f"another process is carrying out the sweep in {directory.path}") from None
    directory.stop.unlink(missing_ok=True)
    try:
        yield
    finally:
        if not directory.is_recorded:
            directory.stop.unlink(missing_ok=True)
            directory.lock.unlink(missing_ok=True)
        lock.release()
        with suppress(OSError):  # a folder that is not empty stays
            for path in made:
                path.rmdir()


def _is_complete(planned: Plan, directory: SweepDirectory) -> bool:
    if planned.experiment.search is None:
        return not planned.pending
    if not directory.is_recorded:
        return False
    done, total = _make_work(planned, directory).counts()
    return done >= total


def _make_work(planned: Plan, directory: SweepDirectory) -> Work:
    """Return the work of a sweep, and record the sweep in its folder."""
    directory.path.mkdir(parents=True, exist_ok=True)
    if planned.experiment.search is None:
        directory.record(planned.manifest())
        return RunList((entry.task for entry in planned.left), planned.root, planned.forks)
    from repa_lab.orchestration.search.search import SearchWork

    return SearchWork(planned, directory)
