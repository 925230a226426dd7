"""Agreement of two sets of features in who is near whom: mutual kNN and CKNNA, without an n x n matrix.

Both count the k nearest neighbours of an item by inner product, as the kernels they are defined with do. Whoever wants the
cosine gives features of length 1; the papers do not say that they do, platonic-rep's code does: :func:`clip_and_normalise`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from repa_lab.metrics.arrays import Array, centred, features, paired_features, unit

Index = NDArray[np.int64]
_CHUNK = 1024
_SPARE = 6  # candidates beyond k that a first look keeps: enough that a second is rarely needed
_GATHER = 2**22  # numbers of features copied at a time
_FLOOR = 1e-6  # platonic-rep's, in the denominator


def nearest_neighbours(x: ArrayLike, k: int = 10, chunk: int = _CHUNK) -> Index:
    """The k items of largest inner product with each item of features ``x`` ``(n, d)``, itself left out.

    The result is that of float64: a first look in single precision keeps candidates, their products are then taken in
    float64, and where rounding could have hidden a neighbour all items that might be one are looked at. O(n^2 d) time,
    O(chunk n) memory beyond a few copies of ``x``; up to 50 times slower where items can hardly be told apart (all equal, or
    one a thousand times longer than the rest). The result does not depend on ``chunk``.

    Args:
        x: features of any float type.
        k: neighbours an item, 1 <= k < n.
        chunk: items looked at at a time.

    Returns:
        Indices ``(n, k)``, nearest first; ties go to the lower index.

    Raises:
        ValueError: ``x`` is not ``(n, d)``, not finite, or k is out of range.
    """
    a = features(x, least=2)
    _require_k(k, len(a))
    return _nearest(a, k, chunk)


def mutual_knn(x: ArrayLike, y: ArrayLike, k: int = 10, chunk: int = _CHUNK) -> float:
    """Mean share of an item's k nearest neighbours in ``x`` ``(n, d1)`` that are also among those in ``y`` ``(n, d2)``.

    Independent features give k / (n - 1). 2405.07987, Appendix A; neighbours as in :func:`nearest_neighbours`.

    Raises:
        ValueError: item counts differ, values are not finite, or k is out of range.
    """
    a, b = paired_features(x, y, least=2)
    _require_k(k, len(a))
    shared = np.intersect1d(_codes(_nearest(a, k, chunk)), _codes(_nearest(b, k, chunk)), assume_unique=True)
    return len(shared) / (len(a) * k)


def cknna(x: ArrayLike, y: ArrayLike, k: int = 10, definition: str = "paper", chunk: int = _CHUNK) -> float:
    """Centred kernel nearest-neighbour alignment of features ``x`` ``(n, d1)`` and ``y`` ``(n, d2)`` of the same n items.

    Two definitions are in use. They give different numbers: name the one you report. With linear kernels K and L, and
    a(i, j) = 1 where j is among the k nearest neighbours of i in K and in L, and else 0:

    - ``paper`` (REPA, 2410.06940, Eqs. 23-24): ``sum_ij a(i, j) (K_ij - mean_l K_il)(L_ij - mean_l L_il)``, over the root
      of the same sum for K with itself times that for L with itself. In these a(i, j) holds K's, or L's, neighbours alone.
      Symmetric, invariant to rotation and to isotropic scaling of either side.
    - ``platonic`` (platonic-rep's code): the unbiased HSIC (2010.15327, Eq. 3) of the masked kernels ``a K`` and ``a L``,
      over the root of those of each with itself plus 1e-6. The masks are not symmetric, hence neither is the value, and it
      may lie below 0 or above 1; the 1e-6 lowers it for short features. It is NaN, as in that code, where that root is.

    What the paper leaves open is settled thus: neighbours are ordered by inner product, as K is; ``mean_l`` runs over all
    n items, i among them; ties go to the lower index; features are taken as given. platonic-rep prepares them with
    :func:`clip_and_normalise`, and then neighbours are those by cosine. O(n^2 d) time, O(chunk n + n k) memory.

    Args:
        x: features of any float type, e.g. a denoiser's tokens averaged over an image.
        y: features of the same items, e.g. those of the encoder.
        k: neighbours an item, k < n; from 1 for ``paper``, from 2 for ``platonic``. 10 in the papers.
        definition: ``paper`` or ``platonic``.
        chunk: items looked at at a time; the value does not depend on it.

    Returns:
        1 for identical features (``paper``); 0 if one side is constant.

    Raises:
        ValueError: item counts differ, fewer than 4 items, values are not finite, k is out of range, unknown definition.
    """
    if definition not in _DEFINITIONS:
        raise ValueError(f"unknown definition {definition!r}; allowed: {', '.join(_DEFINITIONS)}")
    of = _DEFINITIONS[definition]
    a, b = paired_features(x, y, least=4)
    _require_k(k, len(a), of.least_k)
    return of.value(a, b, _nearest(a, k, chunk), _nearest(b, k, chunk))


def clip_and_normalise(x: ArrayLike, quantile: float = 0.95) -> Array:
    """Features ``(n, d)`` clipped at a quantile of their absolute values, then each of length 1.

    What platonic-rep does before it measures, with its exact quantile: the value of rank ``int(quantile * n * d)`` of all
    absolute values, counted from 0. A quantile of 1 clips nothing.

    Raises:
        ValueError: ``x`` is not ``(n, d)``, not finite, or the quantile is not in (0, 1].
    """
    if not 0 < quantile <= 1:
        raise ValueError(f"the quantile must lie in (0, 1], got {quantile}")
    a = features(x, least=1)
    if quantile < 1:
        rank = int(quantile * a.size)
        bound = np.partition(np.abs(a), rank, axis=None)[rank]
        a = a.clip(-bound, bound)
    return unit(a)


def _require_k(k: int, count: int, least: int = 1) -> None:
    if not least <= k < count:
        raise ValueError(f"k = {k} neighbours of {count} items: give {least} <= k <= {count - 1}, or more items")


@dataclass(frozen=True)
class _Screen:
    """Features made ready for a first look in single precision.

    For the order of an item's neighbours j, ``x_i . x_j`` may be replaced by ``x_i . (x_j - mean)``, whose rounding is that of
    what differs between items and not that of what they share.
    """

    exact: Array
    offset: Array  # (n,) x_i . mean, which the first look leaves out
    centred: NDArray[np.float32]
    shift: NDArray[np.float32]  # (n,) mean . (x_j - mean)
    slack: Array  # (n,) how far the first look can be off for item i and any other

    @classmethod
    def of(cls, x: Array) -> _Screen:
        # By a power of two, which alters no digit: products in single precision must neither overflow nor vanish.
        x = np.ldexp(x, -int(np.frexp(np.abs(x).max())[1]))
        mean, rest = x.mean(axis=0), centred(x)
        shift, lengths = rest @ mean, np.linalg.norm(rest, axis=1)
        single, double = np.finfo(np.float32), np.finfo(np.float64)
        terms = x.shape[1] + 4
        rounding = terms * float(single.eps) * lengths * lengths.max() + 4 * float(single.eps) * np.abs(shift).max()
        norms = np.linalg.norm(x, axis=1)
        rounding += terms * (4 * float(double.eps) * norms * norms.max() + float(single.tiny))
        return cls(x, x @ mean, rest.astype(np.float32), shift.astype(np.float32), rounding)


def _nearest(x: Array, k: int, chunk: int) -> Index:
    screen = _Screen.of(x)
    starts = range(0, len(x), chunk)
    return np.concatenate([_of_rows(screen, np.arange(start, min(start + chunk, len(x))), k) for start in starts])


def _of_rows(screen: _Screen, rows: Index, k: int) -> Index:
    scores = screen.centred[rows] @ screen.centred.T
    scores += screen.shift
    scores[np.arange(len(rows)), rows] = -np.inf
    width = min(k + max(k // 2, _SPARE), scores.shape[1] - 1)
    near = np.argpartition(scores, -width, axis=1)[:, -width:]
    lowest = np.take_along_axis(scores, near, axis=1).min(axis=1)
    near.sort(axis=1)
    products = _products(screen.exact, screen.exact, rows, near)
    order = np.argsort(-products, axis=1, kind="stable")[:, :k]
    kth = np.take_along_axis(products, order[:, -1:], axis=1)[:, 0] - screen.offset[rows]
    found = np.take_along_axis(near, order, axis=1)
    for row in np.flatnonzero(kth <= lowest + screen.slack[rows]):
        found[row] = _of_all_that_might(screen, rows[row], scores[row] >= kth[row] - screen.slack[rows[row]], k)
    return found


def _of_all_that_might(screen: _Screen, item: int, might: NDArray[np.bool_], k: int) -> Index:
    near = np.flatnonzero(might)
    products = np.einsum("kd,d->k", screen.exact[near], screen.exact[item])
    return near[np.argsort(-products, kind="stable")[:k]]


def _products(x: Array, z: Array, rows: Index, near: Index) -> Array:
    """``x_i . z_j`` for each i of ``rows`` and each j of its row of ``near``: each product summed in one and the same order."""
    size = max(1, _GATHER // (near.shape[1] * x.shape[1]))
    parts = [slice(start, start + size) for start in range(0, len(rows), size)]
    return np.concatenate([np.einsum("ikd,id->ik", z[near[part]], x[rows[part]]) for part in parts])


def _codes(near: Index) -> Index:
    """Every pair (i, j) of neighbours as the one number ``i n + j``."""
    n = len(near)
    return (np.arange(n)[:, None] * n + near).ravel()


def _kernel(x: Array, z: Array, near: Index) -> Any:
    """The sparse n x n matrix that holds ``x_i . z_j`` where j is a neighbour of i."""
    from scipy.sparse import csr_array

    n, k = near.shape
    values = _products(x, z, np.arange(n), near)
    kernel = csr_array((values.ravel(), near.ravel(), np.arange(0, n * k + 1, k)), shape=(n, n))
    kernel.sort_indices()
    return kernel


def _paper(x: Array, y: Array, near_x: Index, near_y: Index) -> float:
    k, m = _kernel(x, centred(x), near_x), _kernel(y, centred(y), near_y)
    norm = np.sqrt(k.multiply(k).sum()) * np.sqrt(m.multiply(m).sum())
    return float(k.multiply(m).sum() / norm) if norm > 0 else 0.0


def _platonic(x: Array, y: Array, near_x: Index, near_y: Index) -> float:
    k, m = _kernel(x, x, near_x), _kernel(y, y, near_y)
    product = _unbiased_hsic(k, k) * _unbiased_hsic(m, m)
    if product < 0:
        return float("nan")
    shared = _pattern(k).multiply(_pattern(m))
    return _unbiased_hsic(shared.multiply(k), shared.multiply(m)) / (float(np.sqrt(product)) + _FLOOR)


def _pattern(kernel: Any) -> Any:
    ones = kernel.copy()
    ones.data[:] = 1
    return ones


def _unbiased_hsic(k: Any, m: Any) -> float:
    """HSIC_1 of sparse kernels whose diagonals are 0. ``tr(k m)`` meets ``k_ij`` with ``m_ji``: they need not be symmetric."""
    n = k.shape[0]
    total = k.sum() * m.sum() / ((n - 1) * (n - 2))
    paths = k.sum(axis=0) @ m.sum(axis=1)
    return float((k.multiply(m.T).sum() + total - 2 * paths / (n - 2)) / (n * (n - 3)))


@dataclass(frozen=True)
class _Definition:
    value: Callable[[Array, Array, Index, Index], float]
    least_k: int


_DEFINITIONS = {"paper": _Definition(_paper, 1), "platonic": _Definition(_platonic, 2)}
