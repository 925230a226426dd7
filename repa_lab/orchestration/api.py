"""Plan and carry out a sweep, from a program as from the command line."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console

from repa_lab.orchestration.budget import require_budget
from repa_lab.orchestration.check import check
from repa_lab.orchestration.executors import Executor, ExecutorError
from repa_lab.orchestration.executors.opening import open_executor
from repa_lab.orchestration.plan import Plan, make_plan
from repa_lab.orchestration.scheduler import Scheduler, SweepBrokenError
from repa_lab.orchestration.sharing import SharedWork
from repa_lab.orchestration.view import View
from repa_lab.orchestration.work import FixedWork, Task, Work
from repa_lab.runs import RunsRoot
from repa_lab.runs.root import DEFAULT_ROOT, SweepDirectory
from repa_lab.spec import Experiment, SpecError, load_spec

_LOOK_S = 0.5  # who only looks whether a sweep is held holds it for a moment

Source = str | Path | Mapping[str, Any] | Experiment


class SweepBusyError(RuntimeError):
    """Another process is carrying out this sweep."""


@dataclass(frozen=True)
class SweepOutcome:
    """What a sweep came to.

    Attributes:
        directory: the sweep's folder, with its report; `load_results` takes its path.
        trained: runs that were trained now; runs found done are not among them.
        failures: the reason of every run that failed now, by its id.
        diverged: likewise of the runs of a search that diverged: no failures, but the worst that there is.
        stopped: why runs were not started, if any were not.
    """

    directory: SweepDirectory
    trained: int
    failures: Mapping[str, str]
    diverged: Mapping[str, str] = field(default_factory=dict)
    stopped: str | None = None

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
        source: a spec file, its fields as a mapping, or an experiment that `load_spec` gave.
        root: the runs root.
        overrides: dotted paths to values, laid over the spec.
        fragments: files laid between the spec and the overrides; see `load_spec`.

    Raises:
        SpecError: with every problem of the spec.
    """
    experiment = source if isinstance(source, Experiment) else load_spec(source, overrides, fragments)
    return make_plan(experiment, RunsRoot(Path(root)))


def sweep(
    source: Source,
    root: str | Path = DEFAULT_ROOT,
    overrides: Mapping[str, Any] | None = None,
    workers: int | None = None,
    console: Console | None = None,
    rehearse: bool = False,
    fragments: Sequence[str | Path] = (),
) -> SweepOutcome:
    """Train what a sweep asks for and is not done yet, then write its report.

    Args:
        source: see :func:`plan`.
        root: the runs root.
        overrides: see :func:`plan`.
        workers: how many runs go on at a time; None takes ``run.workers``, or else one for each GPU slot, or one per
            core without a GPU, or as many as the cluster has room for.
        console: where progress is shown; None keeps silent.
        rehearse: whether to go through all of it with tiny random models and a few images instead, in a root of its
            own.
        fragments: see :func:`plan`.

    Raises:
        SpecError: the spec is wrong, or asks for what cannot be had; nothing was created.
        SweepBusyError: another process carries out this sweep.
        SweepBrokenError: the workers cannot work at all, or the first runs all failed for the same reason.
    """
    planned = (_plan_rehearsal if rehearse else plan)(source, Path(root), overrides, fragments)
    if planned.blocked:
        raise SpecError([planned.blocked])
    if not rehearse:
        require_budget(planned)
        for warning in planned.warnings:
            (console or Console(quiet=True)).print(warning, highlight=False, markup=False, soft_wrap=True)
    directory = planned.root.sweep(planned.experiment.name)
    outcome = SweepOutcome(directory, 0, {})
    with _held(directory):
        if _is_complete(planned, directory):
            _make_work(planned, directory)
        else:
            outcome = _carry_out(planned, directory, workers, console or Console(quiet=True), rehearse)
    from repa_lab.report.page import write_report  # pandas and matplotlib, which `plan` has no use for

    write_report(directory)
    return outcome


def _plan_rehearsal(
    source: Source, root: Path, overrides: Mapping[str, Any] | None, fragments: Sequence[str | Path]
) -> Plan:
    from repa_lab.orchestration.rehearse import rehearsal_root, rehearse

    experiment = source if isinstance(source, Experiment) else load_spec(source, overrides, fragments)
    check(experiment, inventory=None)
    return make_plan(rehearse(experiment, rehearsal_root(root)), RunsRoot(rehearsal_root(root)))


