"""Measure a denoiser: its samples against the training images, and its hidden states against an encoder's tokens.

See docs/protocol.md for the meaning of the numbers.
"""

from __future__ import annotations

import functools
import importlib.metadata
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torchvision.transforms.functional import resize
from torchvision.utils import make_grid

from repa_lab.align import Tokens
from repa_lab.align.losses import sum_over_ranks, world_size
from repa_lab.align.regularizer import Pair
from repa_lab.align.tokens import Grid
from repa_lab.data import DataError
from repa_lab.data.sources import as_images, groups
from repa_lab.encoders.targets import Targets
from repa_lab.errors import StateError
from repa_lab.files import digest, file_digest, replace_atomically
from repa_lab.metrics import CosineSums, cka
from repa_lab.metrics.extractor import Extractor
from repa_lab.metrics.protocol import METRICS
from repa_lab.metrics.quality import NEIGHBOURS, SPLITS, kid_protocol
from repa_lab.metrics.reference import Collector, ComparedImages, RealImages, measure, read_reference, reference
from repa_lab.models.family import BlockIndex
from repa_lab.models.released import SCHEDULER, read_json
from repa_lab.models.tap import Tap
from repa_lab.runs.files import Row
from repa_lab.spec import EvaluateConfig, ExtractorConfig, RunConfig
from repa_lab.training.batches import Images, pretrained_folder
from repa_lab.training.diffusion import shares
from repa_lab.training.model import Model
from repa_lab.training.resolve import (
    MIN_HELD_OUT,
    content_of,
    encoder_identity,
    names_of_metric,
    numbers_of,
    protocols_of,
)

_DEFAULT_BATCH: int = EvaluateConfig.model_fields["batch_size"].default
_REFERENCE_BATCH = 512
# The inception score compares the samples' features with nothing.
_KEPT_OF_SAMPLES = ("features", "nothing")
# The parameters of metrics that compare features, given the numbers of samples and of real images.
_PARAMETERS: dict[str, Callable[[int, int], dict[str, Any]]] = {
    "kid": lambda samples, real: {"subsets": kid_protocol(samples, real)},
    "inception_score": lambda samples, real: {"splits": SPLITS},
    "precision_recall": lambda samples, real: {"neighbours": NEIGHBOURS},
}
_GRID_SAMPLES = 40
_GRID_COLUMNS = 10
_GRID_MIN_PIXELS = 32
_GRID_MAX_WIDTH = 2560
_LIBRARIES = ("torch", "torchvision", "torch-fidelity", "diffusers", "timm", "numpy", "scipy")
_ALIGNMENT = {
    "heldout/cka": "linear CKA, unbiased, of image means",
    "heldout/cosine": "mean cosine of projected tokens",
    "heldout/gap": "mean cosine of projected tokens, less that of other images",
}


class DivergedError(StateError):
    """The loss or the samples are not finite."""


