"""Resolve a run's settings to its needs, plugins, data and metric names. Imports no torch, so that `plan` is fast."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from repa_lab.align.needs import Needs
from repa_lab.align.settings import REGULARIZERS, EncoderSettings, RegularizerSettings
from repa_lab.data.folders import fingerprint_files
from repa_lab.data.settings import SOURCES, Dataset, SourceSettings
from repa_lab.encoders.registry import ENCODERS, token_identity
from repa_lab.files import file_digest
from repa_lab.metrics.protocol import METRICS, guidance_name, quality_names, sampler_name
from repa_lab.models.families import FAMILIES
from repa_lab.models.family import BlockIndex, Shape, shape_of
from repa_lab.registry import Origin, PluginError, Registry
from repa_lab.settings import file_fields
from repa_lab.spec import EvaluateConfig, ExtractorConfig, RunConfig

MIN_HELD_OUT = 4  # images that an unbiased CKA needs


def shape_of_model(config: RunConfig) -> Shape:
    """Return the shape of a run's denoiser without building it; of a pretrained one, that of the released model."""
    return shape_of(FAMILIES[config.model.family], config.model.size)


def choose_block(config: RunConfig, *candidates: BlockIndex | None) -> BlockIndex:
    """Return the first block index that is not None, or else the family's suggestion."""
    return next((index for index in candidates if index is not None), shape_of_model(config).block)


def aligned_block(config: RunConfig) -> BlockIndex:
    """Return the block of the first regularizer with an encoder, or else of the first; the suggestion without any."""
    ordered = sorted(config.regularizers, key=lambda settings: not settings.encoders)
    return choose_block(config, *(settings.block_index for settings in ordered[:1]))


def resolved_regularizers(config: RunConfig) -> tuple[RegularizerSettings, ...]:
    """Return the regularizers' settings with the family's suggested block and a decay that ends with the training."""
    shape = shape_of_model(config)
    return tuple(settings.resolved(shape.block, config.train.steps, shape.depth) for settings in config.regularizers)


def needs_of(config: RunConfig) -> tuple[Needs, ...]:
    """Return the signals that each of a run's regularizers needs, with the family's block where it names none.

    Raises:
        PluginError: the ``needs`` of a plugin returns something else than a Needs.
    """

    resolved = []
    for needs in map(needs_of_one, resolved_regularizers(config)):
        blocks: dict[str, Any] = {}
        for name in ("taps", "ema_taps", "frozen_taps", "attention"):
            blocks[name] = tuple(choose_block(config, block) for block in getattr(needs, name))
        resolved.append(replace(needs, **blocks))
    return tuple(resolved)


def needs_of_one(settings: RegularizerSettings) -> Needs:
    """Return the signals that a regularizer needs, given its resolved settings; PluginError if they are no Needs."""
    needs, origin = REGULARIZERS[settings.type].needs(settings), REGULARIZERS.origin(settings.type)
    if origin and not isinstance(needs, Needs):
        raise PluginError(origin.file, origin.line, f"needs must return a Needs, got {type(needs).__name__}")
    return needs


def encoders_of(config: RunConfig) -> tuple[tuple[str, EncoderSettings], ...]:
    """Return every encoder of a run with its dotted path; an encoder in no setting has its regularizer's `type`."""
    known = {encoder for _, encoder in config.encoder_paths}
    asked = {
        encoder: f"{path}.type"
        for (path, _), needs in zip(config.regularizer_paths, needs_of(config), strict=True)
        for encoder in needs.encoders
        if encoder not in known
    }
    return (*config.encoder_paths, *((path, encoder) for encoder, path in asked.items()))


def attended_blocks(config: RunConfig, encoder: EncoderSettings) -> tuple[int, ...]:
    """Return the blocks of an encoder whose queries and keys regularizers need, each once."""
    needs = (one for one in needs_of(config) if encoder in one.encoders)
    return tuple(dict.fromkeys(block for one in needs for block in one.encoder_attention))


def plugins_of(config: RunConfig) -> Iterator[Origin]:
    """Yield where each plugin component that a run uses was registered."""
    used: list[tuple[Registry[Any], str]] = [
        *((REGULARIZERS, settings.type) for settings in config.regularizers),
        (SOURCES, config.data.source),
        (FAMILIES, config.model.family),
        *((ENCODERS, encoder.name) for _, encoder in encoders_of(config)),
        *((METRICS, metric) for protocol in protocols_of(config) for metric in protocol.metrics),
    ]
    for registry, name in used:
        if origin := registry.origin(name):
            yield origin


