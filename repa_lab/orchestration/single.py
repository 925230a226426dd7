"""One run of a sweep, in this process: for debugging, and for schedulers that are not ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from repa_lab.orchestration.api import plan
from repa_lab.orchestration.jobs import TrainJob
from repa_lab.orchestration.plan import Plan, PlannedRun
from repa_lab.orchestration.view import View
from repa_lab.runs import RunDirectory, State
from repa_lab.runs.files import Row
from repa_lab.spec import SpecError


class _Shown:
    """Shows a run's rows on the sweep's view."""

    def __init__(self, view: View, run_id: str) -> None:
        self._view, self._run_id = view, run_id

    def row(self, row: Row) -> None:
        self._view.row(self._run_id, row)

    def image(self, step: int, path: Path) -> None:
        pass

    def finish(self, state: State) -> None:
        self._view.finished(self._run_id, state.status, None)


def run_one(
    source: str | Path | Mapping[str, Any],
    arm: str | None,
    seed: int | None,
    root: str | Path,
    overrides: Mapping[str, Any] | None = None,
    console: Console | None = None,
    fragments: Sequence[str | Path] = (),
) -> tuple[RunDirectory, State]:
    """Train one run of an experiment.

    Args:
        source: the experiment; see `repa_lab.plan`.
        arm: the arm's label; None takes the first.
        seed: one of the experiment's seeds; None takes the first.
        root: the runs root.
        overrides: dotted paths to values, laid over the spec.
        console: where progress is shown; None keeps silent.
        fragments: files laid between the spec and the overrides; see `load_spec`.

    Returns:
        The run's directory, and the state it came to.

    Raises:
        SpecError: the spec is wrong, has no such arm or seed, or asks for what cannot be had.
    """
    planned = plan(source, root, overrides, fragments)
    entry = _choose(planned, arm, seed)
    if entry.blocked:
        raise SpecError([entry.blocked])
    from repa_lab.orchestration.prepare import RefusedError, prepare
    from repa_lab.orchestration.worker import trackers
    from repa_lab.training.loop import train

    shown, trained = console or Console(quiet=True), entry.run.config.train
    if warning := trained.averaging.warning(trained.steps):
        shown.print(warning, highlight=False, markup=False, soft_wrap=True)
    options, name = planned.experiment.run, f"{entry.arm.label}, seed {entry.run.seed}"
    with View(shown, planned.experiment.name, 1) as view:
        for note in planned.notes:
            view.say(note)
        try:
            announce = lambda task: lambda done, total: view.progress(task, done, total)  # noqa: E731
            prepare([entry.run.config], options, planned.root.cache, announce)
        except RefusedError as refusal:
            raise SpecError([entry.arm.problem(refusal.path, refusal.message)]) from None
        directory = planned.root.run(entry.run.run_id)
        job = TrainJob(entry.run, name, planned.experiment.name, options, planned.root, stop=entry.stop)
        view.started(entry.run.run_id, name, entry.run.config.train.steps)
        listeners = [_Shown(view, entry.run.run_id), *trackers(job)]
        return directory, train(entry.run, directory, options, planned.root.cache, listeners, is_enough=job.is_enough)


def _choose(planned: Plan, arm: str | None, seed: int | None) -> PlannedRun:
    labels = [one.label for one in planned.experiment.arms]
    if arm is not None and arm not in labels:
        raise SpecError([planned.experiment.problem("axes", f"no arm '{arm}'; there are: {'; '.join(labels)}")])
    if seed is not None and seed not in planned.experiment.seeds:
        seeds = ", ".join(map(str, planned.experiment.seeds))
        raise SpecError([planned.experiment.problem("seeds", f"no seed {seed}; there are: {seeds}")])
    wanted = (arm or labels[0], planned.experiment.seeds[0] if seed is None else seed)
    return next(entry for entry in planned.runs if (entry.arm.label, entry.run.seed) == wanted)
