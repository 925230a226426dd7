"""Agreement of two sets of features in who is near whom: mutual kNN and CKNNA, without an n x n matrix.

Both count the k nearest neighbours of an item by inner product, as the kernels they are defined with do. Whoever wants
the cosine gives features of length 1; the papers do not say that they do, platonic-rep's code does:
:func:`clip_and_normalise`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from array_api_compat import array_namespace, device, is_torch_array
from numpy.typing import ArrayLike

from repa_lab.metrics.arrays import (
    AnyArray,
    centred,
    features,
    largest,
    paired_features,
    scaled_to_one,
    unit,
    value_of_rank,
)

_CHUNK = 1024
_SPARE = 6  # candidates beyond k that a first look keeps: enough that a second is rarely needed
_GATHER = 2**16  # numbers of features copied at a time: half a MiB, which stays in a processor's cache
_GATHER_ON_GPU = 2**22  # where every copy is a launch
_FLOOR = 1e-6  # platonic-rep's, in the denominator


def nearest_neighbours(x: ArrayLike, k: int = 10, chunk: int = _CHUNK) -> AnyArray:
    """The k items of largest inner product with each item of features ``x`` ``(n, d)``, itself left out.

    The result is that of float64: a first look (of arrays, in single precision) keeps candidates, the products of these
    are then taken one by one, and where rounding could have hidden a neighbour all items that might be one are looked
    at. O(n^2 d) time, O(chunk n) memory beyond a few copies of ``x``; up to 50 times slower where items can hardly be
    told apart (all equal, or one a thousand times longer than the rest). The result does not depend on ``chunk``.

    Args:
        x: features of any float type.
        k: neighbours an item, 1 <= k < n.
        chunk: items looked at at a time; up to twice as many are one tile.

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
    xp = array_namespace(a)
    near_a, near_b = (xp.sort(_nearest(side, k, chunk), axis=1) for side in (a, b))
    _, is_shared = _find(_codes(near_a), _codes(near_b))
    return int(xp.sum(is_shared)) / (len(a) * k)


def cknna(x: ArrayLike, y: ArrayLike, k: int = 10, definition: str = "paper", chunk: int = _CHUNK) -> float:
    """Centred kernel nearest-neighbour alignment of features ``x`` ``(n, d1)`` and ``y`` ``(n, d2)`` of the same n
    items.

    Two definitions are in use. They give different numbers: name the one you report. With linear kernels K and L, and
    a(i, j) = 1 where j is among the k nearest neighbours of i in K and in L, and else 0:

    - ``paper`` (REPA, 2410.06940, Eqs. 23-24): ``sum_ij a(i, j) (K_ij - mean_l K_il)(L_ij - mean_l L_il)``, over the
      root of the same sum for K with itself times that for L with itself. In these a(i, j) holds K's, or L's,
      neighbours alone. Symmetric, invariant to rotation and to isotropic scaling of either side.
    - ``platonic`` (platonic-rep's code): the unbiased HSIC (2010.15327, Eq. 3) of the masked kernels ``a K`` and
      ``a L``, over the root of those of each with itself plus 1e-6. The masks are not symmetric, hence neither is the
      value, and it may lie below 0 or above 1; the 1e-6 lowers it for short features. It is NaN, as in that code, where
      that root is.

    What the paper leaves open is settled thus: neighbours are ordered by inner product, as K is; ``mean_l`` runs over
    all n items, i among them; ties go to the lower index; features are taken as given. platonic-rep prepares them with
    :func:`clip_and_normalise`, and then neighbours are those by cosine. O(n^2 d) time, O(chunk n + n k) memory.

    Args:
        x: features of any float type, e.g. a denoiser's tokens averaged over an image.
        y: features of the same items, e.g. those of the encoder.
        k: neighbours an item, k < n; from 1 for ``paper``, from 2 for ``platonic``. 10 in the papers.
        definition: ``paper`` or ``platonic``.
        chunk: items looked at at a time, up to twice as many in one tile; the value does not depend on it.

    Returns:
        1 for identical features (``paper``); 0 if one side is constant.

    Raises:
        ValueError: item counts differ, fewer than 4 items, values are not finite, k is out of range, unknown
            definition.
    """
    if definition not in _DEFINITIONS:
        raise ValueError(f"unknown definition {definition!r}; allowed: {', '.join(_DEFINITIONS)}")
    of = _DEFINITIONS[definition]
    a, b = paired_features(x, y, least=4)
    _require_k(k, len(a), of.least_k)
    return of.value(a, b, _nearest(a, k, chunk), _nearest(b, k, chunk))


