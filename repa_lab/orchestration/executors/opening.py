"""The executor that the options ask for."""

from __future__ import annotations

import os
from pathlib import Path

from repa_lab.orchestration.executors import Executor
from repa_lab.orchestration.executors.devices import assign, visible_gpus
from repa_lab.orchestration.executors.local import LocalExecutor
from repa_lab.runs import RunsRoot
from repa_lab.spec import RunOptions


def open_executor(
    options: RunOptions, root: RunsRoot, group: str, runs: int | None, workers: int | None, log: Path
) -> Executor:
    """Open ``run.executor``.

    Args:
        options: of the sweep.
        root: the runs root.
        group: the sweep's name.
        runs: how many runs are to be trained; None for a search, which thinks of them as it goes.
        workers: how many go on at a time; None lets the machines decide.
        log: where processes on this machine write their errors.

    Raises:
        ExecutorError: it cannot be had.
    """
    if options.executor == "ray":
        from repa_lab.orchestration.executors.ray import RayExecutor

        return RayExecutor(options, root, group, workers)
    if options.executor == "slurm":
        from repa_lab.orchestration.executors.slurm import SlurmExecutor

        # A search learns from what has ended, so it must not hand in all of its trials at once.
        return SlurmExecutor(options, root, group, workers or runs or options.slurm.array_parallelism)
    return LocalExecutor(local_slots(options, runs, workers), log, options.gpus_per_run)


def local_slots(options: RunOptions, runs: int | None, workers: int | None) -> list[str | None]:
    """The ``CUDA_VISIBLE_DEVICES`` of every slot on this machine, None where there is no GPU to share out.

    Raises:
        ExecutorError: a run wants more GPUs than there are.
    """
    gpus = () if options.device == "cpu" else visible_gpus()
    if gpus:
        slots = assign(gpus, options.gpus_per_run, options.slots_per_gpu, workers)
        return [*slots[: max(1, runs) if runs is not None and workers is None else None]]
    cores = (os.cpu_count() or 1) // options.gpus_per_run
    return [None] * (workers or max(1, min(cores, cores if runs is None else runs)))