class Evaluator:
    """Measures a denoiser with its current weights: its samples against the training images.

    Args:
        targets: encoder tokens; None measures no alignment.
        part: number of this process and number of processes; they share the sampling and all return the same result.

    Raises:
        EncoderError: an extractor's weights are missing.
        StatisticsError: a file of reference statistics cannot be used.
        DataError: too few images are held out to measure alignment.
    """

    def __init__(
        self,
        config: RunConfig,
        images: Images,
        model: Model,
        targets: Targets | None,
        cache: Path,
        device: torch.device,
        part: tuple[int, int] = (0, 1),
    ) -> None:
        if targets is not None and len(images.split.held_out) < MIN_HELD_OUT:
            raise DataError("holdout", f"alignment is measured on held-out images: hold out {MIN_HELD_OUT} or more")
        self._config, self._model, self._images, self._targets = config, model, images, targets
        self._device, self._part, self._real = device, part, real_images(images)
        extractors = dict.fromkeys(settings for protocol in protocols_of(config) for settings in protocol.extractors)
        self._extractors = {settings: open_extractor(config, settings, device) for settings in extractors}
        self._references = {
            settings: open_reference(settings, extractor, self._real, cache)
            for settings, extractor in self._extractors.items()
        }

    def quality(self, protocol: EvaluateConfig) -> tuple[Row, torch.Tensor]:
        """Return the metrics of a protocol by full name, and the samples to show as uint8 pixels ``(n, C, H, W)``.

        Raises:
            DivergedError: a sample is not finite.
        """
        collectors, shown = self.draw(protocol)
        row: Row = {}
        for extractor, collector in collectors.items():
            for moments in collector.moments.values() if world_size() > 1 else ():
                moments.merge(sum_over_ranks)
            collector.kept = gather_object(collector.kept)  # none unless a metric compares features
            generated = collector.images
            for metric in protocol.metrics:
                names = list(names_of_metric(self._config, protocol, metric, extractor))
                if names:  # some metrics are defined for Inception's features only
                    row |= dict(zip(names, measure(metric, generated, self._references[extractor]), strict=True))
        return row, shown

    def draw(self, protocol: EvaluateConfig) -> tuple[dict[ExtractorConfig, Collector], torch.Tensor]:
        """Draw this process's samples: what metrics compare, by extractor, and the samples to show of all processes."""
        sampler = self._model.sampler(protocol)
        collectors = {
            extractor: Collector(self._extractors[extractor], protocol.metrics, _KEPT_OF_SAMPLES)
            for extractor in protocol.extractors
        }
        first: list[tuple[int, torch.Tensor]] = []
        is_finite = True
        for index in shares(protocol.samples, protocol.batch_size, self._part):
            pixels = sampler(index)
            is_finite = pixels is not None
            if pixels is None:
                break
            for extractor, collector in collectors.items():
                collector.add(self._extractors[extractor].features(as_images(pixels)), index.start)
            if index.start < _GRID_SAMPLES:
                first.append((index.start, pixels[: _GRID_SAMPLES - index.start].cpu()))
        if not all(gather_object([is_finite])):
            raise DivergedError("the denoiser draws samples that are not finite")
        first = sorted(gather_object(first), key=lambda batch: batch[0])
        shown = sampler.shown() if self._part[0] == 0 else None
        return collectors, torch.cat([pixels for _, pixels in first]) if shown is None else shown

    @torch.no_grad()
    def alignment(self, tap: Tap, match: Callable[[Tokens, Tokens], Pair] | None) -> Row:
        """Return the agreement of a block with the encoder on held-out images, without labels or captions.

        ``match`` projects the block's tokens and pairs them with the encoder's; None measures no cosine.
        """
        if self._targets is None:
            return {}
        students, teachers, by_grids = [], [], defaultdict[tuple[Grid, Grid], CosineSums](CosineSums)
        for index in held_out_batches(self._images, self._images.split.held_out, self._model.at_once):
            self._model.show(self._images, index, self._config.evaluate.timestep, self._device)
            student, teacher = tap.take(), self._targets(index, self._device)
            student = Tokens(student.values.float(), student.grid, student.frames)
            teacher = Tokens(teacher.values.float(), teacher.grid, teacher.frames)
            students.append(student.values.mean(dim=1))
            teachers.append(teacher.values.mean(dim=1))
            if match is not None:
                by_grids[student.grid, teacher.grid].add(*match(student, teacher))
        row: Row = {"heldout/cka": cka(torch.cat(students), torch.cat(teachers))}
        sums = list(by_grids.values())
        if sums:
            weights = [grid.images for grid in sums]
            row["heldout/cosine"] = float(np.average([grid.cosine for grid in sums], weights=weights))
        if several := [grid for grid in sums if grid.images > 1]:  # a single image cannot be mismatched
            weights = [grid.images for grid in several]
            row["heldout/gap"] = float(np.average([grid.gap for grid in several], weights=weights))
        return row

    def protocols(self, seed: int, block: BlockIndex) -> dict[str, dict[str, Any]]:
        """Return everything that each number depends on, by its name; alignment is measured at ``block``."""
        described = {
            name: {**self._describe(protocol, extractor, metric), "seed": seed, "versions": versions()}
            for name, protocol, extractor, metric in numbers_of(self._config)
        }
        encoder, held_out = self._config.alignment_encoder, self._images.split.held_out
        if self._targets is None or encoder is None:
            return described
        shared = {
            "encoder": encoder_identity(encoder),
            "block": block,
            "timestep": self._config.evaluate.timestep,
            "held_out": digest({"data": self._images.base.fingerprint, "images": held_out.tolist()}),
            "images": len(held_out),
            **noise_protocol(self._config.evaluate, len(held_out)),
            "versions": versions(),
        }
        return described | {name: {"metric": metric, **shared} for name, metric in _ALIGNMENT.items()}

    def _describe(self, protocol: EvaluateConfig, extractor: ExtractorConfig, metric: str) -> dict[str, Any]:
        frames = self._config.data.clip_frames
        return {
            "metric": metric,
            **self._extractors[extractor].identity,
            "reference": file_digest(Path(extractor.reference)) if extractor.reference else self._real.source,
            **_metric_details(metric, self._references[extractor], protocol.samples * max(frames, 1)),
            "samples": protocol.samples,
            **({"frames": frames} if frames else {}),
            "sampler": protocol.sampler.model_dump(mode="json"),
            "guidance": protocol.guidance.model_dump(mode="json"),
            "labels": protocol.labels,
            **({} if protocol.rounding == "nearest" else {"rounding": protocol.rounding}),  # the default is left out
            **decoder_identity(self._config),
        }