def clip_and_normalise(x: ArrayLike, quantile: float = 0.95) -> AnyArray:
    """Features ``(n, d)`` clipped at a quantile of their absolute values, then each of length 1.

    What platonic-rep does before it measures, with its exact quantile: the value of rank ``int(quantile * n * d)`` of
    all absolute values, counted from 0. A quantile of 1 clips nothing.

    Raises:
        ValueError: ``x`` is not ``(n, d)``, not finite, or the quantile is not in (0, 1].
    """
    if not 0 < quantile <= 1:
        raise ValueError(f"the quantile must lie in (0, 1], got {quantile}")
    a = features(x, least=1)
    if quantile < 1:
        xp = array_namespace(a)
        bound = value_of_rank(xp.abs(a), int(quantile * math.prod(a.shape)))
        a = xp.clip(a, min=-bound, max=bound)
    return unit(a)


def _require_k(k: int, count: int, least: int = 1) -> None:
    if not least <= k < count:
        raise ValueError(f"k = {k} neighbours of {count} items: give {least} <= k <= {count - 1}, or more items")


@dataclass(frozen=True)
class _Screen:
    """Features made ready for a first look, which a product of matrices takes at all pairs.

    For the order of an item's neighbours j, ``x_i . x_j`` may be replaced by ``x_i . (x_j - mean)``, whose rounding is
    that of what differs between items and not that of what they share.
    """

    exact: AnyArray
    offset: AnyArray  # (n,) x_i . mean, which the first look leaves out
    centred: AnyArray  # in the precision of the first look
    shift: AnyArray  # (n,) mean . (x_j - mean), likewise
    slack: AnyArray  # (n,) how far the first look can be off for item i and any other

    @classmethod
    def of(cls, x: AnyArray) -> _Screen:
        xp = array_namespace(x)
        x = scaled_to_one(x)  # products in single precision must neither overflow nor vanish
        mean, rest = xp.mean(x, axis=0), centred(x)
        shift, lengths = rest @ mean, xp.linalg.vector_norm(rest, axis=1)
        # A GPU may be told to take single precision for less than it is, and has double to spare.
        look = x.dtype if is_torch_array(x) else xp.float32
        eps, tiny = (float(getattr(xp.finfo(look), name)) for name in ("eps", "smallest_normal"))
        terms = x.shape[1] + 4
        rounding = terms * eps * lengths * xp.max(lengths) + 4 * eps * xp.max(xp.abs(shift))
        norms = xp.linalg.vector_norm(x, axis=1)
        rounding = rounding + terms * (4 * float(xp.finfo(x.dtype).eps) * norms * xp.max(norms) + tiny)
        return cls(x, x @ mean, xp.astype(rest, look), xp.astype(shift, look), rounding)


def _nearest(x: AnyArray, k: int, chunk: int) -> AnyArray:
    screen, xp = _Screen.of(x), array_namespace(x)
    # Few items are one tile: a matrix by its own transpose is half the work, which BLAS sees.
    size = len(x) if len(x) <= 2 * chunk else chunk
    parts = [_of_rows(screen, start, min(start + size, len(x)), k) for start in range(0, len(x), size)]
    return xp.concat(parts, axis=0)


