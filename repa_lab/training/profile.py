"""What every block of a run's denoiser knows at several times: its layer by timestep profile."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from repa_lab.align.tokens import Grid, Tokens
from repa_lab.encoders.targets import Targets
from repa_lab.metrics import cds, cka, cknna, lds, mutual_knn, rmsc
from repa_lab.metrics.protocol import PROTOCOL_VERSION
from repa_lab.models.tap import BlockName, TapError
from repa_lab.runs import RunDirectory, profiles
from repa_lab.runs.files import Row
from repa_lab.runs.provenance import provenance
from repa_lab.spec import EncoderSettings, RunConfig, RunOptions
from repa_lab.spec.identity import Run
from repa_lab.training.aligner import open_targets
from repa_lab.training.device import pick_device
from repa_lab.training.fingerprints import described
from repa_lab.training.heldout import MEASURING_SEED, held_out_batches, image_means, noise_protocol, show
from repa_lab.training.images import Images
from repa_lab.training.model import Model, open_data
from repa_lab.training.needs import choose_block
from repa_lab.training.trained import newest_checkpoint, open_trained

TIMESTEPS = (0.1, 0.3, 0.5, 0.7, 0.9)
METRICS = (*profiles.ALIGNMENT, *profiles.SPATIAL)
NEIGHBOURS = 10
# iREPA's distances are those of a grid of 16 x 16; its metrics of a larger grid are taken at that resolution.
SPATIAL_SIDE = 16
_LEAST_IMAGES = {"cka": 4, "cknna": NEIGHBOURS + 1, "mutual_knn": NEIGHBOURS + 1}


class ProfileError(ValueError):
    """The profile that is asked for cannot be measured."""


@dataclass(frozen=True)
class _Spatial:
    """A spatial metric, and how far apart two tokens of a grid must be for it to have a meaning."""

    value: Callable[[torch.Tensor, Grid], float]
    farthest: int


_ALIGNMENT: dict[str, Callable[[torch.Tensor, torch.Tensor], float]] = {
    "cka": cka,
    "cknna": lambda ours, theirs: cknna(ours, theirs, NEIGHBOURS),
    "mutual_knn": lambda ours, theirs: mutual_knn(ours, theirs, NEIGHBOURS),
}
_SPATIAL = {"lds": _Spatial(lds, 6), "cds": _Spatial(cds, 2), "rmsc": _Spatial(rmsc, 1)}


@dataclass(frozen=True)
class Request:
    """What to measure.

    Attributes:
        timesteps: from 0, data, to 1, noise.
        metrics: of :data:`METRICS`.
        weights: ``ema``, the averages that runs are measured on, or ``last``.
        samples: how many of the held-out images; None takes all.
        encoder: whom to compare with; None is the run's own.

    Raises:
        ProfileError: one of them is not allowed.
    """

    timesteps: tuple[float, ...] = TIMESTEPS
    metrics: tuple[str, ...] = METRICS
    weights: str = "ema"
    samples: int | None = None
    encoder: EncoderSettings | None = None

    def __post_init__(self) -> None:
        wrong = [t for t in self.timesteps if not 0 <= t <= 1]
        if wrong or not self.timesteps or len(set(self.timesteps)) < len(self.timesteps):
            raise ProfileError(
                f"timesteps must be different numbers from 0 (data) to 1 (noise), got {list(self.timesteps)}"
            )
        unknown = [name for name in self.metrics if name not in METRICS]
        if unknown or not self.metrics:
            raise ProfileError(f"unknown metric '{''.join(unknown[:1])}'; allowed: {', '.join(METRICS)}")


def profile_run(directory: RunDirectory, request: Request, options: RunOptions, cache: Path) -> dict[str, Any]:
    """Measure a run's newest checkpoint and store the profile in its directory.

    At the run's own block and measuring time, on all held-out images and in the precision that it was trained in,
    ``cka`` is the run's ``heldout/cka`` of that step, on a CPU to the last digit.

    Args:
        directory: the run.
        request: what to measure.
        options: device and precision.
        cache: where features, latents and captions are.

    Returns:
        What was stored: ``run_id``, ``measured_block`` and ``aligned_block``, the ``protocol``, and ``values``: a row
        of block, timestep, metric and value each. A spatial metric has none where the grid is too small for it.

    Raises:
        NoWeightsError: no checkpoint, or weights of another word.
        ProfileError: no encoder, too few images, no grid that is large enough, or values that are not finite.
        DataError, EncoderError, PretrainedError, DeviceError: a part cannot be had.
    """
    step, checkpoint = newest_checkpoint(directory, request.weights)
    run, device = Run.from_json(directory.run_id, directory.spec), pick_device(options)
    encoder = _encoder(run, request)
    images = open_data(run.config, cache, device)
    chosen = choose_images(images, request, run.run_id)
    targets = open_targets(encoder, images, options, cache, device)
    model = open_trained(run, checkpoint, request.weights, images, options, cache, device)
    values = measure_profile(model, images, targets, request, chosen, device)
    if not values:
        raise ProfileError(
            f"no block of run {run.run_id} has a grid that is large enough for {', '.join(request.metrics)}"
        )
    noise = noise_protocol(run.config.evaluate, len(chosen))
    profile = {
        "run_id": run.run_id,
        **_blocks(run.config),
        "protocol": {"step": step, **_protocol(request, encoder, options, images, chosen), **noise},
        "values": values,
    }
    profiles.write(directory, profile)
    return profile


@torch.no_grad()
def measure_profile(
    model: Model, images: Images, targets: Targets, request: Request, chosen: torch.Tensor, device: torch.device
) -> list[Row]:
    """The values of every block at every time: one forward pass a batch and time, of which only image means are kept.

    Args:
        model: its denoiser stands on the device, in evaluation mode.
        images: the data.
        targets: the encoder's tokens of them.
        request: timesteps and metrics.
        chosen: held-out images ``(n,)``.
        device: where to run.

    Raises:
        ProfileError: a block's values are not finite.
    """
    batches = list(held_out_batches(images, chosen, model.at_once))
    theirs = torch.cat([image_means(targets(index, device).values) for index in batches])
    taps = model.denoiser.tap_all()
    rows: list[Row] = []
    try:
        for timestep in request.timesteps:
            kept = {name: _Kept(f"block {name} at timestep {timestep:g}", request.metrics) for name in taps}
            for name, tap in taps.items():
                tap.hand_to(kept[name])
            for index in batches:
                show(model, images, index, timestep, device)
            for block, one in kept.items():
                rows += [_row(block, timestep, metric, value) for metric, value in one.values(theirs)]
    finally:
        for tap in taps.values():
            tap.remove()
    return rows


def choose_images(images: Images, request: Request, run_id: str) -> torch.Tensor:
    """The held-out images to measure on, ``(n,)``; fewer than all are spread evenly, for neighbours may be of one
    class.

    Raises:
        ProfileError: there are too few for what is asked.
    """
    held_out = images.split.held_out
    count = len(held_out) if request.samples is None else request.samples
    if count > len(held_out):
        raise ProfileError(f"{count} samples are asked for, and run {run_id} holds out {len(held_out)} images")
    for metric in request.metrics:
        if count < (least := _LEAST_IMAGES.get(metric, 1)):
            raise ProfileError(
                f"{metric} needs {least} or more held-out images, got {count}; leave it out of the metrics"
            )
    return held_out[torch.arange(count) * len(held_out) // count]


class _Kept:
    """What is kept of one block at one time: image means, and the spatial metrics batch by batch.

    Args:
        name: what to call it in a message.
        metrics: those asked for.
    """

    def __init__(self, name: str, metrics: Sequence[str]) -> None:
        self._name, self._metrics = name, metrics
        self._means: list[torch.Tensor] = []  # on the host: a network has many blocks
        self._spatial: dict[str, list[tuple[float | None, int]]] = {name: [] for name in metrics if name in _SPATIAL}

    def __call__(self, tokens: Tokens) -> None:
        """Take in the tokens of a batch, and keep none of them."""
        means = image_means(tokens.values).cpu()
        if not means.isfinite().all():
            raise ProfileError(f"{self._name} yields values that are not finite")
        self._means.append(means)
        if self._spatial:
            coarse = _coarse(tokens)
            farthest = sum(coarse.grid) - 2
            for metric, held in self._spatial.items():
                fits = farthest >= _SPATIAL[metric].farthest
                held.append((_SPATIAL[metric].value(coarse.values, coarse.grid) if fits else None, len(means)))

    def values(self, theirs: torch.Tensor) -> Iterator[tuple[str, float]]:
        """The metrics over all batches, against the encoder's image means of the same images.

        Raises:
            TapError: the block did not run once in every pass.
        """
        ours = torch.cat(self._means).to(theirs.device) if self._means else torch.empty(0, 1)
        if len(ours) != len(theirs):
            raise TapError(f"{self._name} saw {len(ours)} images of {len(theirs)}")
        for metric in self._metrics:
            if metric in _ALIGNMENT:
                yield metric, _ALIGNMENT[metric](ours, theirs)
            elif all(value is not None for value, _ in self._spatial[metric]):
                values, counts = zip(*self._spatial[metric], strict=True)
                yield metric, float(np.average(values, weights=counts))


def _coarse(tokens: Tokens) -> Tokens:
    """Tokens in float32 on a grid of at most 16 along a side, of the same aspect."""
    height, width = tokens.grid
    scale = max(1.0, max(tokens.grid) / SPATIAL_SIDE)
    grid = max(1, round(height / scale)), max(1, round(width / scale))
    return Tokens(tokens.values.float(), tokens.grid).resample(grid)


def _row(block: BlockName, timestep: float, metric: str, value: float) -> Row:
    return {"block": block, "timestep": timestep, "metric": metric, "value": value}


def _encoder(run: Run, request: Request) -> EncoderSettings:
    encoder = request.encoder or run.config.alignment_encoder
    if encoder is None:
        raise ProfileError(f"run {run.run_id} is compared with no encoder; name one")
    if encoder.weights is not None and not Path(encoder.weights).is_file():
        raise ProfileError(f"the weights of '{encoder.name}', '{encoder.weights}', are no file")
    return encoder


def _blocks(config: RunConfig) -> Row:
    """Where the run measures alignment, and where it is aligned, if it is."""
    aligned = choose_block(config, config.regularizer.block_index) if config.regularizer.encoders else None
    return {"measured_block": choose_block(config, config.evaluate.block_index, aligned), "aligned_block": aligned}


def _protocol(
    request: Request, encoder: EncoderSettings, options: RunOptions, images: Images, chosen: torch.Tensor
) -> dict[str, Any]:
    """All that decides a value but the run; files of weights are named by their content."""
    return {
        "version": PROTOCOL_VERSION,
        "encoder": described(encoder),
        "weights": request.weights,
        "timesteps": list(request.timesteps),
        "metrics": list(request.metrics),
        "images": len(chosen),
        "data": images.source.fingerprint,
        "seed": MEASURING_SEED,
        "k": NEIGHBOURS,
        "spatial_side": SPATIAL_SIDE,
        "precision": options.precision,
        "packages": provenance()["packages"],
    }


def known_encoder(configs: Sequence[RunConfig], name: str) -> EncoderSettings | None:
    """The settings under which one of these runs uses the encoder of a name; None if none does."""
    used = [encoder for config in configs for _, encoder in config.encoder_paths]
    return next((encoder for encoder in used if encoder.name == name), None)
