"""Samples of a denoiser against the images that it was trained on, under a protocol; see docs/protocol.md."""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object

from repa_lab.data.sources import groups
from repa_lab.files import digest, file_digest
from repa_lab.metrics.extractor import Extractor, Features
from repa_lab.metrics.protocol import METRICS
from repa_lab.metrics.quality import NEIGHBOURS, SPLITS, kid_protocol
from repa_lab.metrics.reference import RealImages, Reference, measure, read_reference, reference
from repa_lab.models.released import SCHEDULER, read_json
from repa_lab.runs.files import Row
from repa_lab.spec import EvaluateConfig, ExtractorConfig, RunConfig
from repa_lab.training.fingerprints import content_of
from repa_lab.training.images import Images
from repa_lab.training.model import Model, pretrained_folder
from repa_lab.training.protocol import measured, tiers
from repa_lab.training.sampling import Sampler, shares

_GRID_SAMPLES = 40
_REFERENCE_BATCH = 512
_LIBRARIES = ("torch", "torchvision", "torch-fidelity", "diffusers", "timm", "numpy", "scipy")


def _of_statistics(against: Reference, metric: str, samples: int) -> dict[str, Any]:
    found = against.of(metric)
    return {"real": found.count, "features": len(found.mu)}


def _of_features(against: Reference, metric: str, samples: int) -> dict[str, Any]:
    real = len(against.features or ())
    over = {"subsets": kid_protocol(samples, real)} if metric == "kid" else {"neighbours": NEIGHBOURS}
    return {"real": real, **over}


def _of_plugin(against: Reference, metric: str, samples: int) -> dict[str, Any]:
    origin = METRICS.origin(metric)
    return {"real": len(against.features or ()), "plugin": origin and origin.digest}


# What else a metric depends on: real images, and what it is taken over.
_DETAILS: dict[str, Callable[[Reference, str, int], dict[str, Any]]] = {
    "frechet": _of_statistics,
    "sfid": _of_statistics,
    "kid": _of_features,
    "precision_recall": _of_features,
    "inception_score": lambda against, metric, samples: {"splits": SPLITS},
}


class DivergedError(RuntimeError):
    """The loss, or what the denoiser draws, is no longer a finite number."""


class _Drawn(NamedTuple):
    """A batch of samples: the number of the first, those to show, and features; None where one is not finite."""

    start: int
    shown: torch.Tensor
    features: list[Features] | None


class Quality:
    """Measures samples of a denoiser with the weights it has at the moment.

    Args:
        config: the run's settings.
        images: the data; its training images are the reference.
        model: what is measured.
        cache: where reference statistics are kept.
        device: where to run.
        part: which of how many processes this is: they share the sampling, and every one of them learns the result.

    Raises:
        EncoderError: an extractor's weights are missing.
        StatisticsError: a file of reference statistics cannot be used.
    """

    def __init__(
        self,
        config: RunConfig,
        images: Images,
        model: Model,
        cache: Path,
        device: torch.device,
        part: tuple[int, int] = (0, 1),
    ) -> None:
        self._config, self._model, self._part, self._real = config, model, part, real_images(images)
        wanted = dict.fromkeys(extractor for tier in tiers(config) for extractor in tier.extractors)
        self._extractors = {one: open_extractor(config, one, device) for one in wanted}
        self._references = {one: open_reference(one, net, self._real, cache) for one, net in self._extractors.items()}

    def __call__(self, tier: EvaluateConfig) -> tuple[Row, torch.Tensor]:
        """What the protocol measures, by full names, and what is shown of the samples as uint8 pixels ``(n, C, H, W)``.

        Raises:
            DivergedError: the samples are not finite.
        """
        sampler = self._model.sampler(tier)
        mine = [self._judge(tier, sampler, index) for index in shares(tier.samples, tier.batch_size, self._part)]
        drawn = sorted(gather_object(mine), key=lambda one: one.start)
        if any(one.features is None for one in drawn):
            raise DivergedError("the denoiser draws samples that are not finite")
        row: Row = {}
        for number, extractor in enumerate(tier.extractors):
            row |= self._measure(tier, extractor, Features.cat([one.features[number] for one in drawn]))
        shown = sampler.shown() if self._part[0] == 0 else None
        return row, torch.cat([one.shown for one in drawn]) if shown is None else shown

    def protocols(self, seed: int) -> dict[str, dict[str, Any]]:
        """All that each number depends on, by its name."""
        found: dict[str, dict[str, Any]] = {}
        for tier in tiers(self._config):
            for extractor in tier.extractors:
                for metric in tier.metrics:
                    for name in measured(self._config, tier, metric, extractor):
                        found[name] = self._describe(tier, extractor, metric, seed)
        return found

    def _judge(self, tier: EvaluateConfig, sampler: Sampler, index: range) -> _Drawn:
        pixels = sampler(index)
        if pixels is None:
            return _Drawn(index.start, torch.empty(0), None)
        features = [self._extractors[extractor].features(pixels) for extractor in tier.extractors]
        return _Drawn(index.start, pixels[: max(0, _GRID_SAMPLES - index.start)].clone(), features)

    def _measure(self, tier: EvaluateConfig, extractor: ExtractorConfig, found: Features) -> Row:
        row: Row = {}
        for metric in tier.metrics:
            names = list(measured(self._config, tier, metric, extractor))
            if names:  # some metrics have a meaning with Inception's features alone
                row |= dict(zip(names, measure(metric, found, self._references[extractor]), strict=True))
        return row

    def _describe(self, tier: EvaluateConfig, extractor: ExtractorConfig, metric: str, seed: int) -> dict[str, Any]:
        compared = file_digest(Path(extractor.reference)) if extractor.reference else self._real.source
        return {
            "metric": metric,
            **self._extractors[extractor].identity,
            "reference": compared,
            **_DETAILS.get(metric, _of_plugin)(self._references[extractor], metric, tier.samples),
            "samples": tier.samples,
            "sampler": tier.sampler.model_dump(mode="json"),
            "guidance": tier.guidance.model_dump(mode="json"),
            "labels": tier.labels,
            **({} if tier.rounding == "nearest" else {"rounding": tier.rounding}),  # the usual one goes without saying
            **drawn_by(self._config),
            "seed": seed,
            "versions": versions(),
        }


