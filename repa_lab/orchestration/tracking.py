"""What W&B and TensorBoard are told of runs: while they are trained, and afterwards from their directories."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

from repa_lab.orchestration.executors import TrainJob
from repa_lab.runs import RunDirectory
from repa_lab.runs.files import DamagedFileError
from repa_lab.runs.root import ComparisonRecord, SweepDirectory, TrackingRecord
from repa_lab.spec import Experiment, RunOptions, SpecError
from repa_lab.spec.options import WandbOptions
from repa_lab.tracking import Listener
from repa_lab.tracking.server import KEY, ServerError, WandbRefusalError, require_server, resolve_mode
from repa_lab.tracking.tensorboard import TensorBoardListener
from repa_lab.tracking.wandb import WandbListener, WandbRecord, WandbRun


def tracking_record(options: WandbOptions) -> TrackingRecord:
    """Return what a sweep's manifest says of W&B."""
    return TrackingRecord(**dict(options) | {"mode": resolve_mode(options.mode)})


def settle_tracking(experiment: Experiment) -> tuple[RunOptions, str | None]:
    """Decide whether W&B is told of runs while they are trained; ask its server once.

    Returns:
        The options of the runs with W&B's mode, and why W&B's server cannot be told, if it should be.

    Raises:
        SpecError: the server refuses the key.
    """
    wandb, unreachable = experiment.run.wandb, None
    mode = resolve_mode(wandb.mode)
    if mode == "online":
        try:
            require_server()
        except ServerError as error:
            mode, unreachable = "offline", str(error)
        except WandbRefusalError as error:
            raise SpecError(experiment.problem("run.wandb.mode", line) for line in str(error).splitlines()) from None
    settled = wandb.model_copy(update={"mode": mode})
    return experiment.run.model_copy(update={"wandb": settled}), unreachable


def open_trackers(job: TrainJob) -> list[Listener]:
    """Return the trackers that a run's options ask for; a tracker that fails later is dropped.

    Without a connection to W&B there is nothing to do: the run directory has all that W&B is told later.
    """
    directory, listeners = job.root.run(job.name), list[Listener]()
    if resolve_mode(job.options.wandb.mode) == "online":
        described = _described(tracking_record(job.options.wandb), _compared(job), job.task.name, job.sweep)
        listeners.append(WandbListener(directory, described))
    if job.options.tensorboard:
        listeners.append(TensorBoardListener(directory, job.task.run.to_json()))
    return listeners


def _described(
    record: TrackingRecord, compare: ComparisonRecord | None, name: str | None = None, sweep: str | None = None
) -> WandbRun:
    described = WandbRun(
        project=record.project,
        entity=record.entity,
        name=name,
        group=sweep,
        tags=record.tags,
        keeps_weights=record.artifacts == "final",
        is_wanted=record.mode != "disabled",
    )
    if compare is None:
        return described
    from repa_lab.report.statistics import headline  # imports SciPy

    return replace(described, headline=partial(headline, compare))


def _compared(job: TrainJob) -> ComparisonRecord:
    """Return what the recorded sweep compares; for a run that belongs to no recorded sweep, what the run measures."""
    from repa_lab.training.resolve import metric_name

    sweep = job.root.sweep(job.sweep)
    return sweep.manifest.compare if sweep.is_recorded else ComparisonRecord(metric=metric_name(job.task.run.config))


def descriptions(sweeps: Iterable[SweepDirectory]) -> dict[str, WandbRun]:
    """Return how runs are described to W&B, by their ids: as the first of the sweeps that asks for them does."""
    described = dict[str, WandbRun]()
    for sweep in sweeps:
        with suppress(ValueError, LookupError, TypeError):  # a damaged manifest
            manifest = sweep.manifest
            for arm in manifest.arms:
                for run in arm.runs:
                    name, record = f"{arm.label}, seed {run.seed}", manifest.wandb
                    described.setdefault(run.run_id, _described(record, manifest.compare, name, manifest.name))
    return described


def description_by_itself(run: RunDirectory) -> WandbRun:
    """Return how a run that no sweep asks for is described to W&B: by the options with which it was started first."""
    options: dict[str, Any] = run.provenance.get("options", {}).get("wandb", {})
    return _described(TrackingRecord(**options), None)


def untracked(directory: SweepDirectory, options: RunOptions, unreachable: str | None) -> dict[str, str]:
    """Return why W&B lacks runs of a sweep, or some of their rows, by run id; empty if W&B is not wanted.

    Args:
        directory: the sweep.
        options: the options of the sweep, as the spec gives them.
        unreachable: why W&B's server cannot be told; None if it can.
    """
    runs = map(directory.root.run, dict.fromkeys(directory.manifest.run_ids))
    reasons = {run.run_id: why_untracked(run, options, unreachable) for run in runs}
    return {run_id: reason for run_id, reason in reasons.items() if reason}


def why_untracked(run: RunDirectory, options: RunOptions, unreachable: str | None) -> str | None:
    """Return why W&B lacks a run or some of its rows; None if it lacks nothing; see :func:`untracked`."""
    mode, record = resolve_mode(options.wandb.mode), WandbRecord.read(run)
    try:
        if mode == "disabled" or not run.rows() or (record and record.covers(run)):
            return None
        failures = [event for event in run.events() if event.get("listener") == WandbListener.__name__]
    except DamagedFileError as error:
        return str(error)
    if unreachable:
        return unreachable
    if mode == "offline":
        return _why_offline(options.wandb.mode)
    return str(failures[-1]["error"]) if failures else "not sent during training"


def _why_offline(mode: str) -> str:
    if mode == "offline":
        return "run.wandb.mode is offline"
    chosen = os.environ.get("WANDB_MODE")
    return f"WANDB_MODE is {chosen}" if chosen else f"{KEY} is not set, and `wandb login` has stored no key"
