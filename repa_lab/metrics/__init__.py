"""FID and its relatives, and measures of representation alignment; names of metrics (`protocol`) cost no torch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from repa_lab.metrics.alignment import (
        CosineSums,
        cds,
        cka,
        cknna,
        clip_and_normalise,
        lds,
        mutual_knn,
        nearest_neighbours,
        rmsc,
    )
    from repa_lab.metrics.quality import (
        Statistics,
        frechet_distance,
        inception_score,
        kid,
        precision_recall,
        statistics,
    )

__all__ = [
    "CosineSums",
    "Statistics",
    "cds",
    "cka",
    "cknna",
    "clip_and_normalise",
    "frechet_distance",
    "inception_score",
    "kid",
    "lds",
    "mutual_knn",
    "nearest_neighbours",
    "precision_recall",
    "rmsc",
    "statistics",
]


def __getattr__(name: str) -> object:
    """Import a metric on first use, and torch with it."""
    for module in ("alignment", "quality") if name in __all__ else ():
        if hasattr(home := import_module(f"{__name__}.{module}"), name):
            return getattr(home, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