def drawn_by(config: RunConfig) -> dict[str, Any]:
    """What makes pixels of what is drawn, by its content, and of a pretrained pipeline the scheduler that it draws with."""
    decoder = config.data.vae or config.model.pretrained
    found: dict[str, Any] = {"decoder": decoder and content_of(decoder)}
    if config.model.pretrained is None:
        return found
    scheduler = read_json(pretrained_folder(config.model) / SCHEDULER / "scheduler_config.json") or {}
    # Some have a limit of -Infinity, which diffusers writes as such and no other parser reads.
    written = {name: str(value) if value in (math.inf, -math.inf) else value for name, value in scheduler.items()}
    return {**found, "scheduler": {name: value for name, value in written.items() if name != "_diffusers_version"}}


def versions() -> dict[str, str]:
    """The libraries that numbers may depend on."""
    return {name: importlib.metadata.version(name) for name in _LIBRARIES}


def open_extractor(config: RunConfig, extractor: ExtractorConfig, device: torch.device) -> Extractor:
    """An extractor, made for all that a run measures with it.

    Raises:
        EncoderError: its weights are missing.
    """
    return Extractor(extractor.name, extractor.weights, device, metrics_with(config, extractor))


def metrics_with(config: RunConfig, extractor: ExtractorConfig) -> tuple[str, ...]:
    """The metrics that a run measures with an extractor, under any of its protocols."""
    return tuple(
        dict.fromkeys(metric for tier in tiers(config) if extractor in tier.extractors for metric in tier.metrics)
    )


def open_reference(config: ExtractorConfig, extractor: Extractor, real: RealImages, cache: Path) -> Reference:
    """What an extractor compares with: a file of others, or the training images, once for all runs that share them.

    Raises:
        StatisticsError: the file cannot be used.
    """
    if config.reference:
        return read_reference(extractor, Path(config.reference), real.size)
    return reference(extractor, real, cache)


def real_images(images: Images) -> RealImages:
    """The training images as a reference: as they are, whether or not some are mirrored as they are seen."""
    source, train = images.base, images.split.train

    def batches() -> Iterator[torch.Tensor]:
        for group in groups(source.sizes[train]):
            for index in train[group].split(_REFERENCE_BATCH):
                yield source.read(index.tolist())

    sizes = source.sizes[train].unique(dim=0).tolist()
    size = (sizes[0][0], sizes[0][1]) if len(sizes) == 1 else None
    return RealImages(digest({"data": source.fingerprint, "images": train.tolist()}), len(train), batches, size)
