"""Plan and carry out a sweep, from a program as from the command line."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console

from repa_lab.runs import RunsRoot
from repa_lab.runs.root import DEFAULT_ROOT, SweepDirectory
from repa_lab.spec import Experiment, SpecError, load_spec
from repa_lab.sweep.check import check
from repa_lab.sweep.executors.local import LocalExecutor
from repa_lab.sweep.plan import Plan, make_plan
from repa_lab.sweep.scheduler import Scheduler, SweepBrokenError
from repa_lab.sweep.view import View
from repa_lab.sweep.work import FixedWork, Task, Work

STUDY = "study.db"
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
    """

    directory: SweepDirectory
    trained: int
    failures: Mapping[str, str]

    @property
    def path(self) -> Path:
        """The sweep's folder."""
        return self.directory.path


def plan(source: Source, root: str | Path = DEFAULT_ROOT, overrides: Mapping[str, Any] | None = None) -> Plan:
    """Plan a sweep: its runs, which of them are done, and what stands in the way. Creates nothing.

    Args:
        source: a spec file, its fields as a mapping, or an experiment that `load_spec` gave.
        root: the runs root.
        overrides: dotted paths to values, laid over the spec.

    Raises:
        SpecError: with every problem of the spec.
    """
    experiment = source if isinstance(source, Experiment) else load_spec(source, overrides)
    return make_plan(experiment, RunsRoot(Path(root)))


def sweep(
    source: Source,
    root: str | Path = DEFAULT_ROOT,
    overrides: Mapping[str, Any] | None = None,
    workers: int | None = None,
    console: Console | None = None,
    rehearse: bool = False,
) -> SweepOutcome:
    """Train what a sweep asks for and is not done yet, then write its report.

    Args:
        source: see :func:`plan`.
        root: the runs root.
        overrides: see :func:`plan`.
        workers: how many runs go on at a time; None takes ``run.workers``, or else one for a GPU machine and one per core
            without a GPU.
        console: where progress is shown; None keeps silent.
        rehearse: whether to go through all of it with tiny random models and a few images instead, in a root of its own.

    Raises:
        SpecError: the spec is wrong, or asks for what cannot be had; nothing was created.
        SweepBusyError: another process carries out this sweep.
        SweepBrokenError: the workers cannot work at all.
    """
    planned = _plan_rehearsal(source, Path(root), overrides) if rehearse else plan(source, root, overrides)
    if planned.blocked:
        raise SpecError([planned.blocked])
    directory = planned.root.sweep(planned.experiment.name)
    trained, failures = 0, dict[str, str]()
    if _is_complete(planned, directory):
        _make_work(planned, directory)
    else:
        slots = workers or planned.experiment.run.workers or _default_slots(planned)
        trained, failures = _carry_out(planned, directory, slots, console or Console(quiet=True), rehearse)
    from repa_lab.report.page import write_report  # pandas and matplotlib, which `plan` has no use for

    write_report(directory)
    return SweepOutcome(directory, trained, failures)


def _plan_rehearsal(source: Source, root: Path, overrides: Mapping[str, Any] | None) -> Plan:
    from repa_lab.sweep.rehearse import rehearsal_root, rehearse

    experiment = source if isinstance(source, Experiment) else load_spec(source, overrides)
    check(experiment, files=False)
    return make_plan(rehearse(experiment, rehearsal_root(root)), RunsRoot(rehearsal_root(root)))


def _carry_out(
    planned: Plan, directory: SweepDirectory, slots: int, console: Console, is_rehearsal: bool
) -> tuple[int, dict[str, str]]:
    experiment = planned.experiment
    # The sweep's folder is made only once nothing was refused, so the workers' log starts elsewhere.
    with tempfile.TemporaryDirectory(prefix="repa-lab-") as scratch, View(console, experiment.name, slots) as view:
        log = Path(scratch) / "workers.log"
        executor = LocalExecutor(slots, log)
        try:
            scheduler = Scheduler(executor, planned.root, experiment.run, experiment.name, view, is_rehearsal)
            scheduler.prepare({entry.run.config: entry.arm for entry in planned.runs})
            with _held(directory):
                work = _make_work(planned, directory)
                before = work.counts()[0]
                failures = scheduler.run(work)
        except SweepBrokenError as error:
            tail = log.read_text(encoding="utf-8").strip().splitlines()[-1:]
            raise SweepBrokenError("; ".join([str(error), *tail])) from None
        finally:
            executor.close()
            if directory.path.exists():
                shutil.copyfile(log, directory.path / "workers.log")
    return work.counts()[0] - before - len(failures), failures


@contextmanager
def _held(directory: SweepDirectory) -> Iterator[None]:
    directory.path.mkdir(parents=True, exist_ok=True)
    lock = FileLock(directory.path / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise SweepBusyError(f"another process is carrying out the sweep in {directory.path}") from None
    try:
        yield
    finally:
        lock.release()


def _is_complete(planned: Plan, directory: SweepDirectory) -> bool:
    if planned.experiment.search is None:
        return not planned.pending
    if not (directory.path / STUDY).exists():
        return False
    done, total = _make_work(planned, directory).counts()
    return done >= total


def _make_work(planned: Plan, directory: SweepDirectory) -> Work:
    """The work of a sweep, which is recorded in its folder as it stands."""
    experiment = planned.experiment
    directory.path.mkdir(parents=True, exist_ok=True)
    if experiment.search is None:
        directory.record(planned.manifest())
        names = {entry.run.run_id: f"{entry.arm.label}, seed {entry.run.seed}" for entry in planned.runs}
        return FixedWork(Task(run, names[run.run_id]) for run in planned.pending)
    from repa_lab.sweep.search import Searches

    return Searches(planned, directory)


def _default_slots(planned: Plan) -> int:
    has_gpu = Path("/dev/nvidia0").exists() and planned.experiment.run.device != "cpu"
    return 1 if has_gpu else max(1, min(os.cpu_count() or 1, len(planned.pending)))
