"""What the metrics take in: NumPy arrays and torch tensors of any type, read as float64 on the host."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
_ZERO_NORM = 1e-12


def as_array(values: ArrayLike) -> Array:
    """An array or tensor as float64 on the host. torch is not imported here: a tensor brings its own methods.

    Half precision is widened before anything is computed; a tensor that asks for gradients is detached.
    """
    return np.asarray(on_host(values, "double"), dtype=np.float64)


def on_host(values: Any, cast: str = "clone") -> Any:
    """A tensor as a NumPy array after the named method of its own; anything else as it is."""
    return getattr(values.detach().cpu(), cast)().numpy() if hasattr(values, "detach") else values


def features(x: ArrayLike, least: int, name: str = "x") -> Array:
    """Features ``(n, d)`` of at least ``least`` items.

    Raises:
        ValueError: another shape, or values that are not finite.
    """
    a = as_array(x)
    if a.ndim != 2 or len(a) < least or a.shape[1] == 0:
        raise ValueError(f"need features {name} of shape (n >= {least}, d), one pooled vector an item, got {a.shape}")
    require_finite(a, name)
    return a


def paired_features(x: ArrayLike, y: ArrayLike, least: int) -> tuple[Array, Array]:
    """Features ``(n, d1)`` and ``(n, d2)`` of the same n items.

    Raises:
        ValueError: other shapes, different or too few items, or values that are not finite.
    """
    a, b = as_array(x), as_array(y)
    if a.ndim != 2 or b.ndim != 2 or len(a) != len(b) or len(a) < least or 0 in (*a.shape, *b.shape):
        need = f"need features (n >= {least}, d1) and (n, d2) of the same items, one pooled vector an item"
        raise ValueError(f"{need}, got {a.shape} and {b.shape}")
    require_finite(a, "x")
    require_finite(b, "y")
    return a, b


def require_finite(a: Array, name: str) -> None:
    """Refuse NaN and infinity.

    Raises:
        ValueError: names the first item that holds one.
    """
    bad = np.flatnonzero(~np.isfinite(a).reshape(len(a), -1).all(axis=1))
    if len(bad):
        where = f"{len(bad)} of {len(a)} items, the first at index {bad[0]}"
        raise ValueError(f"{name}: features are not finite ({where}): leave these items out on every side, or use float32")


def centred(a: Array) -> Array:
    """``a`` less its mean over items; a column that is constant becomes 0 and not the rounding of its mean."""
    return np.where(a.max(axis=0) > a.min(axis=0), a - a.mean(axis=0), 0.0)


def unit(a: Array) -> Array:
    """Vectors along the last axis at length 1; vectors of length 0 stay 0."""
    norm = np.linalg.norm(a, axis=-1, keepdims=True)
    return a / np.where(norm > _ZERO_NORM, norm, np.inf)
