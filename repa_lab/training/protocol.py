"""What a run's numbers are called; imports no torch, so that `plan` can say it too."""

from __future__ import annotations

from collections.abc import Iterator

from repa_lab.metrics.protocol import guidance_name, labels_name, pipeline_name, quality_names, sampler_name
from repa_lab.spec import EvaluateConfig, ExtractorConfig
from repa_lab.spec.schema import RunConfig

MIN_HELD_OUT = 4  # images that an unbiased CKA needs


def metric_name(config: RunConfig) -> str:
    """The full name of the Frechet metric that a run measures most often."""
    return next(measured(config, config.evaluate, "frechet", config.evaluate.extractors[0]))


def metric_names(config: RunConfig) -> tuple[str, ...]:
    """The full names of all that a run measures of its samples; the first is :func:`metric_name`."""
    return tuple(dict.fromkeys(name for tier in tiers(config) for name in names_of(config, tier)))


def milestone_names(config: RunConfig) -> frozenset[str]:
    """Those that are measured at milestones alone."""
    return frozenset(metric_names(config)) - frozenset(names_of(config, config.evaluate))


def tiers(config: RunConfig, step: int | None = None) -> tuple[EvaluateConfig, ...]:
    """The protocols that a run is measured by, at a step if one is given: the usual one, and that of milestones, if any."""
    rare = config.evaluate.milestone
    return (config.evaluate, *([rare] if rare and (step is None or step in config.milestones) else []))


def names_of(config: RunConfig, tier: EvaluateConfig) -> Iterator[str]:
    """The full names of all that a protocol measures."""
    for metric in sorted(tier.metrics, key=lambda metric: metric != "frechet"):
        for extractor in tier.extractors:
            yield from measured(config, tier, metric, extractor)


def measured(config: RunConfig, tier: EvaluateConfig, metric: str, extractor: ExtractorConfig) -> Iterator[str]:
    """The full names of what a metric yields with an extractor."""
    yield from quality_names(metric, extractor.name, tier.samples, *_sampling(config, tier))


def shared_names(config: RunConfig) -> Iterator[str]:
    """Full names that a run would give to measurements of several extractors, of other weights or another reference."""
    owner: dict[str, ExtractorConfig] = {}
    found = (
        (name, extractor)
        for tier in tiers(config)
        for extractor in tier.extractors
        for metric in tier.metrics
        for name in measured(config, tier, metric, extractor)
    )
    yield from dict.fromkeys(name for name, extractor in found if owner.setdefault(name, extractor) != extractor)


def _sampling(config: RunConfig, tier: EvaluateConfig) -> tuple[str, str]:
    sampler, guidance, labels = tier.sampler, tier.guidance, labels_name(tier.labels)
    if config.model.pretrained is not None:
        return pipeline_name(sampler.steps, guidance.scale), labels
    suffix = guidance_name(guidance.scale, guidance.low, guidance.high) + labels
    return sampler_name(sampler.type, sampler.solver, sampler.steps), suffix
