"""Measurements as functions on arrays."""

from repa_lab.metrics.alignment import CosineSums, cka, cosine, cosine_gap, svcca
from repa_lab.metrics.frechet import Moments, Statistics, frechet_distance, statistics
from repa_lab.metrics.neighbours import cknna, clip_and_normalise, mutual_knn, nearest_neighbours
from repa_lab.metrics.probe import Probe, linear_probe
from repa_lab.metrics.quality import PrecisionRecall, Score, inception_score, kid, kid_protocol, precision_recall
from repa_lab.metrics.spatial import cds, lds, rmsc, srss

__all__ = [
    "CosineSums",
    "Moments",
    "PrecisionRecall",
    "Probe",
    "Score",
    "Statistics",
    "cds",
    "cka",
    "cknna",
    "clip_and_normalise",
    "cosine",
    "cosine_gap",
    "frechet_distance",
    "inception_score",
    "kid",
    "kid_protocol",
    "lds",
    "linear_probe",
    "mutual_knn",
    "nearest_neighbours",
    "precision_recall",
    "rmsc",
    "srss",
    "statistics",
    "svcca",
]
