"""Agreement of two sets of features of the same images: cosine of tokens, and linear CKA.

Tensors of any dtype are read as float64 and computed on their device (on the CPU for Apple's GPUs, which lack float64).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


class CosineSums:
    """The mean token cosine of images that arrive in batches, in O(N D) memory."""

    def __init__(self) -> None:
        self.images = 0
        self._matched = 0.0
        # Sums over images of unit tokens (N, D): the student's and the teacher's.
        self._student, self._teacher = torch.zeros(0, 0).double(), torch.zeros(0, 0).double()

    def add(self, student: torch.Tensor, teacher: torch.Tensor) -> None:
        """Add tokens ``(B, N, D)`` of the same images and places.

        Raises:
            ValueError: the shapes differ from each other, or (N, D) from that of earlier batches.
        """
        s = unit(float64(student))
        t = unit(float64(teacher).to(s.device))
        if s.shape != t.shape or s.ndim != 3:
            raise ValueError(f"need two equal (B, N, D) arrays, got {tuple(s.shape)} and {tuple(t.shape)}")
        if self.images and s.shape[1:] != self._student.shape:
            before = tuple(self._student.shape)
            raise ValueError(f"need tokens (B, N, D) with (N, D) = {before} as before, got {tuple(s.shape)}")
        if not self.images:
            self._student, self._teacher = torch.zeros_like(s[0]), torch.zeros_like(t[0])
        self.images += len(s)
        self._matched += (s * t).sum().item()
        self._student, self._teacher = self._student + s.sum(0), self._teacher + t.sum(0)

    @property
    def cosine(self) -> float:
        """Mean cosine over images and places; NaN without images."""
        return self._matched / (self.images * len(self._student)) if self.images else math.nan

    @property
    def gap(self) -> float:
        """:attr:`cosine` minus the mean over pairs of different images at the same place; NaN below two images."""
        if self.images < 2:
            return math.nan
        # The sum over all pairs (b, c) and places n of cos(s_bn, t_cn): images are summed first.
        all_pairs = (self._student * self._teacher).sum().item()
        mismatched = (all_pairs - self._matched) / (self.images * (self.images - 1) * len(self._student))
        return self.cosine - mismatched


def cosine_gap(student: torch.Tensor, teacher: torch.Tensor) -> tuple[float, float]:
    """Return the mean token cosine, and how far it lies above that of mismatched images.

    A projector can raise the cosine by learning an average image's tokens at each place; tokens of another image at the
    same place share that, so the gap is the part that is specific to the image.

    Args:
        student: projected tokens ``(B, N, D)`` of B >= 2 images; :class:`CosineSums` takes them in batches.
        teacher: encoder tokens ``(B, N, D)`` of the same images.

    Returns:
        The cosine of matched images, and that cosine minus the mean over all pairs of different images.

    Raises:
        ValueError: the shapes differ or there are fewer than two images.
    """
    sums = CosineSums()
    sums.add(student, teacher)
    if sums.images < 2:
        raise ValueError(f"need two equal (B >= 2, N, D) arrays, got {sums.images} image")
    return sums.cosine, sums.gap


def cka(x: torch.Tensor, y: torch.Tensor, unbiased: bool = True) -> float:
    """Return the linear CKA (1905.00414) of features ``x`` ``(n, d1)`` and ``y`` ``(n, d2)`` of the same n items.

    ``unbiased`` uses the unbiased HSIC estimator (2010.15327, Eq. 3), whose expectation is 0 for independent features
    of any widths; the plain form grows with d / n. Invariant to rotation and isotropic scaling. O(n d1 d2) time and no
    n x n matrix.

    Raises:
        ValueError: item counts differ, there are fewer than 4 items, or values are not finite.
    """
    a, b = (centred(side) for side in paired_features(x, y, least=4))
    hsic = _unbiased_hsic if unbiased else _biased_hsic
    norm = hsic(a, a) * hsic(b, b)
    return hsic(a, b) / math.sqrt(norm) if norm > 0 else 0.0


def _biased_hsic(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.T @ b).square().sum())


def _unbiased_hsic(a: torch.Tensor, b: torch.Tensor) -> float:
    """HSIC_1 of the linear kernels K = a a^T and L = b b^T with zero diagonals, up to a constant factor."""
    n = len(a)
    diagonal_k, diagonal_l = a.square().sum(1), b.square().sum(1)
    trace = (a.T @ b).square().sum() - diagonal_k @ diagonal_l
    rows_k, rows_l = a @ a.sum(0) - diagonal_k, b @ b.sum(0) - diagonal_l
    total = rows_k.sum() * rows_l.sum() / ((n - 1) * (n - 2))
    return float(trace + total - 2 * (rows_k @ rows_l) / (n - 2))


def float64(values: torch.Tensor) -> torch.Tensor:
    """Return a tensor as float64 without its gradient."""
    return values.detach().to("cpu" if values.device.type == "mps" else values.device, torch.float64)


def unit(vectors: torch.Tensor) -> torch.Tensor:
    """Return vectors along the last axis scaled to length 1; zero vectors stay zero."""
    return F.normalize(vectors, dim=-1, eps=1e-12)


def centred(features: torch.Tensor) -> torch.Tensor:
    """Return features ``(n, d)`` minus their mean over items; a constant column becomes exactly 0."""
    return torch.where(features.amax(0) > features.amin(0), features - features.mean(0), 0.0)


def paired_features(x: torch.Tensor, y: torch.Tensor, least: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return features ``(n, d1)`` and ``(n, d2)`` as float64 on the device of ``x``.

    Raises:
        ValueError: other shapes, different or fewer than ``least`` items, or values that are not finite.
    """
    a = float64(x)
    b = float64(y).to(a.device)
    if a.ndim != 2 or b.ndim != 2 or len(a) != len(b) or len(a) < least or 0 in (*a.shape, *b.shape):
        need = f"need features (n >= {least}, d1) and (n, d2) of the same items, one pooled vector an item"
        raise ValueError(f"{need}, got {tuple(a.shape)} and {tuple(b.shape)}")
    require_finite(a, "x")
    require_finite(b, "y")
    return a, b


def require_finite(values: torch.Tensor, name: str) -> None:
    """Refuse items with NaN or infinity.

    Raises:
        ValueError: with the number of such items and the index of the first.
    """
    bad = (~values.isfinite().flatten(1).all(1)).nonzero().flatten()
    if len(bad):
        where = f"{len(bad)} of {len(values)} items, the first at index {int(bad[0])}"
        fix = "leave these items out on every side, or use float32"
        raise ValueError(f"{name}: features are not finite ({where}): {fix}")
