"""The layer-by-timestep profile of a run: what every block of its denoiser represents at several times."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from repa_lab.align.settings import EncoderSettings
from repa_lab.align.tokens import Grid, Tokens
from repa_lab.encoders.targets import Targets
from repa_lab.errors import InputError
from repa_lab.metrics import cds, cka, cknna, lds, mutual_knn, rmsc
from repa_lab.metrics.protocol import PROTOCOL_VERSION
from repa_lab.models.tap import BlockName, TapError
from repa_lab.runs import RunDirectory, files
from repa_lab.runs.directory import ALIGNMENT_METRICS, SPATIAL_METRICS, provenance
from repa_lab.runs.files import Row
from repa_lab.spec import RunConfig, RunOptions
from repa_lab.spec.identity import Run
from repa_lab.training.aligner import open_targets
from repa_lab.training.batches import Images, open_data
from repa_lab.training.checkpoint import newest_checkpoint
from repa_lab.training.device import as_trained, computing_in, pick_device
from repa_lab.training.evaluate import held_out_batches, noise_protocol
from repa_lab.training.model import MEASURING_SEED, Model, open_trained
from repa_lab.training.resolve import aligned_block, choose_block, encoder_identity

TIMESTEPS = (0.1, 0.3, 0.5, 0.7, 0.9)
METRICS = (*ALIGNMENT_METRICS, *SPATIAL_METRICS)
NEIGHBOURS = 10
# iREPA's distances are those of a 16x16 grid; larger grids are resampled to that resolution.
SPATIAL_SIDE = 16
_MIN_IMAGES = {"cka": 4, "cknna": NEIGHBOURS + 1, "mutual_knn": NEIGHBOURS + 1}
_ALIGNMENT: dict[str, Callable[[torch.Tensor, torch.Tensor], float]] = {
    "cka": cka,
    "cknna": partial(cknna, k=NEIGHBOURS),
    "mutual_knn": partial(mutual_knn, k=NEIGHBOURS),
}
# With each metric, the largest token distance that a grid must have.
_SPATIAL: dict[str, tuple[Callable[[torch.Tensor, Grid], float], int]] = {
    "lds": (lds, 6),
    "cds": (cds, 2),
    "rmsc": (rmsc, 1),
}
# The image means of a batch at a block, and its spatial metrics, None where the grid is too small.
_Summary = tuple[torch.Tensor, dict[str, float | None]]


class ProfileError(InputError):
    """The requested profile cannot be measured."""


@dataclass(frozen=True)
class Request:
    """A profile to measure.

    Attributes:
        weights: ``ema`` for the averaged weights, which runs are measured on, or ``last``.
        samples: number of held-out images; None takes all.
        encoder: the encoder to compare with; None takes the run's own.

    Raises:
        ProfileError: a timestep or a metric is not allowed.
    """

    timesteps: tuple[float, ...] = TIMESTEPS
    metrics: tuple[str, ...] = METRICS
    weights: str = "ema"
    samples: int | None = None
    encoder: EncoderSettings | None = None

    def __post_init__(self) -> None:
        is_outside = any(not 0 <= t <= 1 for t in self.timesteps)
        if is_outside or not self.timesteps or len(set(self.timesteps)) < len(self.timesteps):
            message = "timesteps must be different numbers from 0 (data) to 1 (noise)"
            raise ProfileError(f"{message}, got {list(self.timesteps)}")
        unknown = [name for name in self.metrics if name not in METRICS]
        if unknown or not self.metrics:
            raise ProfileError(f"unknown metric '{''.join(unknown[:1])}'; allowed: {', '.join(METRICS)}")


def profile_run(directory: RunDirectory, request: Request, options: RunOptions, cache: Path) -> dict[str, Any]:
    """Measure a run's newest checkpoint and store the profile in its directory.

    At the run's own block and measuring time, with all held-out images and the precision of its training, ``cka`` is
    the run's ``heldout/cka`` of that step, on a CPU bit for bit.

    Args:
        options: device and precision; an `auto` precision is that of the run.

    Returns:
        The stored profile: ``run_id``, ``measured_block``, ``aligned_block``, ``protocol`` and ``values``, rows of
        block, timestep, metric and value. Spatial metrics are missing for blocks whose grid is too small.

    Raises:
        NoWeightsError: there is no checkpoint, or the weights are neither ``ema`` nor ``last``.
        ProfileError: there is no encoder, too few images, no grid of sufficient size, or a value is not finite.
        DataError, EncoderError, PretrainedError, DeviceError: a component is not available.
        LinkError: the run lies behind a symbolic link.
    """
    files.require_no_links(*directory.links)
    step, checkpoint = newest_checkpoint(directory, request.weights)
    run, options = Run.read(directory), as_trained(options, directory)
    config, device = run.config, pick_device(options)
    encoder = request.encoder or config.alignment_encoder
    if encoder is None:
        raise ProfileError(f"run {run.run_id} is compared with no encoder; name one")
    if encoder.weights is not None and not Path(encoder.weights).is_file():
        raise ProfileError(f"the weights of '{encoder.name}', '{encoder.weights}', are not a file")
    images = open_data(config, cache, device)
    chosen = choose_images(images, request, run.run_id)
    targets = open_targets(encoder, images, options, cache, device)
    model = open_trained(run, checkpoint, request.weights, images, options, cache, device)
    with computing_in(model.denoiser, options.precision, device):
        values = measure_profile(model, images, targets, request, chosen, device)
    if not values:
        names = ", ".join(request.metrics)
        raise ProfileError(f"no block of run {run.run_id} has a grid that is large enough for {names}")
    aligned = aligned_block(config) if any(settings.encoders for settings in config.regularizers) else None
    measured = choose_block(config, config.evaluate.block_index, aligned)
    blocks = {"run_id": run.run_id, "measured_block": measured, "aligned_block": aligned}
    protocol = {"step": step, "version": PROTOCOL_VERSION, **_protocol(request, config, images, len(chosen))}
    protocol |= {"precision": options.precision, "packages": provenance()["packages"]}
    profile = {**blocks, "protocol": protocol, "values": values}
    files.write_record(directory.profile_file, profile)
    return profile


def _protocol(request: Request, config: RunConfig, images: Images, count: int) -> dict[str, Any]:
    """Return what values depend on beside the checkpoint and this machine."""
    encoder = request.encoder or config.alignment_encoder
    return {
        "encoder": encoder and encoder_identity(encoder),
        "weights": request.weights,
        "timesteps": list(request.timesteps),
        "metrics": list(request.metrics),
        "images": count,
        "data": images.source.fingerprint,
        "seed": MEASURING_SEED,
        "k": NEIGHBOURS,
        "spatial_side": SPATIAL_SIDE,
        **noise_protocol(config.evaluate, count),
    }


@torch.no_grad()
def measure_profile(
    model: Model, images: Images, targets: Targets, request: Request, chosen: torch.Tensor, device: torch.device
) -> list[Row]:
    """Measure every block at every time, with one forward pass for each batch and time; only image means are kept.

    The denoiser is on the device, in evaluation mode; ``chosen`` are held-out images ``(n,)``.

    Raises:
        ProfileError: the values of a block are not finite.
        TapError: a block did not run once in every pass.
    """
    batches = list(held_out_batches(images, chosen, model.at_once))
    teachers = torch.cat([targets(index, device).values.float().mean(dim=1) for index in batches])
    taps = model.denoiser.tap_all()
    rows: list[Row] = []
    try:
        for timestep in request.timesteps:
            summaries: dict[BlockName, list[_Summary]] = {block: [] for block in taps}
            names = {block: f"block {block} at timestep {timestep:g}" for block in taps}
            for block, tap in taps.items():
                tap.hand_to(partial(_summarise, names[block], request.metrics, summaries[block]))
            for index in batches:
                model.show(images, index, timestep, device)
            for block, parts in summaries.items():
                for metric, value in _values(names[block], request.metrics, parts, teachers):
                    rows.append({"block": block, "timestep": timestep, "metric": metric, "value": value})
    finally:
        for tap in taps.values():
            tap.remove()
    return rows


def choose_images(images: Images, request: Request, run_id: str) -> torch.Tensor:
    """Return the held-out images to measure, ``(n,)``, spread evenly, because neighbours may share a class.

    Raises:
        ProfileError: there are too few images.
    """
    held_out = images.split.held_out
    count = len(held_out) if request.samples is None else request.samples
    if count > len(held_out):
        raise ProfileError(f"{count} samples are asked for, and run {run_id} holds out {len(held_out)} images")
    for metric in request.metrics:
        if count < (needed := _MIN_IMAGES.get(metric, 1)):
            message = f"{metric} needs {needed} or more held-out images, got {count}"
            raise ProfileError(f"{message}; leave it out of the metrics")
    return held_out[torch.arange(count) * len(held_out) // count]


def _summarise(name: str, metrics: Sequence[str], summaries: list[_Summary], tokens: Tokens) -> None:
    """Add a batch's tokens of the block ``name``; means are kept on the CPU, because a network has many blocks."""
    means = tokens.values.float().mean(dim=1).cpu()
    if not means.isfinite().all():
        raise ProfileError(f"{name} yields values that are not finite")
    spatial: dict[str, float | None] = {}
    if any(metric in _SPATIAL for metric in metrics):
        coarse = _coarse(tokens)
        for metric in metrics:
            if metric in _SPATIAL:
                measure, distance = _SPATIAL[metric]
                is_measured = sum(coarse.grid) - 2 >= distance
                spatial[metric] = measure(coarse.values, coarse.grid) if is_measured else None
    summaries.append((means, spatial))


def _values(
    name: str, metrics: Sequence[str], summaries: Sequence[_Summary], teachers: torch.Tensor
) -> Iterator[tuple[str, float]]:
    """Yield the metrics of a block over all batches, against the encoder's means ``(n, D)`` of the same images."""
    counts = [len(means) for means, _ in summaries]
    if sum(counts) != len(teachers):
        raise TapError(f"{name} saw {sum(counts)} images of {len(teachers)}")
    means = torch.cat([means for means, _ in summaries]).to(teachers.device)
    for metric in metrics:
        if metric in _ALIGNMENT:
            yield metric, _ALIGNMENT[metric](means, teachers)
            continue
        finite = [value for _, spatial in summaries if (value := spatial[metric]) is not None]
        if len(finite) == len(counts):
            yield metric, float(np.average(finite, weights=counts))


def _coarse(tokens: Tokens) -> Tokens:
    """Return tokens in float32 on a grid of the same aspect with at most 16 tokens along a side."""
    height, width = tokens.grid
    scale = max(1.0, max(tokens.grid) / SPATIAL_SIDE)
    grid = max(1, round(height / scale)), max(1, round(width / scale))
    return Tokens(tokens.values.float(), tokens.grid, tokens.frames).resample(grid).as_images()