def _carry_out(
    planned: Plan, directory: SweepDirectory, workers: int | None, console: Console, is_rehearsal: bool
) -> SweepOutcome:
    experiment = planned.experiment
    # The sweep's folder is kept only once nothing was refused, so the workers' log starts elsewhere.
    with tempfile.TemporaryDirectory(prefix="repa-lab-") as scratch:
        log = Path(scratch) / "workers.log"
        executor = _open_executor(planned, workers, log, is_rehearsal)
        try:
            with View(console, experiment.name, executor.slots) as view:
                scheduler = Scheduler(executor, planned.root, experiment.run, experiment.name, view, is_rehearsal)
                for note in planned.notes:
                    view.say(note)
                scheduler.prepare({entry.run.config: entry.arm for entry in planned.runs})
                work = _make_work(planned, directory)
                before = work.counts()[0]
                failures = scheduler.run(work)
        except SweepBrokenError as error:
            raise _with_last_line(error, log) from None
        except ExecutorError as error:
            raise SpecError([experiment.problem(f"run.{error.field}", str(error))]) from None
        finally:
            executor.close()
            if _is_recorded(directory) and log.exists():
                shutil.copyfile(log, directory.path / "workers.log")
    trained = work.counts()[0] - before - len(failures) - len(scheduler.diverged) - scheduler.found
    return SweepOutcome(directory, trained, failures, scheduler.diverged, scheduler.stopped or None)


def _open_executor(planned: Plan, workers: int | None, log: Path, is_rehearsal: bool) -> Executor:
    """The executor that the spec asks for; a rehearsal is for this machine, one process a run."""
    experiment, options = planned.experiment, planned.experiment.run
    if is_rehearsal:
        options = options.model_copy(update={"executor": "local", "gpus_per_run": 1})
    runs = None if experiment.search else len(planned.pending)
    try:
        return open_executor(options, planned.root, experiment.name, runs, workers or options.workers, log)
    except ExecutorError as error:
        raise SpecError([experiment.problem(f"run.{error.field}", str(error))]) from None


def _with_last_line(error: SweepBrokenError, log: Path) -> SweepBrokenError:
    """With what the workers said last, which is more than that one has died."""
    lines = log.read_text(encoding="utf-8").strip().splitlines() if log.exists() else []
    said = str(error)
    return SweepBrokenError(
        "; ".join([said, *(line for line in lines[-1:] if not said.endswith(line.rpartition(": ")[2]))])
    )


@contextmanager
def _held(directory: SweepDirectory) -> Iterator[None]:
    """Be the one process that carries out a sweep, from before it prepares; one that is refused leaves no folder."""
    made = [path for path in (directory.path, *directory.path.parents) if not path.exists()]
    directory.path.mkdir(parents=True, exist_ok=True)
    lock = FileLock(directory.lock, timeout=_LOOK_S)
    try:
        lock.acquire()
    except Timeout:
        raise SweepBusyError(f"another process is carrying out the sweep in {directory.path}") from None
    directory.ask_to_stop(False)
    try:
        yield
    finally:
        if not _is_recorded(directory):
            directory.ask_to_stop(False)
            directory.lock.unlink(missing_ok=True)
        lock.release()
        with suppress(OSError):  # what is not empty stays
            for path in made:
                path.rmdir()


def _is_complete(planned: Plan, directory: SweepDirectory) -> bool:
    if planned.experiment.search is None:
        return not planned.pending
    if not _is_recorded(directory):
        return False
    done, total = _make_work(planned, directory).counts()
    return done >= total


def _is_recorded(directory: SweepDirectory) -> bool:
    return (directory.path / "sweep.json").exists()


def _make_work(planned: Plan, directory: SweepDirectory) -> Work:
    """The work of a sweep, which is recorded in its folder as it stands."""
    experiment = planned.experiment
    directory.path.mkdir(parents=True, exist_ok=True)
    if experiment.search is None:
        directory.record(planned.manifest())
        tasks = [Task(one.run, f"{one.arm.label}, seed {one.run.seed}", stop=one.stop) for one in planned.left]
        forks = planned.sharing.forks
        return SharedWork(tasks, forks, planned.root) if forks else FixedWork(tasks)
    from repa_lab.orchestration.search.searches import Searches

    return Searches(planned, directory)
