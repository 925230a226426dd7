"""KID, inception score, precision and recall of generated samples, by torch-fidelity's functions of features.

Features are computed in their own precision, float32 from an extractor, as torch-fidelity does.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from numpy.typing import ArrayLike
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

from repa_lab.metrics.alignment import require_finite

SUBSETS, SUBSET_SIZE = 100, 1000
SPLITS = 10
NEIGHBOURS = 3
_SEED = 2020


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

    Args:
        generated: features ``(n, d)``, n >= 2.
        real: features ``(m, d)``, m >= 2.

    Raises:
        ValueError: widths differ, there are too few vectors, or values are not finite.
    """
    x, y = _two_sides(generated, real, least=2)
    size = min(SUBSET_SIZE, len(x), len(y))
    scores = kid_features_to_metric(x, y, kid_subsets=SUBSETS, kid_subset_size=size, rng_seed=_SEED, verbose=False)
    return Score(scores[KEY_METRIC_KID_MEAN], scores[KEY_METRIC_KID_STD])


def inception_score(logits: ArrayLike) -> Score:
    """Return the inception score (1606.03498): ``exp E_x KL(p(y|x) || p(y))``, the mean over 10 splits after a shuffle.

    Args:
        logits: logits of generated samples ``(n, classes)``, n >= 10; Inception's without bias, as in its first code.

    Raises:
        ValueError: there are fewer samples than splits, or values are not finite.
    """
    scores = isc_features_to_metric(_features(logits, "logits", SPLITS), splits=SPLITS, shuffle=True, rng_seed=_SEED)
    return Score(scores[KEY_METRIC_ISC_MEAN], scores[KEY_METRIC_ISC_STD])


def precision_recall(generated: ArrayLike, real: ArrayLike) -> PrecisionRecall:
    """Return the improved precision and recall (1904.06991) with k = 3.

    A sample counts if its distance to some vector of the other side is at most that vector's distance to its third
    nearest neighbour on its own side. Both numbers depend on n and m, which must be alike where numbers are compared.

    Args:
        generated: features ``(n, d)``, n >= 4.
        real: features ``(m, d)``, m >= 4.

    Raises:
        ValueError: widths differ, there are too few vectors, or values are not finite.
    """
    x, y = _two_sides(generated, real, least=NEIGHBOURS + 1)
    # Distances in blocks: all at once, 50k against 50k would take 30 GB.
    shares = prc_features_to_metric(x, y, prc_neighborhood=NEIGHBOURS, save_cpu_ram=True, verbose=False)
    return PrecisionRecall(shares[KEY_METRIC_PRECISION], shares[KEY_METRIC_RECALL])


def _two_sides(generated: ArrayLike, real: ArrayLike, least: int) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = _features(generated, "generated", least), _features(real, "real", least)
    if x.shape[1] != y.shape[1]:
        widths = f"{x.shape[1]} and {y.shape[1]}"
        raise ValueError(f"generated and real samples have {widths} features: use one extractor for both")
    return x, y


def _features(values: ArrayLike, name: str, least: int) -> torch.Tensor:
    features = torch.as_tensor(values)
    if features.ndim != 2 or len(features) < least:
        raise ValueError(f"{name}: need features of at least {least} samples (n, d), got shape {tuple(features.shape)}")
    require_finite(features, name)
    return features
