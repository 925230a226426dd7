"""What a run's regularizer asks for, by its settings and its denoiser's family. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from repa_lab.align.settings import REGULARIZERS, EncoderSettings, Needs, RegularizerSettings
from repa_lab.data.settings import SOURCES
from repa_lab.encoders.registry import ENCODERS
from repa_lab.metrics.protocol import METRICS
from repa_lab.models.families import FAMILIES
from repa_lab.models.family import BlockIndex, Shape, shape_of
from repa_lab.registry import Origin, PluginError, Registry
from repa_lab.spec import RunConfig
from repa_lab.training.protocol import tiers


def resolved_regularizer(config: RunConfig) -> RegularizerSettings:
    """Return a run's regularizer with the family's suggested block, and the step at which a decay ends with the training."""
    return config.regularizer.resolved(shape_of_model(config).block, config.train.steps)


def needs_of(config: RunConfig) -> Needs:
    """Return what a run's regularizer asks for.

    Raises:
        PluginError: what a plugin's ``needs`` returns is no Needs.
    """
    name = config.regularizer.type
    needs, origin = REGULARIZERS[name].needs(resolved_regularizer(config)), REGULARIZERS.origin(name)
    if origin and not isinstance(needs, Needs):
        raise PluginError(origin.file, origin.line, f"needs must return a Needs, got {type(needs).__name__}")
    return needs


def encoders_of(config: RunConfig) -> tuple[tuple[str, EncoderSettings], ...]:
    """Return every encoder that a run needs with its dotted path; that of the regularizer's type if no setting holds it."""
    set_ = config.encoder_paths
    known = {encoder for _, encoder in set_}
    return (*set_, *(("regularizer.type", encoder) for encoder in needs_of(config).encoders if encoder not in known))


def plugins_of(config: RunConfig) -> Iterator[Origin]:
    """Yield where every component of a plugin that a run uses was registered."""
    used: list[tuple[Registry[Any], str]] = [
        (REGULARIZERS, config.regularizer.type),
        (SOURCES, config.data.source),
        (FAMILIES, config.model.family),
        *((ENCODERS, encoder.name) for _, encoder in encoders_of(config)),
        *((METRICS, metric) for tier in tiers(config) for metric in tier.metrics),
    ]
    for registry, name in used:
        if origin := registry.origin(name):
            yield origin


def choose_block(config: RunConfig, *wishes: BlockIndex | None) -> BlockIndex:
    """Return the first block index of ``wishes`` that is not None, or else the family's suggestion."""
    return next((wish for wish in wishes if wish is not None), shape_of_model(config).block)


def shape_of_model(config: RunConfig) -> Shape:
    """Return what is known of a run's denoiser without building it; of a pretrained one, of the released model."""
    return shape_of(FAMILIES[config.model.family], config.model.size)
