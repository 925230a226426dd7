"""What a run's numbers are called; imports no torch, so that `plan` can say it too."""

from __future__ import annotations

from repa_lab.metrics.protocol import frechet_name, guidance_name, sampler_name
from repa_lab.spec.schema import EvaluateConfig


def metric_name(config: EvaluateConfig) -> str:
    """The full name of the Frechet metric that these settings measure."""
    sampler, guidance = config.sampler, config.guidance
    return frechet_name(
        config.extractor.name,
        config.samples,
        sampler_name(sampler.type, sampler.solver, sampler.steps),
        guidance_name(guidance.scale, guidance.low, guidance.high),
    )
