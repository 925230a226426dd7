"""What a run's regularizer asks for, by its settings and its denoiser's family. Imports no torch."""

from __future__ import annotations

from repa_lab.align.settings import REGULARIZERS, EncoderSettings, Needs, RegularizerSettings
from repa_lab.models.facts import BlockIndex, Shape, shape_of
from repa_lab.models.families import family_facts
from repa_lab.spec import RunConfig


def resolved_regularizer(config: RunConfig) -> RegularizerSettings:
    """Return a run's regularizer with the family's suggested block, and the step at which a decay ends with the training."""
    return config.regularizer.resolved(shape_of_model(config).block, config.train.steps)


def needs_of(config: RunConfig) -> Needs:
    """Return what a run's regularizer asks for."""
    return REGULARIZERS[config.regularizer.type].needs(resolved_regularizer(config))


def encoders_of(config: RunConfig) -> tuple[tuple[str, EncoderSettings], ...]:
    """Return every encoder that a run needs with its dotted path; that of the regularizer's type if no setting holds it."""
    set_ = config.encoder_paths
    known = {encoder for _, encoder in set_}
    return (*set_, *(("regularizer.type", encoder) for encoder in needs_of(config).encoders if encoder not in known))


def choose_block(config: RunConfig, *wishes: BlockIndex | None) -> BlockIndex:
    """Return the first block index of ``wishes`` that is not None, or else the family's suggestion."""
    return next((wish for wish in wishes if wish is not None), shape_of_model(config).block)


def shape_of_model(config: RunConfig) -> Shape:
    """Return what is known of a run's denoiser without building it; of a pretrained one, of the released model."""
    return shape_of(family_facts(config.model.family), config.model.size)
