"""Agreement of two sets of features of the same images: cosine of tokens, linear CKA, mutual kNN and CKNNA.

Tensors of any dtype are read as float64 and computed on their device (on the CPU for Apple's GPUs, which lack float64).
Mutual kNN and CKNNA need no n x n matrix. Both order neighbours by inner product, as the kernels in their definitions
do. For neighbours by cosine, scale features to length 1 first: the papers do not say so, platonic-rep's code does
(:func:`clip_and_normalise`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from repa_lab.kernels import kernels

DEFINITIONS = ("paper", "platonic")
_CHUNK = 1024
_SPARE = 6  # candidates beyond k; enough that a row rarely needs a second pass
_GATHERED = 2**20  # numbers copied at a time by _products
_FLOOR = 1e-6  # platonic-rep's term in the denominator


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


# ---- nearest neighbours


def nearest_neighbours(x: torch.Tensor, k: int = 10, chunk: int = _CHUNK) -> torch.Tensor:
    """Return the k items of largest inner product with each item of ``x`` ``(n, d)``, the item itself excluded.

    O(n^2 d) time and O(chunk n) memory. The result does not depend on ``chunk``: inner products of candidates are
    computed one by one, always in the same order of summation.

    Args:
        x: features of any dtype.
        k: neighbours per item, 1 <= k < n.
        chunk: items processed at a time.

    Returns:
        Indices ``(n, k)``, nearest first; equal products are ordered by index.

    Raises:
        ValueError: ``x`` is not ``(n, d)`` or not finite, or k is out of range.
    """
    features = _features(x, least=2)
    _require_k(k, len(features))
    return _nearest(features, k, chunk)


def mutual_knn(x: torch.Tensor, y: torch.Tensor, k: int = 10, chunk: int = _CHUNK) -> float:
    """Return the mean share of an item's k nearest neighbours in ``x`` ``(n, d1)`` that are among those in ``y``.

    Independent features give k / (n - 1). 2405.07987, Appendix A; neighbours as in :func:`nearest_neighbours`.

    Raises:
        ValueError: item counts differ, values are not finite, or k is out of range.
    """
    a, b = paired_features(x, y, least=2)
    _require_k(k, len(a))
    pairs = [_pair_codes(_nearest(side, k, chunk)) for side in (a, b)]
    return int(torch.isin(*pairs).sum()) / (len(a) * k)


def cknna(x: torch.Tensor, y: torch.Tensor, k: int = 10, definition: str = "paper", chunk: int = _CHUNK) -> float:
    """Return the centred kernel nearest-neighbour alignment of features ``x`` and ``y`` of the same n items.

    Two definitions are in use and give different numbers: name the one you report. With linear kernels K and L, and
    a(i, j) = 1 where j is among the k nearest neighbours of i in K and in L, and else 0:

    - ``paper`` (REPA, 2410.06940, Eqs. 23-24): ``sum_ij a(i, j) (K_ij - mean_l K_il)(L_ij - mean_l L_il)``, divided by
      the root of the same sum for K with itself times that for L with itself, where a(i, j) holds the neighbours of K
      alone or of L alone. Symmetric, invariant to rotation and to isotropic scaling of either side.
    - ``platonic`` (platonic-rep's code): the unbiased HSIC (2010.15327, Eq. 3) of the masked kernels ``a K`` and
      ``a L``, divided by the root of those of each with itself, plus 1e-6. The masks are not symmetric, hence neither
      is the value, and it can lie below 0 or above 1; the 1e-6 lowers it for short features. It is NaN where the root
      is, as in that code.

    Where the paper is silent: neighbours are ordered by inner product, as K is; ``mean_l`` includes i itself; equal
    products are ordered by index; features are taken as given. platonic-rep prepares them with
    :func:`clip_and_normalise`, so its neighbours are those by cosine. O(n^2 d) time, O(chunk n + n k) memory.

    Args:
        x: features ``(n, d1)`` of any dtype, for example a denoiser's tokens averaged over an image.
        y: features ``(n, d2)`` of the same items, for example the encoder's.
        k: neighbours per item, k < n; at least 1 for ``paper``, 2 for ``platonic``. 10 in the papers.
        definition: ``paper`` or ``platonic``.
        chunk: items processed at a time; the value does not depend on it.

    Returns:
        1 for identical features (``paper``); 0 if one side is constant.

    Raises:
        ValueError: item counts differ, fewer than 4 items, values are not finite, k is out of range, or the definition
            is unknown.
    """
    if definition not in DEFINITIONS:
        raise ValueError(f"unknown definition {definition!r}; allowed: {', '.join(DEFINITIONS)}")
    sides = paired_features(x, y, least=4)
    _require_k(k, len(x), 1 if definition == "paper" else 2)
    neighbours = [_nearest(side, k, chunk) for side in sides]
    if definition == "paper":
        kernel, other = (_kernel(side, centred(side), near) for side, near in zip(sides, neighbours, strict=True))
        norm = math.sqrt(_dot(kernel, kernel)) * math.sqrt(_dot(other, other))
        return _dot(kernel, other) / norm if norm > 0 else 0.0
    kernel, other = (_kernel(side, side, near) for side, near in zip(sides, neighbours, strict=True))
    product = _sparse_hsic(kernel, kernel) * _sparse_hsic(other, other)
    if product < 0:
        return math.nan
    in_kernel, in_other = (_sparse(near, torch.ones_like(near, dtype=torch.float64)) for near in neighbours)
    shared = _sparse_hsic((kernel * in_other).coalesce(), (other * in_kernel).coalesce())
    return shared / (math.sqrt(product) + _FLOOR)


def clip_and_normalise(x: torch.Tensor, quantile: float = 0.95) -> torch.Tensor:
    """Clip features ``(n, d)`` at a quantile of their absolute values, then scale each to length 1.

    platonic-rep's preparation, with its exact quantile: the absolute value of rank ``int(quantile * n * d)``, counted
    from 0. A quantile of 1 clips nothing.

    Raises:
        ValueError: ``x`` is not ``(n, d)`` or not finite, or the quantile is not in (0, 1].
    """
    if not 0 < quantile <= 1:
        raise ValueError(f"the quantile must lie in (0, 1], got {quantile}")
    features = _features(x, least=1)
    if quantile < 1:
        bound = features.abs().flatten().kthvalue(int(quantile * features.numel()) + 1).values
        features = features.clamp(-bound, bound)
    return unit(features)


def _features(x: torch.Tensor, least: int) -> torch.Tensor:
    features = float64(x)
    if features.ndim != 2 or len(features) < least or features.shape[1] == 0:
        need = f"need features x of shape (n >= {least}, d), one pooled vector an item"
        raise ValueError(f"{need}, got {tuple(features.shape)}")
    require_finite(features, "x")
    return features


def _require_k(k: int, count: int, least: int = 1) -> None:
    if not least <= k < count:
        raise ValueError(f"k = {k} neighbours of {count} items: give {least} <= k <= {count - 1}, or more items")


def _nearest(x: torch.Tensor, k: int, chunk: int) -> torch.Tensor:
    """Return neighbours ``(n, k)`` of finite float64 features.

    The rounding of a matrix product depends on its blocks and could order nearly equal products differently. So it only
    selects candidates, in float32 at first, whose products are then computed one by one in float64. If an item outside
    the candidates could be nearer than the k-th of them within the rounding, the candidates are selected in float64,
    and after that all items that could be are compared.
    """
    # Scaling by a power of two changes no digit, and products then neither overflow nor vanish.
    exponent = -math.frexp(x.abs().max().item())[1]
    x = x * math.ldexp(1.0, exponent // 2) * math.ldexp(1.0, exponent - exponent // 2)
    chunks = torch.arange(len(x), device=x.device).split(chunk)
    with kernels(tf32=False):  # whose 10 bits would be more than the rounding that is allowed for
        rounded = x.float()
        return torch.cat([_nearest_of(x, rounded, rows, k) for rows in chunks])


def _nearest_of(x: torch.Tensor, rounded: torch.Tensor, rows: torch.Tensor, k: int) -> torch.Tensor:
    """Return the neighbours ``(r, k)`` of ``rows`` ``(r,)`` of ``x``; ``rounded`` selects the candidates."""
    scores = (rounded[rows] @ rounded.T).scatter_(1, rows[:, None], -math.inf)
    width = min(k + max(k // 2, _SPARE), len(x) - 1)
    best, candidates = scores.topk(width, dim=1)
    candidates = candidates.sort(dim=1).values
    products = torch.cat(list(_products(x, x, rows, candidates)))
    order = products.argsort(dim=1, descending=True, stable=True)[:, :k]
    nearest, kth = candidates.gather(1, order), products.gather(1, order[:, -1:])[:, 0]
    precision, lengths = torch.finfo(rounded.dtype), x.norm(dim=1)
    rounding = 4 * (x.shape[1] + 4) * precision.eps * lengths[rows] * lengths.max() + x.shape[1] * precision.tiny
    unsure = (kth <= best[:, -1] + rounding).nonzero().flatten()
    if rounded.dtype != x.dtype:
        if len(unsure):
            nearest[unsure] = _nearest_of(x, x, rows[unsure], k)
        return nearest
    for row in unsure.tolist():
        possible = (scores[row] >= kth[row] - rounding[row]).nonzero().flatten()
        exact = torch.linalg.vecdot(x[possible], x[rows[row]])
        nearest[row] = possible[exact.argsort(descending=True, stable=True)[:k]]
    return nearest


def _products(x: torch.Tensor, z: torch.Tensor, rows: torch.Tensor, near: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield ``x_i . z_j`` for each i of ``rows`` and each j in its row of ``near``, each sum in the same order."""
    size = max(1, _GATHERED // (near.shape[1] * x.shape[1]))
    for items, neighbours in zip(rows.split(size), near.split(size), strict=True):
        yield torch.linalg.vecdot(z[neighbours], x[items, None])


def _pair_codes(near: torch.Tensor) -> torch.Tensor:
    """Return every pair (i, j) of neighbours as the number ``i n + j``."""
    return (torch.arange(len(near), device=near.device)[:, None] * len(near) + near).flatten()


def _kernel(x: torch.Tensor, z: torch.Tensor, near: torch.Tensor) -> torch.Tensor:
    """Return the sparse n x n matrix of ``x_i . z_j`` where j is a neighbour of i."""
    return _sparse(near, torch.cat(list(_products(x, z, torch.arange(len(x), device=x.device), near))))


def _sparse(near: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return the sparse n x n matrix with ``values`` ``(n, k)`` in the columns ``near`` ``(n, k)``."""
    n, k = near.shape
    rows = torch.arange(n, device=near.device).repeat_interleave(k)
    entries = torch.stack([rows, near.flatten()])
    return torch.sparse_coo_tensor(entries, values.flatten(), (n, n), check_invariants=False).coalesce()


def _dot(kernel: torch.Tensor, other: torch.Tensor) -> float:
    return float((kernel * other).sum())


def _sparse_hsic(kernel: torch.Tensor, other: torch.Tensor) -> float:
    """HSIC_1 of sparse kernels with zero diagonals, which need not be symmetric: ``tr(k m)`` pairs k_ij with m_ji."""
    n = len(kernel)
    total = kernel.sum() * other.sum() / ((n - 1) * (n - 2))
    paths = kernel.sum(0).to_dense() @ other.sum(1).to_dense()
    return float(_dot(kernel, other.T.coalesce()) + total - 2 * paths / (n - 2)) / (n * (n - 3))


# ---- features of any dtype


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