def _metric_details(metric: str, reference: ComparedImages, samples: int) -> dict[str, Any]:
    """Return what a metric depends on beside the samples: the real images and the metric's own parameters."""
    compares, origin = METRICS[metric].compares, METRICS.origin(metric)
    if compares == "statistics":
        statistics = reference.of(metric)
        return {"real": statistics.count, "features": len(statistics.mu)}
    real = 0 if compares == "nothing" else len(reference.of(metric))
    parameters = {"plugin": origin.digest} if origin else _PARAMETERS[metric](samples, real)
    return parameters if compares == "nothing" else {"real": real, **parameters}


def decoder_identity(config: RunConfig) -> dict[str, Any]:
    """Return the content of what decodes samples to pixels, and the scheduler of a pretrained pipeline."""
    decoder = config.data.vae or config.model.pretrained
    identity: dict[str, Any] = {"decoder": decoder and content_of(decoder)}
    if config.model.pretrained is None:
        return identity
    scheduler = read_json(pretrained_folder(config.model) / SCHEDULER / "scheduler_config.json") or {}
    scheduler.pop("_diffusers_version", None)
    # Some schedulers have a limit of -Infinity, which is not valid JSON.
    finite = {name: str(value) if value in (math.inf, -math.inf) else value for name, value in scheduler.items()}
    return {**identity, "scheduler": finite}


@functools.cache
def versions() -> dict[str, str]:
    """Return the versions of the libraries that numbers may depend on."""
    return {name: importlib.metadata.version(name) for name in _LIBRARIES}


def open_extractor(config: RunConfig, extractor: ExtractorConfig, device: torch.device) -> Extractor:
    """Return an extractor for all metrics that a run computes with it, shared by a process; see :class:`Extractor`."""
    content = extractor.weights and content_of(extractor.weights)
    return _extractor(extractor.name, extractor.weights, content, device, metrics_with(config, extractor))


@functools.lru_cache(maxsize=2)
def _extractor(
    name: str, weights: str | None, content: str | None, device: torch.device, metrics: tuple[str, ...]
) -> Extractor:
    """Return an extractor, which is loaded anew if the content of its file changes."""
    return Extractor(name, weights, device, metrics)


def metrics_with(config: RunConfig, extractor: ExtractorConfig) -> tuple[str, ...]:
    """Return the metrics that a run computes with an extractor, under any of its protocols."""
    using = (protocol for protocol in protocols_of(config) if extractor in protocol.extractors)
    return tuple(dict.fromkeys(metric for protocol in using for metric in protocol.metrics))


def open_reference(config: ExtractorConfig, extractor: Extractor, real: RealImages, cache: Path) -> ComparedImages:
    """Return the reference of an extractor: a file of statistics, or the training images' features from the cache."""
    if config.reference:
        return read_reference(extractor, Path(config.reference), real.size)
    return reference(extractor, real, cache)


def real_images(images: Images) -> RealImages:
    """Return the training images, or all frames of the clips, as a reference, without mirrored ones."""
    source, train = images.base, images.split.train
    frames = max(source.clip_frames, 1)

    def batches() -> Iterator[torch.Tensor]:
        for group in groups(source.sizes[train]):
            for index in train[group].split(max(1, _REFERENCE_BATCH // frames)):
                yield as_images(source.read(index.tolist()))

    sizes = source.sizes[train].unique(dim=0).tolist()
    size = (sizes[0][0], sizes[0][1]) if len(sizes) == 1 else None
    content = digest({"data": source.fingerprint, "images": train.tolist()})
    return RealImages(content, len(train) * frames, batches, size)


def held_out_batches(images: Images, chosen: torch.Tensor, at_once: int) -> Iterator[torch.Tensor]:
    """Yield the images ``chosen`` ``(n,)`` in batches of one size, at most ``at_once`` each."""
    for group in groups(images.source.sizes[chosen]):
        yield from chosen[group].split(at_once)


def noise_protocol(config: EvaluateConfig, images: int) -> dict[str, int]:
    """Return the protocol fields that describe the noise batch; none for the default size, as in earlier protocols."""
    batch = min(config.batch_size, images)
    return {} if batch == min(_DEFAULT_BATCH, images) else {"noise_batch": batch}


def write_grid(pixels: torch.Tensor, path: Path) -> None:
    """Write samples ``(n, C, H, W)``, uint8, as one PNG of up to ten columns; of clips, a row for each.

    Tiny images are enlarged without smoothing; large ones are shrunk until a row fits a screen.
    """
    from PIL import Image

    columns = pixels.shape[2] if pixels.ndim == 5 else min(len(pixels), _GRID_COLUMNS)
    pixels, side = as_images(pixels), pixels.shape[-1]
    scale = max(1, _GRID_MIN_PIXELS // side)
    sized = pixels.repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    if columns * side > _GRID_MAX_WIDTH:
        sized = resize(pixels, [_GRID_MAX_WIDTH // columns], antialias=True)
    grid = make_grid(sized, nrow=columns, padding=2, pad_value=255)
    image = Image.fromarray(grid.permute(1, 2, 0).numpy())
    replace_atomically(path, lambda temporary: image.save(temporary, format="PNG"))