def protocols_of(config: RunConfig, step: int | None = None) -> tuple[EvaluateConfig, ...]:
    """Return the measuring protocols, the usual one and that of milestones, or only those that are due after a step."""
    milestone = config.evaluate.milestone
    is_due = milestone and (step is None or step in config.milestones)
    return (config.evaluate, milestone) if milestone and is_due else (config.evaluate,)


def metric_name(config: RunConfig) -> str:
    """Return the full name of the Frechet metric of the usual protocol."""
    return next(names_of_metric(config, config.evaluate, "frechet", config.evaluate.extractors[0]))


def metric_names(config: RunConfig) -> tuple[str, ...]:
    """Return the full names of all metrics of samples; the first is :func:`metric_name`."""
    return tuple(dict.fromkeys(name for name, *_ in numbers_of(config)))


def milestone_names(config: RunConfig) -> frozenset[str]:
    """Return the full names of the metrics that are measured at milestones only."""
    usual = {name for name, protocol, *_ in numbers_of(config) if protocol == config.evaluate}
    return frozenset(metric_names(config)) - usual


def numbers_of(config: RunConfig) -> Iterator[tuple[str, EvaluateConfig, ExtractorConfig, str]]:
    """Yield full name, protocol, extractor and metric of every number of samples, Frechet distances first."""
    for protocol in protocols_of(config):
        for metric in sorted(protocol.metrics, key=lambda metric: metric != "frechet"):
            for extractor in protocol.extractors:
                for name in names_of_metric(config, protocol, metric, extractor):
                    yield name, protocol, extractor, metric


def names_of_metric(
    config: RunConfig, protocol: EvaluateConfig, metric: str, extractor: ExtractorConfig
) -> Iterator[str]:
    """Yield the full names of the values that a metric yields with an extractor."""
    sampler, guidance, frames = protocol.sampler, protocol.guidance, config.data.clip_frames
    # Randomly drawn classes cost about 0.1 of FID; all frames of clips are compared as images.
    labels = "" if protocol.labels == "balanced" else f"-{protocol.labels}"
    labels += f"-frames{frames}" if frames else ""
    if config.model.pretrained is not None:  # drawn by the family's own pipeline and scheduler
        drawn_by = f"pipeline{sampler.steps}" + ("" if guidance.scale == 1 else f"-cfg{guidance.scale:g}")
        suffix = labels
    else:
        drawn_by = sampler_name(sampler.type, sampler.solver, sampler.steps)
        suffix = guidance_name(guidance.scale, guidance.low, guidance.high) + labels
    yield from quality_names(metric, extractor.name, protocol.samples, drawn_by, suffix)


def shared_names(config: RunConfig) -> Iterator[str]:
    """Yield the full names that extractors with different weights or references would share."""
    first: dict[str, ExtractorConfig] = {}
    shared = (name for name, _, given, _ in numbers_of(config) if first.setdefault(name, given) != given)
    yield from dict.fromkeys(shared)


@dataclass
class Inventory:
    """The data sets and local weights of a sweep; each folder is listed, and each file read, only once."""

    _datasets: dict[SourceSettings, Dataset] = field(default_factory=dict)
    _contents: dict[str, str] = field(default_factory=dict)

    def dataset(self, data: SourceSettings) -> Dataset:
        """Return the size and the fingerprint of a data set; DataError if it is missing or incomplete."""
        if data.is_unset:
            return Dataset("unset", None)
        key = data.model_copy(update={"holdout": None, "flip": False, "vae": None})
        if key not in self._datasets:
            self._datasets[key] = SOURCES[data.source].describe(key)
        return self._datasets[key]

    def content(self, place: str) -> str:
        """Return :func:`content_of` a place, from memory after the first call."""
        if place not in self._contents:
            self._contents[place] = content_of(place)
        return self._contents[place]

    def resolve(self, config: RunConfig) -> RunConfig:
        """Return the settings that a run records, with the number of held-out images and a hub data set's commit."""
        data = config.data.pinned()
        if data.holdout is None:
            data = data.model_copy(update={"holdout": data.held_out(self.dataset(config.data).images)})
        return config.model_copy(update={"data": data})


def content_of(place: str) -> str:
    """Return the digest of a file or folder of weights; for anything else, its name at the hub."""
    path = Path(place)
    if path.is_file():
        return file_digest(path)
    return fingerprint_files(path) if path.is_dir() else place


def encoder_identity(encoder: EncoderSettings) -> dict[str, Any]:
    """Return an encoder's settings with its files by content; equal identities give equal tokens."""
    settings = encoder.model_dump(mode="json")
    files = {name: content_of(value) for name, value, _ in file_fields(encoder)}
    return settings | files | token_identity(encoder.name)
