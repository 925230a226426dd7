"""The samples behind a run's numbers, and the real images they are compared with, for others' evaluators."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from repa_lab.metrics.npz import write_images
from repa_lab.runs import RunDirectory
from repa_lab.spec import RunOptions
from repa_lab.spec.identity import Run
from repa_lab.training.device import computing_in, measuring_precision, pick_device
from repa_lab.training.model import open_data
from repa_lab.training.protocol import metric_names, names_of, tiers
from repa_lab.training.quality import DivergedError, real_images
from repa_lab.training.sampling import shares
from repa_lab.training.trained import newest_checkpoint, open_trained

Progress = Callable[[int, int], None]


class Written(NamedTuple):
    """What was written.

    Attributes:
        step: of the checkpoint.
        metric: full name of the number.
        value: what the run measured of these samples; None where it measured none at this step, or other weights.
    """

    step: int
    metric: str
    value: float | None


class AuditError(ValueError):
    """What is asked for is not what the run measures."""


def write_samples(
    directory: RunDirectory,
    path: Path,
    cache: Path,
    metric: str | None = None,
    weights: str = "ema",
    progress: Progress = lambda done, total: None,
) -> Written:
    """Draw the samples that a number of a run is measured on from its newest checkpoint, as one npz for ADM's
    evaluator.

    Args:
        directory: the run.
        path: a new file.
        cache: where latents and captions are.
        metric: full name of the number; None takes the first of the dearest protocol.
        weights: ``ema``, the averages that are measured, or ``last``.
        progress: told of samples drawn, and of all.

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
    precision = _precision(directory, run, chosen)
    options = RunOptions.model_validate({"precision": "fp32" if precision == "tf32" else precision})
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

    with computing_in(model.denoiser, precision, device):
        write_images(path, batches(), tier.samples)
    found = [row[chosen] for row in directory.rows() if row["step"] == step and chosen in row]
    return Written(step, chosen, found[-1] if found and weights == "ema" else None)


def write_real(directory: RunDirectory, path: Path, cache: Path, progress: Progress = lambda done, total: None) -> int:
    """Write the training images that a run's samples are compared with, in their order, in the form of
    :func:`write_samples`.

    Args:
        directory: the run.
        path: a new file.
        cache: where latents are.
        progress: told of images written, and of all.

    Returns:
        How many there are.

    Raises:
        AuditError: the file is there, or the images are of several sizes.
        DataError: the data is not there any more.
    """
    if path.exists():
        raise AuditError(f"'{path}' exists; name a new file")
    config = Run.from_json(directory.run_id, directory.spec).config
    real = real_images(open_data(config, cache, pick_device(RunOptions())))
    if real.size is None:
        raise AuditError("the training images are of several sizes, and such a file holds images of one")

    def batches() -> Iterator[torch.Tensor]:
        done = 0
        for pixels in real.batches():
            done += len(pixels)
            progress(done, real.count)
            yield pixels

    write_images(path, batches(), real.count)
    return real.count


def _precision(directory: RunDirectory, run: Run, metric: str) -> str:
    """As the number's protocol has it; a run that recorded none was not resumed in another than it began in."""
    recorded = directory.protocols.get(metric)
    if recorded is not None:
        return str(recorded.get("precision", "fp32"))
    return measuring_precision(run.config.evaluate, str(directory.provenance["options"]["precision"]))
