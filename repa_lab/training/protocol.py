"""What a run's numbers are called; imports no torch, so that `plan` can say it too."""

from __future__ import annotations

from repa_lab.metrics.protocol import frechet_name, guidance_name, pipeline_name, sampler_name
from repa_lab.spec.schema import RunConfig


def metric_name(config: RunConfig) -> str:
    """The full name of the Frechet metric that a run measures."""
    extractor, samples, sampler = config.evaluate.extractor.name, config.evaluate.samples, config.evaluate.sampler
    guidance = config.evaluate.guidance
    if config.model.pretrained is not None:
        return frechet_name(extractor, samples, pipeline_name(sampler.steps, guidance.scale))
    named = sampler_name(sampler.type, sampler.solver, sampler.steps)
    return frechet_name(extractor, samples, named, guidance_name(guidance.scale, guidance.low, guidance.high))
