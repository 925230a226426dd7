"""The Frechet distance between two Gaussians fitted to features, by torch-fidelity's own functions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Statistics:
    """Mean ``(d,)`` and unbiased covariance ``(d, d)`` of ``count`` feature vectors."""

    mu: Array
    sigma: Array
    count: int


def statistics(features: Array) -> Statistics:
    """Mean and covariance of features ``(n, d)``.

    Raises:
        ValueError: fewer than two vectors, or values that are not finite.
    """
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"a covariance needs at least two feature vectors (n, d), got shape {features.shape}")
    if not np.isfinite(features).all():
        raise ValueError("features are not finite: were the images?")
    return Statistics(features.mean(axis=0), np.cov(features, rowvar=False).reshape(2 * features.shape[1:]), len(features))


def frechet_distance(mu1: Array, sigma1: Array, mu2: Array, sigma2: Array) -> float:
    """``|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2))``: FID (1706.08500) Eq. 6 when fed Inception features."""
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric  # brings torch along

    first = {"mu": np.asarray(mu1, dtype=np.float64), "sigma": np.asarray(sigma1, dtype=np.float64)}
    second = {"mu": np.asarray(mu2, dtype=np.float64), "sigma": np.asarray(sigma2, dtype=np.float64)}
    return float(fid_statistics_to_metric(first, second, verbose=False)[KEY_METRIC_FID])
