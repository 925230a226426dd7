"""What the metrics take in, read as float64: NumPy arrays, and torch tensors of any type.

Functions of features and tokens compute where these lie: a tensor on a GPU by torch on that GPU, all else by NumPy on
the host, which reads a tensor there in place. They are written once, in the functions of the array API standard
(``array_api_compat``). torch is not imported here: a tensor brings its own methods.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import numpy as np
from array_api_compat import array_namespace, device, is_torch_array
from numpy.typing import ArrayLike, NDArray

# A NumPy array, or a tensor on its device: what the standard's functions take. It has no type of its own yet.
AnyArray: TypeAlias = Any
Array = NDArray[np.float64]
_ZERO_NORM = 1e-12
_BY_NUMPY = ("cpu", "mps")  # Apple's GPUs know no float64


def as_array(values: ArrayLike) -> Array:
    """An array or tensor as float64 on the host.

    Half precision is widened before anything is computed; a tensor that asks for gradients is detached.
    """
    return np.asarray(on_host(values, "double"), dtype=np.float64)


def on_host(values: Any, cast: str = "clone") -> Any:
    """A tensor as a NumPy array after the named method of its own; anything else as it is."""
    return getattr(values.detach().cpu(), cast)().numpy() if is_torch_array(values) else values


def as_float64(values: ArrayLike) -> AnyArray:
    """float64: a tensor on a GPU there, all else on the host."""
    if is_torch_array(values) and values.device.type not in _BY_NUMPY:
        return values.detach().double()
    return as_array(values)


def alongside(values: Any, other: AnyArray) -> AnyArray:
    """``values`` where ``other`` lies: an array becomes a tensor, a tensor moves to the other's device."""
    if is_torch_array(values) and not is_torch_array(other):
        values = on_host(values)
    return array_namespace(other).asarray(values, device=device(other))


def both(x: ArrayLike, y: ArrayLike) -> tuple[AnyArray, AnyArray]:
    """Two sides as float64 in one place: on the GPU if one of them is there, on that of ``x`` if they are on two."""
    a, b = as_float64(x), as_float64(y)
    return (alongside(a, b), b) if is_torch_array(b) and not is_torch_array(a) else (a, alongside(b, a))


def features(x: ArrayLike, least: int, name: str = "x") -> AnyArray:
    """Features ``(n, d)`` of at least ``least`` items.

    Raises:
        ValueError: another shape, or values that are not finite.
    """
    a = as_float64(x)
    if a.ndim != 2 or len(a) < least or a.shape[1] == 0:
        raise ValueError(f"need features {name} of shape (n >= {least}, d), one pooled vector an item, got {shape(a)}")
    require_finite(a, name)
    return a


def paired_features(x: ArrayLike, y: ArrayLike, least: int) -> tuple[AnyArray, AnyArray]:
    """Features ``(n, d1)`` and ``(n, d2)`` of the same n items.

    Raises:
        ValueError: other shapes, different or too few items, or values that are not finite.
    """
    a, b = both(x, y)
    if a.ndim != 2 or b.ndim != 2 or len(a) != len(b) or len(a) < least or 0 in (*a.shape, *b.shape):
        need = f"need features (n >= {least}, d1) and (n, d2) of the same items, one pooled vector an item"
        raise ValueError(f"{need}, got {shape(a)} and {shape(b)}")
    require_finite(a, "x")
    require_finite(b, "y")
    return a, b


def shape(a: AnyArray) -> tuple[int, ...]:
    """To be printed: a tensor's has a name of its own."""
    return tuple(a.shape)


def require_finite(a: AnyArray, name: str) -> None:
    """Refuse NaN and infinity.

    Raises:
        ValueError: names the first item that holds one.
    """
    xp = array_namespace(a)
    bad = xp.nonzero(~xp.all(xp.reshape(xp.isfinite(a), (len(a), -1)), axis=1))[0]
    if len(bad):
        where = f"{len(bad)} of {len(a)} items, the first at index {int(bad[0])}"
        raise ValueError(
            f"{name}: features are not finite ({where}): leave these items out on every side, or use float32"
        )


def centred(a: AnyArray) -> AnyArray:
    """``a`` less its mean over items; a column that is constant becomes 0 and not the rounding of its mean."""
    xp = array_namespace(a)
    return xp.where(xp.max(a, axis=0) > xp.min(a, axis=0), a - xp.mean(a, axis=0), 0.0)


def unit(a: AnyArray) -> AnyArray:
    """Vectors along the last axis at length 1; vectors of length 0 stay 0."""
    xp = array_namespace(a)
    norm = xp.linalg.vector_norm(a, axis=-1, keepdims=True)
    return a / xp.where(norm > _ZERO_NORM, norm, math.inf)


def spread(a: AnyArray) -> tuple[AnyArray, AnyArray]:
    """Mean and standard deviation ``(d,)`` of columns; the deviation is 1 where it is no more than the rounding of the
    mean.

    Dividing by it then leaves a constant column at its rounding, rather than at noise of length 1.
    """
    xp = array_namespace(a)
    mean = xp.mean(a, axis=0)
    variance = xp.mean(xp.square(a - mean), axis=0)
    rounding = len(a) * float(xp.finfo(a.dtype).eps)
    is_constant = variance <= rounding * variance + xp.square(rounding * mean)
    return mean, xp.where(is_constant, 1.0, xp.sqrt(variance))


def largest(a: AnyArray, k: int) -> AnyArray:
    """Indices ``(n, k)`` of the k largest values of each row of ``(n, m)``, in any order: the standard has only sorting."""
    return a.topk(k, dim=1, sorted=False).indices if is_torch_array(a) else np.argpartition(a, -k, axis=1)[:, -k:]


def value_of_rank(a: AnyArray, rank: int) -> float:
    """The value that stands at ``rank``, counted from 0, when all are sorted."""
    flat = a.reshape(-1)
    return float(flat.kthvalue(rank + 1).values if is_torch_array(flat) else np.partition(flat, rank)[rank])


def scaled_to_one(a: AnyArray) -> AnyArray:
    """``a`` times the power of two, which alters no digit, that brings its largest absolute value to [0.5, 1)."""
    xp = array_namespace(a)
    exponent = -math.frexp(float(xp.max(xp.abs(a))))[1]
    half = exponent // 2  # in two parts, for of a float the power alone might overflow
    return a * math.ldexp(1.0, half) * math.ldexp(1.0, exponent - half)
