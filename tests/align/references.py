"""The losses and the resampling in NumPy float64, written from the papers, and what a training step takes of a regularizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from repa_lab.align import Signals, Tokens

Array = NDArray[np.float64]


def unit(tokens: Array) -> Array:
    length = np.sqrt((tokens**2).sum(-1, keepdims=True))
    return np.divide(tokens, length, out=np.zeros_like(tokens), where=length > 0)


def alignment(student: Array, teacher: Array) -> float:
    """REPA, section 3.2."""
    total = 0.0
    for s, t in zip(unit(student), unit(teacher), strict=True):
        total += sum(float(s[n] @ t[n]) for n in range(len(s))) / len(s)
    return -total / len(student)


def manifold(student: Array, teacher: Array) -> float:
    """U-REPA, Eqs. 3-4, with the sign and the mean that make sense of them."""
    images = []
    for s, t in zip(unit(student), unit(teacher), strict=True):
        images.append((((s @ s.T) - (t @ t.T)) ** 2).mean())
    return float(np.mean(images))


def nt_xent(student: Array, teacher: Array, temperature: float = 0.1) -> float:
    """SimCLR's cross-entropy, with the teacher's tokens of the same image as candidates."""
    total = []
    for s, t in zip(unit(student), unit(teacher), strict=True):
        for n in range(len(s)):
            logits = t @ s[n] / temperature
            total.append(np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[n])
    return float(np.mean(total))


def gradient(loss: Callable[[Array, Array], float], student: Array, teacher: Array, step: float = 1e-5) -> Array:
    """Central differences of a loss in the student."""
    result = np.zeros_like(student)
    for index in np.ndindex(*student.shape):
        up, down = student.copy(), student.copy()
        up[index] += step
        down[index] -= step
        result[index] = (loss(up, teacher) - loss(down, teacher)) / (2 * step)
    return result


def bilinear(tokens: Array, grid: tuple[int, int], to: tuple[int, int]) -> Array:
    """Separable linear interpolation between pixel centres, edges held: ``(B, h*w, D)`` to ``(B, H*W, D)``."""
    rows, columns = (_weights(n, m) for n, m in zip(grid, to, strict=True))
    maps = tokens.reshape(len(tokens), *grid, -1)
    return np.einsum("ih,jw,bhwd->bijd", rows, columns, maps).reshape(len(tokens), to[0] * to[1], -1)


def _weights(source: int, target: int) -> Array:
    weights = np.zeros((target, source))
    for i in range(target):
        centre = min(max((i + 0.5) * source / target - 0.5, 0), source - 1)
        left = int(np.floor(centre))
        right = min(left + 1, source - 1)
        weights[i, left] += 1 - (centre - left)
        weights[i, right] += centre - left
    return weights


def antialiased(tokens: Array, grid: tuple[int, int], to: tuple[int, int]) -> Array:
    """As :func:`bilinear`, the triangle widened by the factor of shrinking, and what falls outside left out."""
    rows, columns = (_wide_weights(n, m) for n, m in zip(grid, to, strict=True))
    maps = tokens.reshape(len(tokens), *grid, -1)
    return np.einsum("ih,jw,bhwd->bijd", rows, columns, maps).reshape(len(tokens), to[0] * to[1], -1)


def _wide_weights(source: int, target: int) -> Array:
    scale = source / target
    centres = (np.arange(target)[:, None] + 0.5) * scale
    distance = np.abs(np.arange(source)[None] + 0.5 - centres) / max(scale, 1.0)
    weights = np.clip(1 - distance, 0, None)
    return weights / weights.sum(axis=1, keepdims=True)


class Aligned(NamedTuple):
    """What a training step adds and logs: the weighted loss, the weight, the mean cosine, and the manifold loss if any."""

    loss: torch.Tensor
    weight: float
    cosine: torch.Tensor
    manifold: torch.Tensor | None


def align(
    regularizer: Any, student: Tokens, teacher: Tokens | Sequence[Tokens], step: int = 0, module: Any = None
) -> Aligned:
    """Return the outcome of one step; ``module`` is what wraps the regularizer, as DistributedDataParallel does."""
    signals = Signals(taps=(student,), encoders=(teacher,) if isinstance(teacher, Tokens) else tuple(teacher))
    weight, loss = regularizer.weight_at(step), (regularizer if module is None else module)(signals, step)
    return Aligned(weight * loss.value, weight, loss.parts["cosine"], loss.parts.get("manifold"))
