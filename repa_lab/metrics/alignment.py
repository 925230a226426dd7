"""How much two sets of features agree."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from repa_lab.metrics.arrays import Array, as_array, centred, paired_features, unit


def cosine(student: ArrayLike, teacher: ArrayLike) -> float:
    """Mean cosine of the tokens ``(B, N, D)`` of two sides, image by image and place by place.

    Raises:
        ValueError: shapes differ.
    """
    s, t = unit(as_array(student)), unit(as_array(teacher))
    if s.shape != t.shape or s.ndim != 3:
        raise ValueError(f"need two equal (B, N, D) arrays, got {s.shape} and {t.shape}")
    return float((s * t).sum(axis=-1).mean())


def cosine_gap(student: ArrayLike, teacher: ArrayLike) -> tuple[float, float]:
    """Mean token cosine, and how far it lies above that of mismatched images.

    A projector can raise the cosine by learning what stands at each place of an average image; tokens of another image at
    the same place share that, so the gap is the part that is about this image.

    Args:
        student: projected tokens ``(B, N, D)`` of B >= 2 images.
        teacher: encoder tokens ``(B, N, D)`` of the same images.

    Returns:
        The cosine of matched images, and that cosine minus the mean over all pairs of different images.

    Raises:
        ValueError: shapes differ or there are fewer than two images.
    """
    s, t = unit(as_array(student)), unit(as_array(teacher))
    if s.shape != t.shape or s.ndim != 3 or len(s) < 2:
        raise ValueError(f"need two equal (B >= 2, N, D) arrays, got {s.shape} and {t.shape}")
    count, places = s.shape[:2]
    matched = float((s * t).sum(axis=-1).mean())
    # Sum over all pairs (b, c) and places n of cos(s_bn, t_cn), by summing over images first.
    everything = float((s.sum(axis=0) * t.sum(axis=0)).sum())
    mismatched = (everything - matched * count * places) / (count * (count - 1) * places)
    return matched, matched - mismatched


def cka(x: ArrayLike, y: ArrayLike, unbiased: bool = True) -> float:
    """Linear CKA (1905.00414) of features ``x`` ``(n, d1)`` and ``y`` ``(n, d2)`` of the same n items.

    ``unbiased`` uses the unbiased HSIC estimator (2010.15327, Eq. 3), whose expectation is 0 for independent features
    whatever their widths; the plain form grows with d / n. Invariant to rotation and isotropic scaling. O(n d1 d2) time and
    no n x n matrix.

    Raises:
        ValueError: item counts differ, there are fewer than 4, or values are not finite.
    """
    a, b = (centred(side) for side in paired_features(x, y, least=4))
    hsic = _unbiased_hsic if unbiased else _biased_hsic
    norm = hsic(a, a) * hsic(b, b)
    return float(hsic(a, b) / np.sqrt(norm)) if norm > 0 else 0.0


def svcca(x: ArrayLike, y: ArrayLike, dims: int = 10) -> float:
    """Mean canonical correlation of the ``dims`` leading directions of ``x`` ``(n, d1)`` and of ``y`` ``(n, d2)``.

    SVCCA (1706.05806) with platonic-rep's choices: columns standardised, then the 10 leading singular directions of each side
    rather than those of 99 % of the variance. In closed form: the correlations are the singular values of ``U^T V`` for the
    left singular vectors U and V. Invariant to shifting and scaling every column.

    Raises:
        ValueError: item counts differ, values are not finite, there are not more than ``2 dims`` items, whose directions
            would have to meet, or a side varies in fewer than ``dims`` directions.
    """
    a, b = paired_features(x, y, least=4)
    if not 1 <= dims < len(a) / 2:
        raise ValueError(f"dims = {dims} directions of {len(a)} items: give 1 <= dims <= {(len(a) - 1) // 2}, or more items")
    correlations = np.linalg.svd(_leading(a, dims, "x").T @ _leading(b, dims, "y"), compute_uv=False)
    return float(correlations.clip(max=1).mean())


def _leading(a: Array, dims: int, name: str) -> Array:
    """The ``dims`` leading left singular vectors ``(n, dims)`` of standardised features."""
    from sklearn.preprocessing import StandardScaler  # knows a constant column when it sees one

    directions, lengths, _ = np.linalg.svd(StandardScaler().fit_transform(a), full_matrices=False)
    rank = int((lengths > lengths[0] * max(a.shape) * np.finfo(a.dtype).eps).sum())
    if rank < dims:
        raise ValueError(f"{name} varies in {rank} directions only: give dims <= {rank}")
    return np.asarray(directions[:, :dims])


def _biased_hsic(a: Array, b: Array) -> float:
    return float(np.square(a.T @ b).sum())


def _unbiased_hsic(a: Array, b: Array) -> float:
    """HSIC_1 of the linear kernels K = a a^T and L = b b^T with their diagonals set to 0, up to a constant factor."""
    n = len(a)
    diagonal_k, diagonal_l = np.square(a).sum(axis=1), np.square(b).sum(axis=1)
    trace = np.square(a.T @ b).sum() - diagonal_k @ diagonal_l
    rows_k, rows_l = a @ a.sum(axis=0) - diagonal_k, b @ b.sum(axis=0) - diagonal_l
    total = rows_k.sum() * rows_l.sum() / ((n - 1) * (n - 2))
    return float(trace + total - 2 * (rows_k @ rows_l) / (n - 2))
