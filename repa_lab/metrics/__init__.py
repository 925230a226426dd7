"""Measurements as functions on arrays."""

from repa_lab.metrics.alignment import cka, cosine, cosine_gap
from repa_lab.metrics.frechet import Statistics, frechet_distance, statistics

__all__ = ["Statistics", "cka", "cosine", "cosine_gap", "frechet_distance", "statistics"]
