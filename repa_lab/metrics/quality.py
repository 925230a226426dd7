"""KID, inception score, precision and recall of generated samples, by torch-fidelity's own functions on features.

Features are computed in the precision they come in, float32 from an extractor, as torch-fidelity does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from repa_lab.metrics.arrays import on_host, require_finite

if TYPE_CHECKING:
    import torch

SUBSETS, SUBSET_SIZE = 100, 1000
SPLITS = 10
NEIGHBOURS = 3
_SEED = 2020


@dataclass(frozen=True)
class Score:
    """A value over several parts of the samples: its mean, the standard deviation between parts, and what the parts were."""

    value: float
    std: float
    protocol: str


@dataclass(frozen=True)
class PrecisionRecall:
    """Shares in [0, 1]: of generated samples that look real, and of real ones that could have been generated."""

    precision: float
    recall: float


def kid_protocol(generated: int, real: int) -> str:
    """How many subsets of which size the KID of so many samples is taken over: ``100x1000``, less of fewer samples."""
    return f"{SUBSETS}x{min(SUBSET_SIZE, generated, real)}"


def kid(generated: ArrayLike, real: ArrayLike) -> Score:
    """Kernel Inception distance (1801.01401): squared MMD, unbiased, of the kernel ``(x . y / d + 1)^3``.

    Mean over 100 random subsets of 1000, or of as many as there are on the smaller side: :attr:`Score.protocol` says
    which. It may be below 0, and does not depend on the number of samples but for its spread.

    Args:
        generated: features ``(n, d)``, n >= 2.
        real: features ``(m, d)``, m >= 2.

    Raises:
        ValueError: widths differ, too few vectors, or values that are not finite.
    """
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    x, y = _two_sides(generated, real, least=2)
    size = min(SUBSET_SIZE, len(x), len(y))
    found = kid_features_to_metric(x, y, kid_subsets=SUBSETS, kid_subset_size=size, rng_seed=_SEED, verbose=False)
    return Score(found[KEY_METRIC_KID_MEAN], found[KEY_METRIC_KID_STD], kid_protocol(len(x), len(y)))


def inception_score(logits: ArrayLike) -> Score:
    """Inception score (1606.03498): ``exp E_x KL(p(y|x) || p(y))``, mean over 10 parts of the shuffled samples.

    Args:
        logits: of generated samples ``(n, classes)``, n >= 10; of Inception those without bias, as in the original's
            graph.

    Raises:
        ValueError: fewer samples than parts, or values that are not finite.
    """
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric

    found = isc_features_to_metric(_features(logits, "logits", SPLITS), splits=SPLITS, shuffle=True, rng_seed=_SEED)
    return Score(found[KEY_METRIC_ISC_MEAN], found[KEY_METRIC_ISC_STD], f"{SPLITS} splits")


def precision_recall(generated: ArrayLike, real: ArrayLike) -> PrecisionRecall:
    """Improved precision and recall (1904.06991), k = 3: a sample counts if it lies within the distance of some vector
    of the other side to that one's third nearest neighbour on its own side.

    Args:
        generated: features ``(n, d)``, n >= 4.
        real: features ``(m, d)``, m >= 4; both numbers depend on m and n, which are to be alike where numbers are
            compared.

    Raises:
        ValueError: widths differ, too few vectors, or values that are not finite.
    """
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    x, y = _two_sides(generated, real, least=NEIGHBOURS + 1)
    # Distances in blocks: all at once, 50k against 50k would take 30 GB.
    found = prc_features_to_metric(x, y, prc_neighborhood=NEIGHBOURS, save_cpu_ram=True, verbose=False)
    return PrecisionRecall(found[KEY_METRIC_PRECISION], found[KEY_METRIC_RECALL])


def _two_sides(generated: ArrayLike, real: ArrayLike, least: int) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    x, y = _features(generated, "generated", least), _features(real, "real", least)
    if x.shape[1] != y.shape[1]:
        raise ValueError(
            f"generated and real samples have {x.shape[1]} and {y.shape[1]} features: use one extractor for both"
        )
    both = torch.promote_types(x.dtype, y.dtype)
    return x.to(both), y.to(both)


def _features(values: ArrayLike, name: str, least: int) -> torch.Tensor:
    import torch

    array = np.asarray(on_host(values, "float" if _is_half(values) else "clone"))
    if array.ndim != 2 or len(array) < least:
        raise ValueError(f"{name}: need features of at least {least} samples (n, d), got shape {array.shape}")
    require_finite(array, name)
    return torch.from_numpy(array)


def _is_half(values: ArrayLike) -> bool:
    return getattr(getattr(values, "dtype", None), "itemsize", 4) < 4
