"""Tokens that carry their grid: nothing in the lab infers ``(h, w)`` from ``sqrt(N)``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

Grid = tuple[int, int]
_STD_FLOOR = 1e-6


@dataclass(frozen=True)
class Tokens:
    """Patch tokens ``values`` of shape ``(B, N, D)`` on the grid ``(h, w)``, row-major: token k stands at (k // w, k %
    w).

    Raises:
        ValueError: ``values`` is not three-dimensional or N differs from ``h * w``.
    """

    values: torch.Tensor
    grid: Grid

    def __post_init__(self) -> None:
        _require_grid(self.values, self.grid)

    @property
    def dim(self) -> int:
        """The width D of a token."""
        return self.values.shape[-1]

    def resample(self, to: Grid) -> Tokens:
        """The same tokens on the grid ``to``; see :func:`resample_tokens`."""
        return Tokens(resample_tokens(self.values, self.grid, to), to)

    def mean(self) -> Tokens:
        """The mean token ``(B, 1, D)``, in float32, on the grid ``(1, 1)``."""
        return Tokens(self.values.float().mean(dim=1, keepdim=True), (1, 1))

    def to_map(self) -> torch.Tensor:
        """The tokens as a map ``(B, D, h, w)``."""
        feature_map: torch.Tensor = self.values.transpose(1, 2).unflatten(2, self.grid)
        return feature_map


def normalise_over_space(tokens: Tokens, strength: float) -> Tokens:
    """Every channel of an image's tokens without ``strength`` times its mean over them, over its deviation: iREPA.

    ``(y - strength * mean) / (std + 1e-6)`` in float32, with the unbiased standard deviation over the N tokens: what is
    left is how an image's patches differ rather than what they share. 1 is a z-score; iREPA takes 0.6 for latents, 0.8
    for pixels.

    Raises:
        ValueError: there is a single token, which has no deviation.
    """
    if tokens.values.shape[1] < 2:
        raise ValueError("spatial normalisation compares tokens of one image; there is a single token")
    values = tokens.values.float()
    std, mean = torch.std_mean(values, dim=1, keepdim=True)
    return Tokens((values - strength * mean) / (std + _STD_FLOOR), tokens.grid)


def _require_grid(tokens: torch.Tensor, grid: Grid) -> None:
    if tokens.ndim != 3:
        raise ValueError(f"tokens must be (B, N, D), got shape {tuple(tokens.shape)}")
    if tokens.shape[1] != grid[0] * grid[1]:
        raise ValueError(f"{tokens.shape[1]} tokens do not fill the grid {grid[0]}x{grid[1]}")


def flatten_map(feature_map: torch.Tensor) -> Tokens:
    """A convolutional map ``(B, C, H, W)`` as tokens ``(B, H*W, C)``, row-major.

    Raises:
        ValueError: the map is not four-dimensional.
    """
    if feature_map.ndim != 4:
        raise ValueError(f"a feature map must be (B, C, H, W), got shape {tuple(feature_map.shape)}")
    height, width = feature_map.shape[-2:]
    return Tokens(feature_map.flatten(2).transpose(1, 2), (height, width))


def resample_tokens(tokens: torch.Tensor, grid: Grid, to: Grid) -> torch.Tensor:
    """Resample tokens ``(B, h*w, D)`` on ``grid=(h, w)`` to ``(B, H*W, D)`` on ``to=(H, W)``, bilinear in two
    dimensions.

    Pixel-area convention (``align_corners=False``), interpolated in float32 and returned in the input's dtype. Equal
    grids return the input itself; equal counts on different grids are resampled. Where a side shrinks more than
    twofold, bilinear interpolation would skip tokens, which then learn nothing: there the average over the area is
    taken (antialiasing).

    Raises:
        ValueError: the tokens do not fill ``grid`` or a size is not positive.
    """
    _require_grid(tokens, grid)
    if min(to) < 1:
        raise ValueError(f"cannot resample to the grid {to[0]}x{to[1]}")
    if tuple(grid) == tuple(to):
        return tokens
    feature_map = tokens.transpose(1, 2).unflatten(2, grid).float()
    skips = any(source > 2 * target for source, target in zip(grid, to, strict=True))
    resampled = functional.interpolate(feature_map, tuple(to), mode="bilinear", align_corners=False, antialias=skips)
    return resampled.flatten(2).transpose(1, 2).to(tokens.dtype)
