"""Spatial structure of an image's tokens: the metrics of iREPA, as defined by its code.

Cosines are between two tokens of one image; distances are Manhattan distances on the token grid. A token of length 0
has cosine 0 with every other. The grid is explicit and may be non-square; iREPA measures on 16 x 16.
"""

from __future__ import annotations

import torch

from repa_lab.metrics.alignment import float64, require_finite, unit

Grid = tuple[int, int]


def lds(tokens: torch.Tensor, grid: Grid, far: int = 6) -> float:
    """Return the local-to-distant similarity: mean cosine at distance 1 minus mean cosine at distance ``far`` or more.

    The mean over images. iREPA's text speaks of a near radius; its code, as here, takes the four neighbours.

    Args:
        tokens: ``(B, h * w, D)``, row-major, without class or register tokens.
        grid: ``(h, w)``.
        far: smallest distance that counts as distant, 2 <= far <= h + w - 2.

    Returns:
        0 for a constant map; larger where near tokens agree more than distant ones.

    Raises:
        ValueError: the tokens do not fill the grid or are not finite, or the grid has no pair that far apart.
    """
    cosines, distance = _mean_cosines(tokens, grid)
    farthest = grid[0] + grid[1] - 2
    if not 2 <= far <= farthest:
        allowed = f"give 2 <= far <= {farthest}, got {far}"
        raise ValueError(f"tokens on the grid {grid[0]}x{grid[1]} are at most {farthest} apart: {allowed}")
    return float(cosines[distance == 1].mean() - cosines[distance >= far].mean())


def cds(tokens: torch.Tensor, grid: Grid, farthest: int = 8) -> float:
    """Return the correlation decay slope: minus the slope of mean cosine over the distances 1 to ``farthest``.

    iREPA's code: a least-squares line in which each distance counts once, however many pairs it has; a smaller grid is
    fitted over the distances that it has. The mean over images, in cosine per token.

    Args:
        tokens: ``(B, h * w, D)``, row-major, without class or register tokens.
        grid: ``(h, w)`` with at least two distances: h + w >= 4.
        farthest: largest distance of the fit, at least 2.

    Returns:
        0 for a constant map; positive where the cosine falls with distance.

    Raises:
        ValueError: the tokens do not fill the grid or are not finite, or there are fewer than two distances.
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

    The mean over images. The order of tokens does not matter; ``grid`` checks that there are no class or register
    tokens among them.

    Args:
        tokens: ``(B, h * w, D)``, without class or register tokens.
        grid: ``(h, w)``.

    Returns:
        Between 0, for a constant map, and 1.

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
    require_finite(tokens, "tokens")
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
