"""The name of a metric says how it was measured; numbers of different names are never compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from repa_lab.registry import Registry

# Part of every run's identity: raise it when a change of code changes what a measurement or a training step means.
PROTOCOL_VERSION = 2


_NOT_COMPARED = {"seed", "versions"}
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class MetricFacts:
    """A metric of samples: what it is called, what it compares, and, of a plugin, how it is computed.

    Attributes:
        yields: the name of each of its values with Inception's features and with any other's, None if it has no meaning
            there. Only Inception's distances are FID and KID.
        goal: whether small or large values are good.
        compares: ``statistics`` (mean and covariance) or ``features`` of real images, or ``nothing``.
        least_real: real images that it needs at least.
        compute: of a plugin; see :func:`metric`.
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
# Precision and recall look at the third nearest neighbour.
METRICS.add("precision_recall", MetricFacts((("precision",) * 2, ("recall",) * 2), "max", "features", 4))


def metric(name: str, *, goal: Literal["min", "max"]) -> Callable[[F], F]:
    """Register a metric under the name by which ``evaluate.metrics`` calls it, which also begins its full names.

    Decorates a function of features of generated images ``(n, d)`` and of real ones ``(m, d)``, float32 NumPy arrays,
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
    found = (METRICS[name] for name in METRICS if any(kind in names for names in METRICS[name].yields))
    return next((facts.goal for facts in found), "min")


def quality_names(metric: str, extractor: str, samples: int, sampler: str, suffix: str = "") -> tuple[str, ...]:
    """The full names of what a metric yields, such as ``fid:inception@10k/ode50`` or
    ``frechet:efficientnet_lite0@500/sde250``.

    Args:
        metric: one of :data:`METRICS`.
        extractor: whose features are compared.
        samples: how many.
        sampler: see :func:`sampler_name`.
        suffix: guidance and labels, where they are not the usual ones.
    """
    kinds = (inception if extractor == "inception" else other for inception, other in METRICS[metric].yields)
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
