"""How tokens differ over an image: the spatial metrics of iREPA, by the definitions of its code.

Cosines are those of two tokens of one image; distances are Manhattan distances on the token grid. A token of length 0
has cosine 0 with every other. The grid is given and may be non-square; iREPA measures on 16 x 16.
"""

from __future__ import annotations

import math

import numpy as np
from array_api_compat import array_namespace
from numpy.typing import ArrayLike

from repa_lab.metrics.arrays import AnyArray, alongside, as_float64, require_finite, shape, unit

Grid = tuple[int, int]


def lds(tokens: ArrayLike, grid: Grid, far: int = 6) -> float:
    """Local-to-distant similarity: mean cosine of pairs at distance 1 less that of pairs at distance ``far`` or more.

    iREPA's code; its text speaks of a near radius, its code takes the four neighbours. The mean over images.

    Args:
        tokens: ``(B, h * w, D)``, row-major, without class or register tokens.
        grid: ``(h, w)``.
        far: smallest distance that is far, 2 <= far <= h + w - 2.

    Returns:
        0 for a constant map; larger where near tokens agree more than distant ones.

    Raises:
        ValueError: the tokens do not fill the grid or are not finite, or the grid has no pair that far apart.
    """
    u = _unit_tokens(tokens, grid)
    distance, gram = _require_far(grid, far, u), _mean_gram(u)
    return float(gram[distance == 1].mean() - gram[distance >= far].mean())


def cds(tokens: ArrayLike, grid: Grid, farthest: int = 8) -> float:
    """Correlation-decay slope: minus the slope of mean cosine over distance, fitted by least squares to d =
    1..``farthest``.

    iREPA's code: each distance counts once, however many pairs it has, and a grid that has fewer distances is fitted to
    those it has. The mean over images, in cosine per token.

    Args:
        tokens: ``(B, h * w, D)``, row-major, without class or register tokens.
        grid: ``(h, w)`` with at least two distances: h + w >= 4.
        farthest: largest distance of the fit, at least 2.

    Returns:
        0 for a constant map; positive where the cosine falls with distance.

    Raises:
        ValueError: the tokens do not fill the grid or are not finite, or there are not two distances to fit a line to.
    """
    u = _unit_tokens(tokens, grid)
    distance, gram = _distances(grid, u), _mean_gram(u)
    steps = np.arange(1, min(farthest, int(distance.max())) + 1)
    if len(steps) < 2:
        raise ValueError(
            f"a slope needs two distances: give farthest >= 2 and h + w >= 4, got {farthest} and the grid {grid}"
        )
    means = np.array([float(gram[distance == int(step)].mean()) for step in steps])
    away = steps - steps.mean()
    return float(-(away @ means) / (away @ away))


def rmsc(tokens: ArrayLike, grid: Grid) -> float:
    """RMS spatial contrast: the root of the mean squared distance of an image's unit tokens from their mean.

    iREPA. The mean over images. The value depends on no place; ``grid`` holds the tokens to be patches and nothing
    else.

    Args:
        tokens: ``(B, h * w, D)``, without class or register tokens.
        grid: ``(h, w)``.

    Returns:
        Between 0, for a constant map, and 1.

    Raises:
        ValueError: the tokens do not fill the grid or are not finite.
    """
    u = _unit_tokens(tokens, grid)
    xp = array_namespace(u)
    rest = u - xp.mean(u, axis=1, keepdims=True)
    return float(xp.mean(xp.sqrt(xp.mean(xp.sum(rest**2, axis=-1), axis=-1))))


def srss(tokens: ArrayLike, grid: Grid, mask: ArrayLike, far: int = 6) -> float:
    """Semantic-region self-similarity: how much more foreground agrees with foreground beside it than with far
    background.

    For each foreground token, the mean cosine with foreground tokens at distance 1 less that with background tokens at
    distance ``far`` or more; the mean over the tokens that have both, then over the images that have such a token.
    iREPA's code; it keeps images with at least 64 patches of either kind, and that choice is the caller's.

    Args:
        tokens: ``(B, h * w, D)``, row-major, without class or register tokens.
        grid: ``(h, w)``.
        mask: ``(B, h * w)``, non-zero in the foreground; of iREPA, an image's mask max-pooled to the grid.
        far: smallest distance that is far, 2 <= far <= h + w - 2.

    Raises:
        ValueError: tokens, mask and grid do not fit, values are not finite, or no image has a token to compare.
    """
    u = _unit_tokens(tokens, grid)
    distance, foreground = _require_far(grid, far, u), alongside(mask, u) != 0
    if foreground.shape != u.shape[:2]:
        raise ValueError(f"need a mask (B, N) = {shape(u)[:2]} like the tokens, got {shape(foreground)}")
    pairs = zip(range(len(u)), foreground, strict=True)
    values = [
        value for image, inside in pairs if not math.isnan(value := _contrast(u[image, ...], inside, distance, far))
    ]
    if not values:
        raise ValueError(
            f"no image has a foreground token beside another and {far} or more from background; check the masks"
        )
    return sum(values) / len(values)


def _contrast(u: AnyArray, inside: AnyArray, distance: AnyArray, far: int) -> float:
    """SRSS of one image; NaN if it has no token to compare."""
    xp = array_namespace(u)
    gram = u[inside] @ u.T
    beside = (distance[inside] == 1) & inside
    opposite = (distance[inside] >= far) & ~inside
    counts = xp.sum(beside, axis=1), xp.sum(opposite, axis=1)
    valid = (counts[0] > 0) & (counts[1] > 0)
    if not xp.any(valid):
        return math.nan
    near, distant = (xp.sum(gram * pairs, axis=1)[valid] for pairs in (beside, opposite))
    return float(xp.mean(near / counts[0][valid] - distant / counts[1][valid]))


def _unit_tokens(tokens: ArrayLike, grid: Grid) -> AnyArray:
    a = as_float64(tokens)
    if a.ndim != 3 or 0 in a.shape:
        raise ValueError(f"need tokens (B, N, D), got {shape(a)}")
    if a.shape[1] != grid[0] * grid[1] or min(grid) < 1:
        fix = "give the (h, w) of the patches, and leave class and register tokens out"
        raise ValueError(f"{a.shape[1]} tokens do not fill the grid {grid[0]}x{grid[1]}: {fix}")
    require_finite(a, "tokens")
    return unit(a)


def _mean_gram(u: AnyArray) -> AnyArray:
    """Cosines ``(N, N)`` of places, averaged over images: one product, since the sum over images is one over channels too."""
    xp = array_namespace(u)
    flat = xp.reshape(xp.permute_dims(u, (1, 0, 2)), (u.shape[1], -1))
    return flat @ flat.T / len(u)


def _distances(grid: Grid, u: AnyArray) -> AnyArray:
    """Of all pairs of places, where the tokens lie."""
    row, column = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    return alongside(np.abs(row[:, None] - row) + np.abs(column[:, None] - column), u)


def _require_far(grid: Grid, far: int, u: AnyArray) -> AnyArray:
    h, w = grid
    farthest = h + w - 2
    if not 2 <= far <= farthest:
        raise ValueError(
            f"tokens on the grid {h}x{w} are at most {farthest} apart: give 2 <= far <= {farthest}, got {far}"
        )
    return _distances(grid, u)