def _of_rows(screen: _Screen, start: int, end: int, k: int) -> AnyArray:
    xp = array_namespace(screen.exact)
    rows = xp.arange(start, end, device=device(screen.exact))
    scores = screen.centred[start:end, :] @ screen.centred.T
    scores += screen.shift
    scores[rows - start, rows] = -math.inf
    width = min(k + max(k // 2, _SPARE), scores.shape[1] - 1)
    near = largest(scores, width)
    lowest = xp.min(xp.take_along_axis(scores, near, axis=1), axis=1)
    near = xp.sort(near, axis=1)
    products = _products(screen.exact, screen.exact, start, near)
    order = xp.argsort(-products, axis=1, stable=True)[:, :k]
    kth = xp.take_along_axis(products, order[:, -1:], axis=1)[:, 0] - screen.offset[start:end]
    found = xp.take_along_axis(near, order, axis=1)
    slack = screen.slack[start:end]
    for row in xp.nonzero(kth <= lowest + slack)[0].tolist():
        found[row, :] = _of_all_that_might(screen, start + row, scores[row, :] >= kth[row] - slack[row], k)
    return found


def _of_all_that_might(screen: _Screen, item: int, might: AnyArray, k: int) -> AnyArray:
    xp = array_namespace(might)
    near = xp.nonzero(might)[0]
    products = xp.linalg.vecdot(screen.exact[near, :], screen.exact[item, :])
    return near[xp.argsort(-products, stable=True)[:k]]


def _products(x: AnyArray, z: AnyArray, start: int, near: AnyArray) -> AnyArray:
    """``x_i . z_j`` for each i from ``start`` and each j of its row of ``near``, each summed in one and the same order."""
    at_once, xp = _GATHER_ON_GPU if is_torch_array(x) else _GATHER, array_namespace(x)
    size = max(1, at_once // (near.shape[1] * x.shape[1]))
    parts = []
    for first in range(0, len(near), size):
        part = near[first : first + size, :]
        parts.append(xp.linalg.vecdot(z[part], x[start + first : start + first + len(part), None, :]))
    return xp.concat(parts, axis=0)


def _codes(near: AnyArray) -> AnyArray:
    """Every pair (i, j) of neighbours as the one number ``i n + j``; in order where each row of ``near`` is."""
    xp, n = array_namespace(near), len(near)
    return xp.reshape(xp.arange(n, device=device(near))[:, None] * n + near, (-1,))


def _find(wanted: AnyArray, codes: AnyArray) -> tuple[AnyArray, AnyArray]:
    """Where each wanted code stands among codes in order, and whether it does."""
    xp = array_namespace(codes)
    place = xp.clip(xp.searchsorted(codes, wanted), max=len(codes) - 1)
    return place, codes[place] == wanted


@dataclass(frozen=True)
class _Kernel:
    """The sparse n x n matrix of diagonal 0 that holds ``values`` ``(n, k)`` at the columns ``near`` ``(n, k)``, in order."""

    near: AnyArray
    values: AnyArray

    @classmethod
    def of(cls, x: AnyArray, z: AnyArray, near: AnyArray) -> _Kernel:
        """``x_i . z_j`` where j is a neighbour of i."""
        near = array_namespace(near).sort(near, axis=1)
        return cls(near, _products(x, z, 0, near))

    def at(self, codes: AnyArray) -> AnyArray:
        """The entries of pairs ``i n + j``, 0 where there is none."""
        xp = array_namespace(self.values)
        place, is_there = _find(codes, _codes(self.near))
        return xp.where(is_there, xp.reshape(self.values, (-1,))[place], 0.0)

    def within(self, other: _Kernel) -> _Kernel:
        """This one's entries where the other holds one too."""
        xp = array_namespace(self.values)
        _, is_there = _find(_codes(self.near), _codes(other.near))
        return _Kernel(self.near, xp.where(xp.reshape(is_there, self.values.shape), self.values, 0.0))


def _paper(x: AnyArray, y: AnyArray, near_x: AnyArray, near_y: AnyArray) -> float:
    k, m = _Kernel.of(x, centred(x), near_x), _Kernel.of(y, centred(y), near_y)
    xp = array_namespace(x)
    across = xp.sum(xp.reshape(k.values, (-1,)) * m.at(_codes(k.near)))
    norm = math.sqrt(xp.sum(k.values**2)) * math.sqrt(xp.sum(m.values**2))
    return float(across) / norm if norm > 0 else 0.0


def _platonic(x: AnyArray, y: AnyArray, near_x: AnyArray, near_y: AnyArray) -> float:
    k, m = _Kernel.of(x, x, near_x), _Kernel.of(y, y, near_y)
    product = _unbiased_hsic(k, k) * _unbiased_hsic(m, m)
    if product < 0:
        return math.nan
    return _unbiased_hsic(k.within(m), m.within(k)) / (math.sqrt(product) + _FLOOR)


def _unbiased_hsic(k: _Kernel, m: _Kernel) -> float:
    """HSIC_1 of sparse kernels whose diagonals are 0. ``tr(k m)`` meets ``k_ij`` with ``m_ji``: they need not be symmetric."""
    n, xp = len(k.near), array_namespace(k.values)
    mirrored = k.near * n + xp.arange(n, device=device(k.near))[:, None]
    trace = xp.sum(xp.reshape(k.values, (-1,)) * m.at(xp.reshape(mirrored, (-1,))))
    total = xp.sum(k.values) * xp.sum(m.values) / ((n - 1) * (n - 2))
    paths = xp.sum(k.values * xp.sum(m.values, axis=1)[k.near])
    return float(trace + total - 2 * paths / (n - 2)) / (n * (n - 3))


@dataclass(frozen=True)
class _Definition:
    value: Callable[[AnyArray, AnyArray, AnyArray, AnyArray], float]
    least_k: int


_DEFINITIONS = {"paper": _Definition(_paper, 1), "platonic": _Definition(_platonic, 2)}
