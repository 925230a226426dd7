"""The name of a metric says how it was measured; numbers of different names are never compared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

# Part of every run's identity: raise it when a change of code changes what a measurement or a training step means.
PROTOCOL_VERSION = 2


_NOT_COMPARED = {"seed", "versions"}
# What each kind of measurement yields, as it is called with Inception's features and with any other's, None if it has no
# meaning there. Only Inception's distances are FID and KID.
YIELDS: dict[str, tuple[tuple[str, str | None], ...]] = {
    "frechet": (("fid", "frechet"),),
    "sfid": (("sfid", None),),
    "kid": (("kid", "kernel"),),
    "inception_score": (("is", None),),
    "precision_recall": (("precision", "precision"), ("recall", "recall")),
}

_RISING = {"is", "precision", "recall"}


def goal_of_kind(kind: str) -> Literal["min", "max"]:
    """Whether small or large values of a kind of metric, the first part of its full name, are good."""
    return "max" if kind in _RISING else "min"


def quality_names(metric: str, extractor: str, samples: int, sampler: str, suffix: str = "") -> tuple[str, ...]:
    """The full names of what a metric yields, such as ``fid:inception@10k/ode50`` or ``frechet:efficientnet_lite0@500/sde250``.

    Args:
        metric: one of :data:`YIELDS`.
        extractor: whose features are compared.
        samples: how many.
        sampler: see :func:`sampler_name`.
        suffix: guidance and labels, where they are not the usual ones.
    """
    kinds = (inception if extractor == "inception" else other for inception, other in YIELDS[metric])
    return tuple(f"{kind}:{extractor}@{_thousands(samples)}/{sampler}{suffix}" for kind in kinds if kind)


def labels_name(labels: str) -> str:
    """Nothing for classes in turn, ``-random`` for those drawn at random, which cost about 0.1 of FID."""
    return "" if labels == "balanced" else f"-{labels}"


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[str, ...]:
    """The fields in which two protocols of one name differ, so that their numbers must not be compared.

    Seeds are what differs between repeats, and library versions are recorded but not held against anybody.
    """
    return tuple(sorted(key for key in {*one, *other} - _NOT_COMPARED if one.get(key) != other.get(key)))


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
