"""Agreement of two sets of features in their nearest neighbours: mutual kNN and CKNNA, without an n x n matrix.

Both order neighbours by inner product, as the kernels in their definitions do. For neighbours by cosine, scale features
to length 1 first: the papers do not say so, platonic-rep's code does (:func:`clip_and_normalise`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from repa_lab.kernels import kernels
from repa_lab.metrics.alignment import centred, float64, paired_features, require_finite, unit

DEFINITIONS = ("paper", "platonic")
_CHUNK = 1024
_SPARE = 6  # candidates beyond k; enough that a row rarely needs a second pass
_GATHERED = 2**20  # numbers copied at a time by _products
_FLOOR = 1e-6  # platonic-rep's term in the denominator


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
    product = _unbiased_hsic(kernel, kernel) * _unbiased_hsic(other, other)
    if product < 0:
        return math.nan
    in_kernel, in_other = (_sparse(near, torch.ones_like(near, dtype=torch.float64)) for near in neighbours)
    shared = _unbiased_hsic((kernel * in_other).coalesce(), (other * in_kernel).coalesce())
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


def _unbiased_hsic(kernel: torch.Tensor, other: torch.Tensor) -> float:
    """HSIC_1 of sparse kernels with zero diagonals, which need not be symmetric: ``tr(k m)`` pairs k_ij with m_ji."""
    n = len(kernel)
    total = kernel.sum() * other.sum() / ((n - 1) * (n - 2))
    paths = kernel.sum(0).to_dense() @ other.sum(1).to_dense()
    return float(_dot(kernel, other.T.coalesce()) + total - 2 * paths / (n - 2)) / (n * (n - 3))
