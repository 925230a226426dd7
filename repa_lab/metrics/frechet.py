"""The Frechet distance between two Gaussians fitted to features, in float64 on the host."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Statistics:
    """Mean ``(d,)`` and unbiased covariance ``(d, d)`` of ``count`` feature vectors; count 0 means unknown."""

    mu: Array
    sigma: Array
    count: int


class Moments:
    """Mean and covariance of features that arrive in batches, in float64 and O(d^2) memory."""

    def __init__(self) -> None:
        self._count = 0
        self._mean: Array = np.zeros(0)
        self._scatter: Array = np.zeros((0, 0))

    def add(self, features: ArrayLike) -> None:
        """Add features ``(n, d)``, n >= 0.

        Raises:
            ValueError: the width differs from that of earlier batches, or values are not finite.
        """
        batch = np.asarray(features, dtype=np.float64)
        if batch.ndim != 2 or (self._count and batch.shape[1] != len(self._mean)):
            raise ValueError(f"need features (n, d), d as before ({len(self._mean)}), got shape {batch.shape}")
        if not np.isfinite(batch).all():
            raise ValueError("features are not finite; check that the images are")
        if not len(batch):
            return
        # The update of Chan, Golub and LeVeque (1983), which avoids the cancellation of a sum of squares.
        mean = batch.mean(axis=0)
        if not self._count:
            self._mean, self._scatter = np.zeros_like(mean), np.zeros((len(mean), len(mean)))
        total, shift, residual = self._count + len(batch), mean - self._mean, batch - mean
        self._scatter += residual.T @ residual + np.outer(shift, shift) * (self._count * len(batch) / total)
        self._mean += shift * (len(batch) / total)
        self._count = total

    @property
    def statistics(self) -> Statistics:
        """The statistics of all features added so far.

        Raises:
            ValueError: there are fewer than two vectors.
        """
        if self._count < 2:
            raise ValueError(f"a covariance needs at least two feature vectors (n, d), got {self._count}")
        return Statistics(self._mean.copy(), self._scatter / (self._count - 1), self._count)


def statistics(features: ArrayLike) -> Statistics:
    """Return the mean and covariance of features ``(n, d)``.

    Raises:
        ValueError: there are fewer than two vectors, or values are not finite.
    """
    values = np.asarray(features, dtype=np.float64)
    if values.ndim != 2 or len(values) < 2:
        raise ValueError(f"a covariance needs at least two feature vectors (n, d), got shape {values.shape}")
    moments = Moments()
    moments.add(values)
    return moments.statistics


def frechet_distance(mu1: ArrayLike, sigma1: ArrayLike, mu2: ArrayLike, sigma2: ArrayLike) -> float:
    """Return the squared Frechet distance of two Gaussians; FID (1706.08500, Eq. 6) for Inception features.

    ``|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2))``. With ``sigma = L L^T`` from a pivoted Cholesky
    decomposition, the trace of the root is the sum of the roots of the eigenvalues of ``L1^T sigma2 L1``. This is
    symmetric, and of full rank if the side of lower rank is decomposed, so no root is taken of rounding errors around
    0: torch-fidelity's eigenvalues of ``sigma1 sigma2`` lose half their digits there (up to 2e-7 of the trace, where
    there are fewer samples than features).

    Raises:
        ValueError: shapes do not fit, or values are not finite.
    """
    from scipy.linalg.lapack import dpstrf

    m1, s1, m2, s2 = (np.asarray(value, dtype=np.float64) for value in (mu1, sigma1, mu2, sigma2))
    width = m1.shape[0] if m1.ndim == 1 else 0
    if not width or m2.shape != m1.shape or not s1.shape == s2.shape == (width, width):
        raise ValueError(f"need (d,), (d, d), (d,), (d, d), got {m1.shape}, {s1.shape}, {m2.shape}, {s2.shape}")
    if not all(np.isfinite(value).all() for value in (m1, s1, m2, s2)):
        raise ValueError("statistics are not finite")
    first, second = dpstrf(s1, lower=1), dpstrf(s2, lower=1)
    (lower, pivots, rank, _), other = (first, s2) if first[2] <= second[2] else (second, s1)
    factor = np.zeros((width, rank))  # L (d, r)
    factor[pivots - 1] = np.tril(lower[:, :rank])
    trace_of_root = np.sqrt(np.linalg.eigvalsh(factor.T @ other @ factor).clip(min=0)).sum()
    shift = m1 - m2
    return float(shift @ shift + np.trace(s1) + np.trace(s2) - 2 * trace_of_root)
