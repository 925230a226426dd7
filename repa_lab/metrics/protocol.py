"""Metrics and their full names, which say how a number was measured. Numbers of different names are never compared."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

from repa_lab import metrics
from repa_lab.registry import Registry
from repa_lab.timm_models import TINY, TimmModel, tiny

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from repa_lab.metrics import Statistics

    Features = NDArray[np.float32]

# Part of every run's identity. Raise it when a change of code changes what a measurement or a training step means.
PROTOCOL_VERSION = 2
_NOT_COMPARED = {"seed", "versions"}
F = TypeVar("F", bound=Callable[..., Any])
Goal = Literal["min", "max"]
Compared = Literal["statistics", "features", "nothing"]
Kinds = tuple[str, str | None]


@dataclass(frozen=True)
class MetricFacts:
    """A metric of samples as data; :func:`metric` describes the fields."""

    compute: Callable[..., float | tuple[float, ...]]
    goal: Goal
    yields: tuple[Kinds, ...]
    compares: Compared
    least_real: int


METRICS: Registry[MetricFacts] = Registry("metric")


def metric(
    name: str,
    *,
    goal: Goal,
    yields: tuple[Kinds, ...] | None = None,
    compares: Compared = "features",
    least_real: int = 2,
) -> Callable[[F], F]:
    """Register a metric under the name used in ``evaluate.metrics``.

    Decorates a function of features of generated images ``(n, d)`` and of real images ``(m, d)``, float32 NumPy arrays,
    that returns a number.

    Args:
        name: the metric's name.
        goal: whether small or large values are good.
        yields: for a function that returns several numbers, or numbers of another kind than ``name``: the kind of each,
            with which its full name begins, with Inception's features and with other features. None if the metric is
            not defined there. Only Inception's distances are called FID and KID.
        compares: what the function takes: ``features`` of both, the :class:`Statistics` of both, which are summed while
            samples are drawn, or features of generated images alone with ``nothing``.
        least_real: minimum number of real images.

    Raises:
        PluginError: the name is taken.
    """

    def register(compute: F) -> F:
        METRICS.add(name, MetricFacts(compute, goal, yields or ((name, name),), compares, least_real))
        return compute

    return register


# The functions of `repa_lab.metrics` are imported as they are called, for they cost torch.
@metric("sfid", goal="min", yields=(("sfid", None),), compares="statistics")
@metric("frechet", goal="min", yields=(("fid", "frechet"),), compares="statistics")
def _frechet(generated: Statistics, real: Statistics) -> float:
    return metrics.frechet_distance(generated.mu, generated.sigma, real.mu, real.sigma)


@metric("kid", goal="min", yields=(("kid", "kernel"),))
def _kid(generated: Features, real: Features) -> float:
    return metrics.kid(generated, real).value


@metric("inception_score", goal="max", yields=(("is", None),), compares="nothing", least_real=0)
def _inception_score(generated: Features) -> float:
    return metrics.inception_score(generated).value


# The third nearest neighbour decides.
@metric("precision_recall", goal="max", yields=(("precision",) * 2, ("recall",) * 2), least_real=4)
def _precision_recall(generated: Features, real: Features) -> tuple[float, ...]:
    return metrics.precision_recall(generated, real)


# ---- feature extractors

# torch-fidelity's names of Inception's layers, and the names of layers that repa_lab.metrics.extractor adds.
POOLED, LOGITS, SPATIAL = "2048", "logits_unbiased", "spatial"
CLS = "cls"
LITE0_POOLED = "1280"


@dataclass(frozen=True)
class ExtractorFacts:
    """A feature extractor as data."""

    registered: str  # torch-fidelity's name
    layers: Mapping[str, str]  # the layer compared by each metric; a metric that is not defined is missing
    preprocessing: str  # how pixels become the network's input, as part of a metric's protocol
    model: TimmModel | None = None  # computes the features; None for torch-fidelity's Inception
    sha256: str = ""  # digest of the publisher's file of weights; empty if the extractor takes no file


def _on(layer: str) -> dict[str, str]:
    return dict.fromkeys(("frechet", "kid", "precision_recall"), layer)


def _dinov2(size: str, timm_size: str, sha256: str) -> ExtractorFacts:
    """DINOv2 as in dgm-eval, the code of Stein et al. (2306.04675): the CLS token after the final norm at 224 px."""
    model = TimmModel(f"vit_{timm_size}_patch14_dinov2.lvd142m")
    return ExtractorFacts(f"dinov2-{size}-cls-224", _on(CLS), "bicubic-antialias-224-imagenet", model, sha256)


# Digests: pt_inception-2015-12-05 (torch-fidelity v0.2.0 and pytorch-fid publish the same bytes) and Meta's
# dinov2_vit?14_pretrain.pth.
EXTRACTORS: dict[str, ExtractorFacts] = {
    "inception": ExtractorFacts(
        "inception-v3-compat",
        {**_on(POOLED), "sfid": SPATIAL, "inception_score": LOGITS},
        "tf1-bilinear-299",
        sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    ),
    "efficientnet_lite0": ExtractorFacts(
        "efficientnet-lite0-64",
        _on(LITE0_POOLED),
        "bicubic-antialias-64-half",
        TimmModel("tf_efficientnet_lite0", weights="package"),
    ),
    "dinov2_vits14": _dinov2("vits14", "small", "b938bf1bc15cd2ec0feacfe3a1bb553fe8ea9ca46a7e1d8d00217f29aef60cd9"),
    "dinov2_vitb14": _dinov2("vitb14", "base", "0b8b82f85de91b424aded121c7e1dcc2b7bc6d0adeea651bf73a13307fad8c73"),
    "dinov2_vitl14": _dinov2("vitl14", "large", "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428"),
    "dinov2_vitg14": _dinov2("vitg14", "giant", "baf8467e50af277596bbbafa06887c177ee899ab46033649c383577d7e9309d3"),
}
EXTRACTORS |= {
    f"{TINY}{name}": replace(facts, registered=f"{TINY}{facts.registered}", model=tiny(facts.model), sha256="")
    for name, facts in EXTRACTORS.items()
    if name.startswith("dinov2_") and facts.model
}


def layers(name: str, metrics: Iterable[str], compares: Container[str] = get_args(Compared)) -> tuple[str, ...]:
    """Return the layers of an extractor for the metrics with such a ``compares`` that are defined for it, each once."""
    found = (layer_of(name, metric) for metric in metrics if METRICS[metric].compares in compares)
    return tuple(dict.fromkeys(layer for layer in found if layer))


def layer_of(name: str, metric: str) -> str:
    """Return the layer that a metric compares, KID's for a plugin's metric; empty if the metric is not defined."""
    by_metric = EXTRACTORS[name].layers
    return by_metric.get(metric, by_metric["kid"] if METRICS[metric].compares == "features" else "")


# ---- full names


def goal_of_kind(kind: str) -> Goal:
    """Return whether small or large values of a kind of metric, the first part of its full name, are good."""
    goals = (facts.goal for facts in METRICS.values() if any(kind in kinds for kinds in facts.yields))
    return next(goals, "min")


def quality_names(metric: str, extractor: str, samples: int, sampler: str, suffix: str = "") -> tuple[str, ...]:
    """Return the full names of a metric's values, such as ``fid:inception@10k/ode50``.

    Args:
        sampler: the sampler, such as :func:`sampler_name`.
        suffix: what differs from the default of guidance, labels and frames.
    """
    kinds = (inception if extractor == "inception" else other for inception, other in METRICS[metric].yields)
    count = f"{samples // 1000}k" if samples % 1000 == 0 else str(samples)
    return tuple(f"{kind}:{extractor}@{count}/{sampler}{suffix}" for kind in kinds if kind)


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the fields in which two protocols of one name differ, so that their numbers must not be compared.

    Seeds and library versions may differ.
    """
    if first.keys() == second.keys():  # as they are nearly always, and there are thousands of pairs
        differing = [key for key, value in first.items() if value != second[key]]
    else:
        differing = [key for key in {*first, *second} if first.get(key) != second.get(key)]
    return tuple(sorted(key for key in differing if key not in _NOT_COMPARED))


def sampler_name(type: str, solver: str, steps: int) -> str:
    """Return ``ode50`` (Euler), ``heun50`` or ``sde250``."""
    kind = "sde" if type == "sde" else "ode" if solver == "euler" else solver
    return f"{kind}{steps}"


def guidance_name(scale: float, low: float, high: float) -> str:
    """Return ``-cfg1.8[0,0.7]``, or an empty string without guidance."""
    return "" if scale == 1 else f"-cfg{scale:g}[{low:g},{high:g}]"
