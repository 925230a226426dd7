"""How much two sets of features agree."""

from __future__ import annotations

import math

from array_api_compat import array_namespace
from numpy.typing import ArrayLike

from repa_lab.metrics.arrays import AnyArray, both, centred, paired_features, shape, spread, unit


class CosineSums:
    """Token cosines of images that come batch by batch, as many places each, in O(N D) memory."""

    def __init__(self) -> None:
        self._images = 0
        self._matched: AnyArray = 0.0
        self._sides: tuple[AnyArray, AnyArray] = (0.0, 0.0)  # sums of unit tokens over images, (N, D)

    def add(self, student: ArrayLike, teacher: ArrayLike) -> None:
        """Take in tokens ``(B, N, D)`` of two sides, image by image and place by place.

        Raises:
            ValueError: shapes differ, or are not as before.
        """
        s, t = (unit(side) for side in both(student, teacher))
        if s.shape != t.shape or s.ndim != 3:
            raise ValueError(f"need two equal (B, N, D) arrays, got {shape(s)} and {shape(t)}")
        if self._images and s.shape[1:] != self._sides[0].shape:
            raise ValueError(f"need tokens (B, N, D) with (N, D) = {shape(self._sides[0])} as before, got {shape(s)}")
        xp = array_namespace(s)
        self._images += len(s)
        self._matched = self._matched + xp.sum(s * t)
        self._sides = (self._sides[0] + xp.sum(s, axis=0), self._sides[1] + xp.sum(t, axis=0))

    @property
    def images(self) -> int:
        """How many have been taken in."""
        return self._images

    @property
    def cosine(self) -> float:
        """Mean over images and places; NaN before there is one."""
        return float(self._matched) / (self._images * len(self._sides[0])) if self._images else math.nan

    @property
    def gap(self) -> float:
        """:attr:`cosine` less the mean over all pairs of different images at the same place; NaN for fewer than two images."""
        if self._images < 2:
            return math.nan
        places = len(self._sides[0])
        # Sum over all pairs (b, c) and places n of cos(s_bn, t_cn), by summing over images first.
        everything = float((self._sides[0] * self._sides[1]).sum())
        mismatched = (everything - float(self._matched)) / (self._images * (self._images - 1) * places)
        return self.cosine - mismatched


def cosine(student: ArrayLike, teacher: ArrayLike) -> float:
    """Mean cosine of the tokens ``(B, N, D)`` of two sides, image by image and place by place.

    Raises:
        ValueError: shapes differ.
    """
    sums = CosineSums()
    sums.add(student, teacher)
    return sums.cosine


def cosine_gap(student: ArrayLike, teacher: ArrayLike) -> tuple[float, float]:
    """Mean token cosine, and how far it lies above that of mismatched images.

    A projector can raise the cosine by learning what stands at each place of an average image; tokens of another image
    at the same place share that, so the gap is the part that is about this image.

    Args:
        student: projected tokens ``(B, N, D)`` of B >= 2 images; :class:`CosineSums` takes them batch by batch.
        teacher: encoder tokens ``(B, N, D)`` of the same images.

    Returns:
        The cosine of matched images, and that cosine minus the mean over all pairs of different images.

    Raises:
        ValueError: shapes differ or there are fewer than two images.
    """
    sums = CosineSums()
    sums.add(student, teacher)
    if sums.images < 2:
        raise ValueError(f"need two equal (B >= 2, N, D) arrays, got {sums.images} image")
    return sums.cosine, sums.gap


def cka(x: ArrayLike, y: ArrayLike, unbiased: bool = True) -> float:
    """Linear CKA (1905.00414) of features ``x`` ``(n, d1)`` and ``y`` ``(n, d2)`` of the same n items.

    ``unbiased`` uses the unbiased HSIC estimator (2010.15327, Eq. 3), whose expectation is 0 for independent features
    whatever their widths; the plain form grows with d / n. Invariant to rotation and isotropic scaling. O(n d1 d2) time
    and no n x n matrix.

    Raises:
        ValueError: item counts differ, there are fewer than 4, or values are not finite.
    """
    a, b = (centred(side) for side in paired_features(x, y, least=4))
    hsic = _unbiased_hsic if unbiased else _biased_hsic
    norm = hsic(a, a) * hsic(b, b)
    return hsic(a, b) / math.sqrt(norm) if norm > 0 else 0.0


def svcca(x: ArrayLike, y: ArrayLike, dims: int = 10) -> float:
    """Mean canonical correlation of the ``dims`` leading directions of ``x`` ``(n, d1)`` and of ``y`` ``(n, d2)``.

    SVCCA (1706.05806) of standardised columns and, as in platonic-rep, of the 10 leading singular directions of each
    side rather than those of 99 % of the variance. Exact and deterministic: the correlations are the singular values of
    ``U^T V`` for the left singular vectors U and V of full decompositions. platonic-rep's code approximates both steps:
    its directions come from a randomised decomposition (`torch.svd_lowrank` without oversampling) and its correlations
    from an iterative CCA, so its value changes from call to call. Invariant to shifting and scaling every column.

    Raises:
        ValueError: item counts differ, values are not finite, there are not more than ``2 dims`` items, whose
            directions would have to meet, or a side varies in fewer than ``dims`` directions.
    """
    a, b = paired_features(x, y, least=4)
    if not 1 <= dims < len(a) / 2:
        raise ValueError(
            f"dims = {dims} directions of {len(a)} items: give 1 <= dims <= {(len(a) - 1) // 2}, or more items"
        )
    across = _leading(a, dims, "x").T @ _leading(b, dims, "y")
    xp = array_namespace(across)
    return float(xp.mean(xp.clip(xp.linalg.svdvals(across), max=1.0)))


def _leading(a: AnyArray, dims: int, name: str) -> AnyArray:
    """The ``dims`` leading left singular vectors ``(n, dims)`` of standardised features."""
    xp, (mean, deviation) = array_namespace(a), spread(a)
    directions, lengths, _ = xp.linalg.svd((a - mean) / deviation, full_matrices=False)
    rank = int(xp.sum(lengths > lengths[0] * max(a.shape) * xp.finfo(a.dtype).eps))
    if rank < dims:
        raise ValueError(f"{name} varies in {rank} directions only: give dims <= {rank}")
    return directions[:, :dims]


def _biased_hsic(a: AnyArray, b: AnyArray) -> float:
    return float(((a.T @ b) ** 2).sum())


def _unbiased_hsic(a: AnyArray, b: AnyArray) -> float:
    """HSIC_1 of the linear kernels K = a a^T and L = b b^T with their diagonals set to 0, up to a constant factor."""
    n, xp = len(a), array_namespace(a)
    diagonal_k, diagonal_l = xp.sum(a**2, axis=1), xp.sum(b**2, axis=1)
    trace = xp.sum((a.T @ b) ** 2) - diagonal_k @ diagonal_l
    rows_k, rows_l = a @ xp.sum(a, axis=0) - diagonal_k, b @ xp.sum(b, axis=0) - diagonal_l
    total = xp.sum(rows_k) * xp.sum(rows_l) / ((n - 1) * (n - 2))
    return float(trace + total - 2 * (rows_k @ rows_l) / (n - 2))
