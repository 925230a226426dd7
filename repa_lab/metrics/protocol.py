"""The name of a metric says how it was measured; numbers of different names are never compared."""

from __future__ import annotations

# Part of every run's identity: raise it when a change of code changes what a measurement or a training step means.
PROTOCOL_VERSION = 1


def frechet_name(extractor: str, samples: int, sampler: str, guidance: str = "") -> str:
    """``fid:inception@10k/ode50`` or ``frechet:efficientnet_lite0@500/sde250``: only Inception's distance is FID."""
    kind = "fid" if extractor == "inception" else "frechet"
    return f"{kind}:{extractor}@{_thousands(samples)}/{sampler}{guidance}"


def sampler_name(type: str, solver: str, steps: int) -> str:
    """``ode50`` (Euler), ``heun50`` or ``sde250``."""
    kind = "sde" if type == "sde" else "ode" if solver == "euler" else solver
    return f"{kind}{steps}"


def pipeline_name(steps: int, guidance: float) -> str:
    """``pipeline30-cfg5``: a pretrained family's own pipeline, scheduler and guidance."""
    return f"pipeline{steps}" + ("" if guidance == 1 else f"-cfg{guidance:g}")


def guidance_name(scale: float, low: float, high: float) -> str:
    """``-cfg1.8[0,0.7]``, or nothing without guidance."""
    return "" if scale == 1 else f"-cfg{scale:g}[{low:g},{high:g}]"


def _thousands(count: int) -> str:
    return f"{count // 1000}k" if count % 1000 == 0 else str(count)
