"""Metrics of representations: agreement of two sets of features of the same images, and iREPA's spatial structure.

Tensors of any dtype are read as float64 and computed on their device (on the CPU for Apple's GPUs, which lack float64).
Mutual kNN and CKNNA need no n x n matrix. Both order neighbours by inner product, as the kernels in their definitions
do. For neighbours by cosine, scale features to length 1 first: the papers do not say so, platonic-rep's code does
(:func:`clip_and_normalise`).

Spatial structure is defined by iREPA's code. Cosines are between two tokens of one image; distances are Manhattan
distances on the token grid. A token of length 0 has cosine 0 with every other. The grid is explicit and may be
non-square; iREPA measures on 16 x 16.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from repa_lab.kernels import kernels

Grid = tuple[int, int]
DEFINITIONS = ("paper", "platonic")
_CHUNK = 1024  # items whose products with all others are in memory at a time
_SPARE = 6  # candidates beyond k; enough that a row rarely needs a second pass
_GATHERED = 2**20  # numbers copied at a time by _products
_FLOOR = 1e-6  # platonic-rep's term in the denominator


class CosineSums:
    """The mean cosine of a student's with a teacher's tokens of images that arrive in batches, in O(N D) memory."""

    def __init__(self) -> None:
        self.images = 0
        self._matched = 0.0
        self._student = self._teacher = torch.zeros(())  # sums over images of unit tokens, (N, D)

    def add(self, student: torch.Tensor, teacher: torch.Tensor) -> None:
        """Add tokens ``(B, N, D)`` of the same images and places; (N, D) is that of earlier batches."""
        s = unit(float64(student))
        t = unit(float64(teacher).to(s.device))
        if s.shape != t.shape or s.ndim != 3:
            raise ValueError(f"need two equal (B, N, D) arrays, got {tuple(s.shape)} and {tuple(t.shape)}")
        if self.images and s.shape[1:] != self._student.shape:
            before = tuple(self._student.shape)
            raise ValueError(f"need tokens (B, N, D) with (N, D) = {before} as before, got {tuple(s.shape)}")
        self.images += len(s)
        self._matched += (s * t).sum().item()
        self._student, self._teacher = self._student + s.sum(0), self._teacher + t.sum(0)

    @property
    def cosine(self) -> float:
        """Mean cosine over images and places; NaN without images."""
        return self._matched / (self.images * len(self._student)) if self.images else math.nan

    @property
    def gap(self) -> float:
        """:attr:`cosine` minus the mean over pairs of different images at the same place; NaN below two images.

        A projector can raise the cosine by learning an average image's tokens at each place; tokens of another image at
        the same place share that, so the gap is the part that is specific to the image.
        """
        if self.images < 2:
            return math.nan
        # The sum over all pairs (b, c) and places n of cos(s_bn, t_cn): images are summed first.
        all_pairs = (self._student * self._teacher).sum().item()
        mismatched = (all_pairs - self._matched) / (self.images * (self.images - 1) * len(self._student))
        return self.cosine - mismatched


def cka(x: torch.Tensor, y: torch.Tensor, unbiased: bool = True) -> float:
    """Return the linear CKA (1905.00414) of features ``x`` ``(n, d1)`` and ``y`` ``(n, d2)`` of the same n items.

    ``unbiased`` uses the unbiased HSIC estimator (2010.15327, Eq. 3), whose expectation is 0 for independent features
    of any widths; the plain form grows with d / n. Invariant to rotation and isotropic scaling. O(n d1 d2) time and no
    n x n matrix.

    Raises:
        ValueError: item counts differ, there are fewer than 4 items, or values are not finite.
    """
    a, b = (_centred(side) for side in _paired(x, y, least=4))

    def hsic(a: torch.Tensor, b: torch.Tensor) -> float:
        return _unbiased_hsic(a, b) if unbiased else float((a.T @ b).square().sum())

    norm = hsic(a, a) * hsic(b, b)
    return hsic(a, b) / math.sqrt(norm) if norm > 0 else 0.0


def _unbiased_hsic(a: torch.Tensor, b: torch.Tensor) -> float:
    """HSIC_1 of the linear kernels K = a a^T and L = b b^T with zero diagonals, up to a constant factor."""
    n = len(a)
    diagonal_k, diagonal_l = a.square().sum(1), b.square().sum(1)
    trace = (a.T @ b).square().sum() - diagonal_k @ diagonal_l
    rows_k, rows_l = a @ a.sum(0) - diagonal_k, b @ b.sum(0) - diagonal_l
    total = rows_k.sum() * rows_l.sum() / ((n - 1) * (n - 2))
    return float(trace + total - 2 * (rows_k @ rows_l) / (n - 2))


# ---- nearest neighbours


def nearest_neighbours(x: torch.Tensor, k: int = 10) -> torch.Tensor:
    """Return the k items of largest inner product with each item of ``x`` ``(n, d)``, the item itself excluded.

    Indices ``(n, k)``, nearest first; equal products are ordered by index. O(n^2 d) time and O(n) memory.

    Raises:
        ValueError: ``x`` is not ``(n, d)`` or not finite, or k is not in 1 <= k < n.
    """
    features = checked_features(float64(x), "x", least=2)
    _require_k(k, len(features))
    return _nearest(features, k)


def mutual_knn(x: torch.Tensor, y: torch.Tensor, k: int = 10) -> float:
    """Return the mean share of an item's k nearest neighbours in ``x`` ``(n, d1)`` that are among those in ``y``.

    Independent features give k / (n - 1). 2405.07987, Appendix A; neighbours as in :func:`nearest_neighbours`.

    Raises:
        ValueError: item counts differ, values are not finite, or k is out of range.
    """
    sides = _paired(x, y, least=2)
    _require_k(k, len(x))
    a, b = (_nearest(side, k) for side in sides)
    return int((a[:, :, None] == b[:, None]).sum()) / (len(x) * k)


def cknna(x: torch.Tensor, y: torch.Tensor, k: int = 10, definition: str = "paper") -> float:
    """Return the centred kernel nearest-neighbour alignment of features ``(n, d1)`` and ``(n, d2)`` of the same items.

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
    :func:`clip_and_normalise`, so its neighbours are those by cosine. O(n^2 d) time, O(n k) memory.

    Args:
        k: neighbours per item, k < n; at least 1 for ``paper``, 2 for ``platonic``. 10 in the papers.
        definition: ``paper``, which gives 1 for identical features, or ``platonic``; both give 0 if a side is constant.

    Raises:
        ValueError: item counts differ, fewer than 4 items, values are not finite, k is out of range, or the definition
            is unknown.
    """
    if definition not in DEFINITIONS:
        raise ValueError(f"unknown definition {definition!r}; allowed: {', '.join(DEFINITIONS)}")
    sides = _paired(x, y, least=4)
    _require_k(k, len(x), 1 if definition == "paper" else 2)
    neighbours = [_nearest(side, k) for side in sides]
    if definition == "paper":
        kernel, other = (_kernel(side, _centred(side), near) for side, near in zip(sides, neighbours, strict=True))
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
    features = checked_features(float64(x), "x", least=1)
    if quantile < 1:
        bound = features.abs().flatten().kthvalue(int(quantile * features.numel()) + 1).values
        features = features.clamp(-bound, bound)
    return unit(features)


def _require_k(k: int, count: int, least: int = 1) -> None:
    if not least <= k < count:
        raise ValueError(f"k = {k} neighbours of {count} items: give {least} <= k <= {count - 1}, or more items")


def _nearest(x: torch.Tensor, k: int) -> torch.Tensor:
    """Return neighbours ``(n, k)`` of finite float64 features; the chunks do not change them.

    The rounding of a matrix product depends on its blocks and could order nearly equal products differently. So it only
    selects candidates, in float32 at first, whose products are then computed one by one in float64. If an item outside
    the candidates could be nearer than the k-th of them within the rounding, the candidates are selected in float64,
    and after that all items that could be are compared.
    """
    # Scaling by a power of two changes no digit, and products then neither overflow nor vanish.
    exponent = -math.frexp(x.abs().max().item())[1]
    x = x * math.ldexp(1.0, exponent // 2) * math.ldexp(1.0, exponent - exponent // 2)
    chunks = torch.arange(len(x), device=x.device).split(_CHUNK)
    with kernels(tf32=False):  # whose 10 bits would be more than the rounding that is allowed for
        rounded = x.float()
        return torch.cat([_nearest_of(x, rounded, rows, k) for rows in chunks])


def _nearest_of(x: torch.Tensor, rounded: torch.Tensor, rows: torch.Tensor, k: int) -> torch.Tensor:
    """Return the neighbours ``(r, k)`` of ``rows`` ``(r,)`` of ``x``; ``rounded`` selects the candidates."""
    scores = (rounded[rows] @ rounded.T).scatter_(1, rows[:, None], -math.inf)
    width = min(k + max(k // 2, _SPARE), len(x) - 1)
    best, candidates = scores.topk(width, dim=1)
    candidates = candidates.sort(dim=1).values
    products = _products(x, x, rows, candidates)
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


def _products(x: torch.Tensor, z: torch.Tensor, rows: torch.Tensor, near: torch.Tensor) -> torch.Tensor:
    """Return ``x_i . z_j`` ``(r, k)`` for each i of ``rows`` and each j in its row of ``near``, summed in one order."""
    size = max(1, _GATHERED // (near.shape[1] * x.shape[1]))
    parts = zip(rows.split(size), near.split(size), strict=True)
    return torch.cat([torch.linalg.vecdot(z[neighbours], x[items, None]) for items, neighbours in parts])


def _kernel(x: torch.Tensor, z: torch.Tensor, near: torch.Tensor) -> torch.Tensor:
    """Return the sparse n x n matrix of ``x_i . z_j`` where j is a neighbour of i."""
    return _sparse(near, _products(x, z, torch.arange(len(x), device=x.device), near))


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


# ---- spatial structure of an image's tokens


def lds(tokens: torch.Tensor, grid: Grid, far: int = 6) -> float:
    """Return the local-to-distant similarity: mean cosine at distance 1 minus mean cosine at distance ``far`` or more.

    The mean over images of tokens ``(B, h * w, D)``, row-major, without class or register tokens. iREPA's text speaks
    of a near radius; its code, as here, takes the four neighbours.

    Raises:
        ValueError: the tokens do not fill the grid ``(h, w)`` or are not finite, or not 2 <= far <= h + w - 2.
    """
    cosines, distance = _mean_cosines(tokens, grid)
    farthest = grid[0] + grid[1] - 2
    if not 2 <= far <= farthest:
        allowed = f"give 2 <= far <= {farthest}, got {far}"
        raise ValueError(f"tokens on the grid {grid[0]}x{grid[1]} are at most {farthest} apart: {allowed}")
    return float(cosines[distance == 1].mean() - cosines[distance >= far].mean())


def cds(tokens: torch.Tensor, grid: Grid, farthest: int = 8) -> float:
    """Return the correlation decay slope: minus the slope of mean cosine over the distances 1 to ``farthest``.

    The mean over images of tokens ``(B, h * w, D)``, row-major, without class or register tokens; in cosine per token,
    0 for a constant map. iREPA's code: a least-squares line in which each distance counts once, however many pairs it
    has; a smaller grid is fitted over the distances that it has.

    Raises:
        ValueError: the tokens do not fill the grid ``(h, w)`` or are not finite, or there are fewer than two distances.
    """
    cosines, distance = _mean_cosines(tokens, grid)
    steps = range(1, min(farthest, int(distance.max())) + 1)
    if len(steps) < 2:
        allowed = f"give farthest >= 2 and h + w >= 4, got {farthest} and the grid {grid}"
        raise ValueError(f"a slope needs two distances: {allowed}")
    means = torch.stack([cosines[distance == step].mean() for step in steps])
    offsets = torch.tensor(steps).to(means) - sum(steps) / len(steps)
    return float(-(offsets @ means) / (offsets @ offsets))


def rmsc(tokens: torch.Tensor, grid: Grid) -> float:
    """Return iREPA's RMS spatial contrast: root mean squared distance of an image's unit tokens from their mean.

    The mean over images of tokens ``(B, h * w, D)``, in any order; between 0, for a constant map, and 1. ``grid``
    ``(h, w)`` checks that there are no class or register tokens among them.

    Raises:
        ValueError: the tokens do not fill the grid or are not finite.
    """
    tokens = _unit_tokens(tokens, grid)
    contrast = tokens - tokens.mean(1, keepdim=True)
    return float(contrast.square().sum(-1).mean(-1).sqrt().mean())


def _unit_tokens(tokens: torch.Tensor, grid: Grid) -> torch.Tensor:
    tokens = float64(tokens)
    if tokens.ndim != 3 or 0 in tokens.shape:
        raise ValueError(f"need tokens (B, N, D), got {tuple(tokens.shape)}")
    if tokens.shape[1] != grid[0] * grid[1] or min(grid) < 1:
        fix = "give the (h, w) of the patches, and leave class and register tokens out"
        raise ValueError(f"{tokens.shape[1]} tokens do not fill the grid {grid[0]}x{grid[1]}: {fix}")
    _require_finite(tokens, "tokens")
    return unit(tokens)


def _mean_cosines(tokens: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the cosines ``(N, N)`` of all pairs of places, averaged over images, and their distances ``(N, N)``."""
    unit_tokens = _unit_tokens(tokens, grid)
    # The sum over images is a sum over channels too, so one product does both.
    flat = unit_tokens.transpose(0, 1).flatten(1)
    place = torch.arange(grid[0] * grid[1], device=flat.device)
    row, column = place // grid[1], place % grid[1]
    distance = (row[:, None] - row).abs() + (column[:, None] - column).abs()
    return flat @ flat.T / len(unit_tokens), distance


