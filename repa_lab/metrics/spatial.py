"""How tokens differ over an image: the spatial metrics of iREPA, by the definitions of its code.

Cosines are those of two tokens of one image; distances are Manhattan distances on the token grid. A token of length 0 has
cosine 0 with every other. The grid is given and may be non-square; iREPA measures on 16 x 16.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from repa_lab.metrics.arrays import Array, as_array, on_host, require_finite, unit

Grid = tuple[int, int]
Distances = NDArray[np.int64]


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
    distance = _require_far(grid, far)
    gram = _mean_gram(u)
    return float(gram[distance == 1].mean() - gram[distance >= far].mean())


def cds(tokens: ArrayLike, grid: Grid, farthest: int = 8) -> float:
    """Correlation-decay slope: minus the slope of mean cosine over distance, fitted by least squares to d = 1..``farthest``.

    iREPA's code: each distance counts once, however many pairs it has, and a grid that has fewer distances is fitted to those
    it has. The mean over images, in cosine per token.

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
    distance, gram = _distances(grid), _mean_gram(u)
    steps = np.arange(1, min(farthest, int(distance.max())) + 1)
    if len(steps) < 2:
        raise ValueError(f"a slope needs two distances: give farthest >= 2 and h + w >= 4, got {farthest} and the grid {grid}")
    means = np.array([gram[distance == step].mean() for step in steps])
    away = steps - steps.mean()
    return float(-(away @ means) / (away @ away))


def rmsc(tokens: ArrayLike, grid: Grid) -> float:
    """RMS spatial contrast: the root of the mean squared distance of an image's unit tokens from their mean.

    iREPA. The mean over images. The value depends on no place; ``grid`` holds the tokens to be patches and nothing else.

    Args:
        tokens: ``(B, h * w, D)``, without class or register tokens.
        grid: ``(h, w)``.

    Returns:
        Between 0, for a constant map, and 1.

    Raises:
        ValueError: the tokens do not fill the grid or are not finite.
    """
    u = _unit_tokens(tokens, grid)
    rest = u - u.mean(axis=1, keepdims=True)
    return float(np.sqrt(np.square(rest).sum(axis=-1).mean(axis=-1)).mean())


def srss(tokens: ArrayLike, grid: Grid, mask: ArrayLike, far: int = 6) -> float:
    """Semantic-region self-similarity: how much more foreground agrees with foreground beside it than with far background.

    For each foreground token, the mean cosine with foreground tokens at distance 1 less that with background tokens at distance
    ``far`` or more; the mean over the tokens that have both, then over the images that have such a token. iREPA's code; it
    keeps images with at least 64 patches of either kind, and that choice is the caller's.

    Args:
        tokens: ``(B, h * w, D)``, row-major, without class or register tokens.
        grid: ``(h, w)``.
        mask: ``(B, h * w)``, non-zero in the foreground; of iREPA, an image's mask max-pooled to the grid.
        far: smallest distance that is far, 2 <= far <= h + w - 2.

    Raises:
        ValueError: tokens, mask and grid do not fit, values are not finite, or no image has a token to compare.
    """
    u = _unit_tokens(tokens, grid)
    distance = _require_far(grid, far)
    foreground = np.asarray(on_host(mask)) != 0
    if foreground.shape != u.shape[:2]:
        raise ValueError(f"need a mask (B, N) = {u.shape[:2]} like the tokens, got {foreground.shape}")
    values = np.concatenate([[_contrast(image, inside, distance, far)] for image, inside in zip(u, foreground, strict=True)])
    if np.isnan(values).all():
        raise ValueError(f"no image has a foreground token beside another and {far} or more from background; check the masks")
    return float(np.nanmean(values))


def _contrast(u: Array, inside: NDArray[np.bool_], distance: Distances, far: int) -> float:
    """SRSS of one image; NaN if it has no token to compare."""
    gram = u[inside] @ u.T
    beside = (distance[inside] == 1) & inside
    opposite = (distance[inside] >= far) & ~inside
    counts = beside.sum(axis=1), opposite.sum(axis=1)
    valid = (counts[0] > 0) & (counts[1] > 0)
    if not valid.any():
        return float("nan")
    means = [(gram * pairs).sum(axis=1)[valid] / count[valid] for pairs, count in zip((beside, opposite), counts, strict=True)]
    return float((means[0] - means[1]).mean())


def _unit_tokens(tokens: ArrayLike, grid: Grid) -> Array:
    a = as_array(tokens)
    if a.ndim != 3 or 0 in a.shape:
        raise ValueError(f"need tokens (B, N, D), got {a.shape}")
    if a.shape[1] != grid[0] * grid[1] or min(grid) < 1:
        fix = "give the (h, w) of the patches, and leave class and register tokens out"
        raise ValueError(f"{a.shape[1]} tokens do not fill the grid {grid[0]}x{grid[1]}: {fix}")
    require_finite(a, "tokens")
    return unit(a)


def _mean_gram(u: Array) -> Array:
    """Cosines ``(N, N)`` of places, averaged over images: one product, since the sum over images is one over channels too."""
    flat = u.transpose(1, 0, 2).reshape(u.shape[1], -1)
    return flat @ flat.T / len(u)


def _distances(grid: Grid) -> Distances:
    row, column = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    distances: Distances = np.abs(row[:, None] - row) + np.abs(column[:, None] - column)
    return distances


def _require_far(grid: Grid, far: int) -> Distances:
    h, w = grid
    farthest = h + w - 2
    if not 2 <= far <= farthest:
        raise ValueError(f"tokens on the grid {h}x{w} are at most {farthest} apart: give 2 <= far <= {farthest}, got {far}")
    return _distances(grid)
