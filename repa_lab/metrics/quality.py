"""Metrics of generated samples from features: the Frechet distance, KID, inception score, precision and recall.

The Frechet distance is computed in float64. The others are torch-fidelity's functions, in the precision of the
features, which is float32 from an extractor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

from repa_lab.metrics.alignment import checked_features, float64

SUBSETS, SUBSET_SIZE = 100, 1000
SPLITS = 10
NEIGHBOURS = 3
_SEED = 2020
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Statistics:
    """Mean ``(d,)`` and unbiased covariance ``(d, d)`` of ``count`` feature vectors; count 0 means unknown."""

    mu: Array
    sigma: Array
    count: int


class Moments:
    """Mean and covariance of d features that arrive in batches, in float64 on their device and O(d^2) memory."""

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self._count = 0
        self._mean = float64(torch.zeros(width, device=device))
        self._scatter = self._mean.new_zeros(width, width)

    def add(self, features: ArrayLike | torch.Tensor) -> None:
        """Add features ``(n, d)``, n >= 0.

        Raises:
            ValueError: the width is another one, or values are not finite.
        """
        batch = float64(torch.as_tensor(features)).to(self._mean.device)
        if batch.ndim != 2 or batch.shape[1] != len(self._mean):
            raise ValueError(f"need features (n, {len(self._mean)}), got shape {tuple(batch.shape)}")
        if not batch.isfinite().all():
            raise ValueError("features are not finite; check that the images are")
        if not len(batch):
            return
        # The update of Chan, Golub and LeVeque (1983), which avoids the cancellation of a sum of squares.
        total, mean = self._count + len(batch), batch.mean(dim=0)
        shift, residual = mean - self._mean, batch - mean
        self._scatter += residual.T @ residual + torch.outer(shift, shift) * (self._count * len(batch) / total)
        self._mean += shift * (len(batch) / total)
        self._count = total

    def merge(self, total: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Add the moments of all other processes, all of which call this; ``total`` sums a tensor over processes."""
        counts = total(self._mean.new_tensor([self._count]))
        mean = total(self._mean * self._count) / counts.clamp_min(1)
        shift = self._mean - mean
        self._scatter = total(self._scatter + self._count * torch.outer(shift, shift))
        self._mean, self._count = mean, int(counts)

    @property
    def statistics(self) -> Statistics:
        """The statistics of all features added so far.

        Raises:
            ValueError: there are fewer than two vectors.
        """
        if self._count < 2:
            raise ValueError(f"a covariance needs at least two feature vectors (n, d), got {self._count}")
        return Statistics(self._mean.cpu().numpy(), self._scatter.cpu().numpy() / (self._count - 1), self._count)


def statistics(features: ArrayLike | torch.Tensor) -> Statistics:
    """Return the mean and covariance of features ``(n, d)``.

    Raises:
        ValueError: there are fewer than two vectors, or values are not finite.
    """
    values = checked_features(torch.as_tensor(features), "features", least=2)
    moments = Moments(values.shape[1], values.device)
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


class Score(NamedTuple):
    """The mean of a metric over subsets of the samples, and the standard deviation between subsets."""

    value: float
    std: float


class PrecisionRecall(NamedTuple):
    """Shares in [0, 1]: of generated samples that look real, and of real images that could have been generated."""

    precision: float
    recall: float


def kid_protocol(generated: int, real: int) -> str:
    """Return the KID protocol as ``SUBSETSxSIZE``, such as ``100x1000``; SIZE is capped by the number of samples."""
    return f"{SUBSETS}x{min(SUBSET_SIZE, generated, real)}"


def kid(generated: ArrayLike, real: ArrayLike) -> Score:
    """Return the kernel Inception distance (1801.01401): unbiased squared MMD of the kernel ``(x . y / d + 1)^3``.

    The mean over 100 random subsets of 1000 samples, or of all samples of the smaller side (:func:`kid_protocol`). It
    can be below 0; its expectation does not depend on the number of samples.

    Raises:
        ValueError: not features ``(n, d)`` and ``(m, d)`` with n, m >= 2, or values are not finite.
    """
    x, y = _two_sides(generated, real, least=2)
    size = min(SUBSET_SIZE, len(x), len(y))
    scores = kid_features_to_metric(x, y, kid_subsets=SUBSETS, kid_subset_size=size, rng_seed=_SEED, verbose=False)
    return Score(scores[KEY_METRIC_KID_MEAN], scores[KEY_METRIC_KID_STD])


def inception_score(logits: ArrayLike) -> Score:
    """Return the inception score (1606.03498): ``exp E_x KL(p(y|x) || p(y))``, the mean over 10 splits after a shuffle.

    Raises:
        ValueError: not logits ``(n >= 10, classes)``, which are Inception's without bias, or values are not finite.
    """
    features = checked_features(torch.as_tensor(logits), "logits", SPLITS)
    scores = isc_features_to_metric(features, splits=SPLITS, shuffle=True, rng_seed=_SEED)
    return Score(scores[KEY_METRIC_ISC_MEAN], scores[KEY_METRIC_ISC_STD])


def precision_recall(generated: ArrayLike, real: ArrayLike) -> PrecisionRecall:
    """Return the improved precision and recall (1904.06991) with k = 3.

    A sample counts if its distance to some vector of the other side is at most that vector's distance to its third
    nearest neighbour on its own side. Both numbers depend on n and m, which must be alike where numbers are compared.

    Raises:
        ValueError: not features ``(n, d)`` and ``(m, d)`` with n, m >= 4, or values are not finite.
    """
    x, y = _two_sides(generated, real, least=NEIGHBOURS + 1)
    # Distances in blocks: all at once, 50k against 50k would take 30 GB.
    shares = prc_features_to_metric(x, y, prc_neighborhood=NEIGHBOURS, save_cpu_ram=True, verbose=False)
    return PrecisionRecall(shares[KEY_METRIC_PRECISION], shares[KEY_METRIC_RECALL])


def _two_sides(generated: ArrayLike, real: ArrayLike, least: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = checked_features(torch.as_tensor(generated), "generated", least)
    y = checked_features(torch.as_tensor(real), "real", least)
    if x.shape[1] != y.shape[1]:
        widths = f"{x.shape[1]} and {y.shape[1]}"
        raise ValueError(f"generated and real samples have {widths} features: use one extractor for both")
    return x, y