# ---- features of any dtype


def float64(values: torch.Tensor) -> torch.Tensor:
    """Return a tensor as float64 without its gradient."""
    return values.detach().to("cpu" if values.device.type == "mps" else values.device, torch.float64)


def unit(vectors: torch.Tensor) -> torch.Tensor:
    """Return vectors along the last axis scaled to length 1; zero vectors stay zero."""
    return F.normalize(vectors, dim=-1, eps=1e-12)


def _centred(features: torch.Tensor) -> torch.Tensor:
    """Return features ``(n, d)`` minus their mean over items; a constant column becomes exactly 0."""
    return torch.where(features.amax(0) > features.amin(0), features - features.mean(0), 0.0)


def _paired(x: torch.Tensor, y: torch.Tensor, least: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return features ``(n, d1)`` and ``(n, d2)`` of ``least`` or more items as float64 on the device of ``x``."""
    a, b = checked_features(float64(x), "x", least), checked_features(float64(y), "y", least)
    if len(a) != len(b):
        raise ValueError(f"need features of the same items, got {len(a)} and {len(b)}")
    return a, b.to(a.device)


def checked_features(features: torch.Tensor, name: str, least: int) -> torch.Tensor:
    """Return features ``(n, d)`` as they are.

    Raises:
        ValueError: another shape, fewer than ``least`` items, or values that are not finite.
    """
    if features.ndim != 2 or len(features) < least or features.shape[1] == 0:
        need = f"need features (n >= {least}, d), one pooled vector an item"
        raise ValueError(f"{name}: {need}, got {tuple(features.shape)}")
    _require_finite(features, name)
    return features


def _require_finite(values: torch.Tensor, name: str) -> None:
    """Refuse items with NaN or infinity; give their number and the index of the first."""
    bad = (~values.isfinite().flatten(1).all(1)).nonzero().flatten()
    if len(bad):
        where = f"{len(bad)} of {len(values)} items, the first at index {int(bad[0])}"
        fix = "leave these items out on every side, or use float32"
        raise ValueError(f"{name}: features are not finite ({where}): {fix}")
