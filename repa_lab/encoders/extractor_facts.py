"""Feature extractors by name, as data: what a measurement needs of each, without torch.

A metric is of :data:`repa_lab.metrics.protocol.METRICS`; a layer is what torch-fidelity calls it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from repa_lab.encoders.registry import TINY
from repa_lab.metrics.protocol import METRICS

POOLED, LOGITS, SPATIAL = "2048", "logits_unbiased", "spatial"
CLS = "cls"


@dataclass(frozen=True)
class ExtractorFacts:
    """What is known of an extractor by its name.

    Attributes:
        registered: torch-fidelity's name of it.
        layers: the layer that each metric compares; a metric that has no meaning there is left out.
        preprocessing: how pixels become the network's input; a number is of one preprocessing.
        encoder: the frozen encoder whose network it is (`registry.ENCODERS`), or None.
        sha256: of the publisher's file of weights; empty where no file is taken.
    """

    registered: str
    layers: Mapping[str, str]
    preprocessing: str
    encoder: str | None = None
    sha256: str = ""


def _all_on(layer: str) -> dict[str, str]:
    return dict.fromkeys(("frechet", "kid", "precision_recall"), layer)


def _dinov2(size: str, sha256: str) -> ExtractorFacts:
    """Stein et al. (2306.04675), as their code dgm-eval computes it: the CLS token after the final norm at 224 px."""
    name = f"dinov2_{size}"
    return ExtractorFacts(f"dinov2-{size}-cls-224", _all_on(CLS), "bicubic-antialias-224-imagenet", name, sha256)


# Digests are of pt_inception-2015-12-05 (torch-fidelity v0.2.0 and pytorch-fid publish the same bytes) and of Meta's
# dinov2_vit?14_pretrain.pth.
EXTRACTORS: dict[str, ExtractorFacts] = {
    "inception": ExtractorFacts(
        "inception-v3-compat",
        {**_all_on(POOLED), "sfid": SPATIAL, "inception_score": LOGITS},
        "tf1-bilinear-299",
        sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    ),
    "efficientnet_lite0": ExtractorFacts(
        "efficientnet-lite0-64", _all_on("1280"), "bicubic-antialias-64-half", "efficientnet_lite0"
    ),
    "dinov2_vits14": _dinov2("vits14", "b938bf1bc15cd2ec0feacfe3a1bb553fe8ea9ca46a7e1d8d00217f29aef60cd9"),
    "dinov2_vitb14": _dinov2("vitb14", "0b8b82f85de91b424aded121c7e1dcc2b7bc6d0adeea651bf73a13307fad8c73"),
    "dinov2_vitl14": _dinov2("vitl14", "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428"),
    "dinov2_vitg14": _dinov2("vitg14", "baf8467e50af277596bbbafa06887c177ee899ab46033649c383577d7e9309d3"),
}


def _tiny(facts: ExtractorFacts) -> ExtractorFacts:
    return replace(facts, registered=f"{TINY}{facts.registered}", encoder=f"{TINY}{facts.encoder}", sha256="")


# Two narrow blocks of random weights, for rehearsals, as with encoders.
EXTRACTORS |= {f"{TINY}{name}": _tiny(facts) for name, facts in EXTRACTORS.items() if name.startswith("dinov2_")}


def layers(name: str, metrics: Iterable[str]) -> tuple[str, ...]:
    """The layers that metrics need of an extractor, each once; a metric without meaning there needs none."""
    return tuple(dict.fromkeys(layer for metric in metrics if (layer := layer_of(name, metric))))


def layer_of(name: str, metric: str) -> str:
    """Return the layer whose features a metric compares, empty if it has no meaning there; a plugin's compares KID's."""
    known = EXTRACTORS[name].layers
    return known.get(metric, known["kid"] if METRICS[metric].compute else "")
