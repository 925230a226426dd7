"""The samples behind a run's numbers, for others' evaluators."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from repa_lab.metrics.adm import write_images
from repa_lab.runs import RunDirectory
from repa_lab.spec import RunOptions
from repa_lab.spec.identity import Run
from repa_lab.training.device import pick_device
from repa_lab.training.model import open_data
from repa_lab.training.protocol import metric_names, names_of, tiers
from repa_lab.training.quality import DivergedError
from repa_lab.training.sampling import shares
from repa_lab.training.trained import newest_checkpoint, open_trained

Progress = Callable[[int, int], None]


class AuditError(ValueError):
    """What is asked for is not what the run measures."""


def write_samples(
    directory: RunDirectory,
    path: Path,
    cache: Path,
    metric: str | None = None,
    weights: str = "ema",
    progress: Progress = lambda done, total: None,
) -> tuple[int, str]:
    """Draw the samples that a number of a run is measured on from its newest checkpoint, as one npz for ADM's evaluator.

    Args:
        directory: the run.
        path: a new file.
        cache: where latents and captions are.
        metric: full name of the number; None takes the first of the dearest protocol.
        weights: ``ema``, the averages that are measured, or ``last``.
        progress: told of samples drawn, and of all.

    Returns:
        The step of the checkpoint, and the number's name.

    Raises:
        AuditError: the file is there, or the run measures no such number.
        NoWeightsError: the run has no checkpoint.
        DivergedError: the samples are not finite.
    """
    if path.exists():
        raise AuditError(f"'{path}' exists; name a new file")
    step, checkpoint = newest_checkpoint(directory, weights)
    run = Run.from_json(directory.run_id, directory.spec)
    by_name = {name: tier for tier in tiers(run.config) for name in names_of(run.config, tier)}
    chosen = metric or next(names_of(run.config, tiers(run.config)[-1]))
    if chosen not in by_name:
        raise AuditError(f"run {run.run_id} measures no '{chosen}'; it measures: {', '.join(metric_names(run.config))}")
    tier = by_name[chosen]
    # In the precision in which it was measured, on whatever device there is.
    options = RunOptions(precision=directory.provenance["options"]["precision"])
    device = pick_device(options)
    model = open_trained(run, checkpoint, weights, open_data(run.config, cache, device), options, cache, device)
    sampler = model.sampler(tier)

    def batches() -> Iterator[torch.Tensor]:
        for index in shares(tier.samples, tier.batch_size):
            pixels = sampler(index)
            if pixels is None:
                raise DivergedError("the denoiser draws samples that are not finite")
            progress(index.stop, tier.samples)
            yield pixels

    write_images(path, batches(), tier.samples)
    return step, chosen
