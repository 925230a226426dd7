"""FID and its relatives, and measures of representation alignment; names of metrics (`protocol`) cost no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from repa_lab.lazy import on_first_use

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
    from repa_lab.metrics.quality import (
        Moments,
        PrecisionRecall,
        Score,
        Statistics,
        frechet_distance,
        inception_score,
        kid,
        kid_protocol,
        precision_recall,
        statistics,
    )
    from repa_lab.metrics.spatial import cds, lds, rmsc

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

__getattr__ = on_first_use(
    __name__,
    {
        "metrics.alignment": (
            "CosineSums",
            "cka",
            "cknna",
            "clip_and_normalise",
            "cosine_gap",
            "mutual_knn",
            "nearest_neighbours",
        ),
        "metrics.quality": (
            "Moments",
            "PrecisionRecall",
            "Score",
            "Statistics",
            "frechet_distance",
            "inception_score",
            "kid",
            "kid_protocol",
            "precision_recall",
            "statistics",
        ),
        "metrics.spatial": ("cds", "lds", "rmsc"),
    },
)
