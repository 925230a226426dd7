"""FID and its relatives, and measures of representation alignment; names of metrics (`protocol`) cost no torch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from repa_lab.metrics.alignment import (
        CosineSums,
        cka,
        cknna,
        clip_and_normalise,
        cosine_gap,
        mutual_knn,
        nearest_neighbours,
    )
    from repa_lab.metrics.frechet import Moments, Statistics, frechet_distance, statistics
    from repa_lab.metrics.quality import PrecisionRecall, Score, inception_score, kid, kid_protocol, precision_recall
    from repa_lab.metrics.spatial import cds, lds, rmsc

_HOMES = {
    "alignment": (
        "CosineSums",
        "cka",
        "cknna",
        "clip_and_normalise",
        "cosine_gap",
        "mutual_knn",
        "nearest_neighbours",
    ),
    "frechet": ("Moments", "Statistics", "frechet_distance", "statistics"),
    "quality": ("PrecisionRecall", "Score", "inception_score", "kid", "kid_protocol", "precision_recall"),
    "spatial": ("cds", "lds", "rmsc"),
}

__all__ = [
    "CosineSums",
    "Moments",
    "PrecisionRecall",
    "Score",
    "Statistics",
    "cds",
    "cka",
    "cknna",
    "clip_and_normalise",
    "cosine_gap",
    "frechet_distance",
    "inception_score",
    "kid",
    "kid_protocol",
    "lds",
    "mutual_knn",
    "nearest_neighbours",
    "precision_recall",
    "rmsc",
    "statistics",
]


def __getattr__(name: str) -> Any:
    """Import public names on first use."""
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"repa_lab.metrics.{home}"), name)
    raise AttributeError(f"module 'repa_lab.metrics' has no attribute {name!r}")
