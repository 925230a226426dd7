"""Metrics and their full names, which say how a number was measured. Numbers of different names are never compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from repa_lab.registry import Registry

# Part of every run's identity. Raise it when a change of code changes what a measurement or a training step means.
PROTOCOL_VERSION = 2
_NOT_COMPARED = {"seed", "versions"}
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class MetricFacts:
    """A metric of samples as data.

    Attributes:
        yields: the kind of each of its values with Inception's features and with other features, None if the metric is
            not defined there. Only Inception's distances are called FID and KID.
        goal: whether small or large values are good.
        compares: ``statistics`` (mean and covariance) or ``features`` of real images, or ``nothing``.
        least_real: minimum number of real images.
        compute: the function of a plugin's metric; see :func:`metric`.
    """

    yields: tuple[tuple[str, str | None], ...]
    goal: Literal["min", "max"]
    compares: Literal["statistics", "features", "nothing"]
    least_real: int = 0
    compute: Callable[..., float] | None = None


METRICS: Registry[MetricFacts] = Registry("metric")
METRICS.add("frechet", MetricFacts((("fid", "frechet"),), "min", "statistics", 2))
METRICS.add("sfid", MetricFacts((("sfid", None),), "min", "statistics", 2))
METRICS.add("kid", MetricFacts((("kid", "kernel"),), "min", "features", 2))
METRICS.add("inception_score", MetricFacts((("is", None),), "max", "nothing"))
# Precision and recall use the third nearest neighbour.
METRICS.add("precision_recall", MetricFacts((("precision",) * 2, ("recall",) * 2), "max", "features", 4))


def metric(name: str, *, goal: Literal["min", "max"]) -> Callable[[F], F]:
    """Register a metric under the name used in ``evaluate.metrics``, with which its full names begin.

    Decorates a function of features of generated images ``(n, d)`` and of real images ``(m, d)``, float32 NumPy arrays,
    that returns a number.

    Args:
        name: the metric's name.
        goal: whether small or large values are good.

    Raises:
        PluginError: the name is taken.
    """

    def register(compute: F) -> F:
        METRICS.add(name, MetricFacts(((name, name),), goal, "features", 2, compute))
        return compute

    return register


def goal_of_kind(kind: str) -> Literal["min", "max"]:
    """Return whether small or large values of a kind of metric, the first part of its full name, are good."""
    goals = (facts.goal for facts in METRICS.values() if any(kind in kinds for kinds in facts.yields))
    return next(goals, "min")


def quality_names(metric: str, extractor: str, samples: int, sampler: str, suffix: str = "") -> tuple[str, ...]:
    """Return the full names of a metric's values, such as ``fid:inception@10k/ode50``.

    Args:
        metric: a name in :data:`METRICS`.
        extractor: name of the feature extractor.
        samples: number of samples.
        sampler: the sampler's name; see :func:`sampler_name`.
        suffix: guidance and labels, where they differ from the default.
    """
    kinds = (inception if extractor == "inception" else other for inception, other in METRICS[metric].yields)
    count = f"{samples // 1000}k" if samples % 1000 == 0 else str(samples)
    return tuple(f"{kind}:{extractor}@{count}/{sampler}{suffix}" for kind in kinds if kind)


def labels_name(labels: str) -> str:
    """Return ``-random`` for randomly drawn classes, which cost about 0.1 of FID; empty for balanced classes."""
    return "" if labels == "balanced" else f"-{labels}"


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the fields in which two protocols of one name differ, so that their numbers must not be compared.

    Seeds and library versions may differ.
    """
    return tuple(sorted(key for key in {*first, *second} - _NOT_COMPARED if first.get(key) != second.get(key)))


def sampler_name(type: str, solver: str, steps: int) -> str:
    """Return ``ode50`` (Euler), ``heun50`` or ``sde250``."""
    kind = "sde" if type == "sde" else "ode" if solver == "euler" else solver
    return f"{kind}{steps}"


def pipeline_name(steps: int, guidance: float) -> str:
    """Return ``pipeline30-cfg5`` for a pretrained family's own pipeline, scheduler and guidance."""
    return f"pipeline{steps}" + ("" if guidance == 1 else f"-cfg{guidance:g}")


def guidance_name(scale: float, low: float, high: float) -> str:
    """Return ``-cfg1.8[0,0.7]``, or an empty string without guidance."""
    return "" if scale == 1 else f"-cfg{scale:g}[{low:g},{high:g}]"
