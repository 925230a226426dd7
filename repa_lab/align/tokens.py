"""Tokens with their grid, and the projector that maps them: no code in repa-lab infers ``(h, w)`` from ``sqrt(N)``."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from repa_lab.align.settings import ProjectorSettings

Grid = tuple[int, int]
_MLP = ProjectorSettings()


@dataclass(frozen=True)
class Tokens:
    """Patch tokens of images on a grid, or of clips on the same grid for every frame.

    Attributes:
        values: ``(B, N, D)``, row by row: token k is at ``(k // w, k % w)``. Those of a clip are frame by frame.
        grid: ``(h, w)`` with N = frames * h * w.
        frames: frames of a clip; 1 for an image.

    Raises:
        ValueError: ``values`` is not three-dimensional, or N differs from ``frames * h * w``.
    """

    values: torch.Tensor
    grid: Grid
    frames: int = 1

    def __post_init__(self) -> None:
        _require_grid(self.values, self.grid, self.frames)

    @property
    def dim(self) -> int:
        """The width D of a token."""
        return self.values.shape[-1]

    def resample(self, to: Grid) -> Tokens:
        """Return the tokens on the grid ``to``; see :func:`resample_tokens`."""
        images = self.as_images()
        return Tokens(resample_tokens(images.values, self.grid, to), to).as_clips(self.frames)

    def mean(self) -> Tokens:
        """Return the mean token of every frame ``(B, frames, D)``, in float32, on the grid ``(1, 1)``."""
        means = self.as_images().values.float().mean(dim=1, keepdim=True)
        return Tokens(means, (1, 1)).as_clips(self.frames)

    def to_map(self) -> torch.Tensor:
        """Return the tokens of images as a map ``(B, D, h, w)``."""
        feature_map: torch.Tensor = self.values.transpose(1, 2).unflatten(2, self.grid)
        return feature_map

    def as_images(self) -> Tokens:
        """Return every frame as an image of its own ``(B * frames, h * w, D)``, those of a clip in a row."""
        if self.frames == 1:
            return self
        return Tokens(self.values.reshape(-1, self.grid[0] * self.grid[1], self.dim), self.grid)

    def as_clips(self, frames: int) -> Tokens:
        """Return images ``(B * frames, N, D)`` as the frames of clips ``(B, frames * N, D)``."""
        if frames == 1:
            return self
        return Tokens(self.values.unflatten(0, (-1, frames)).flatten(1, 2), self.grid, frames)


def normalise_over_space(tokens: Tokens, strength: float) -> Tokens:
    """Normalise every channel over the tokens of its image, as iREPA: ``(y - strength * mean) / (std + 1e-6)``.

    What remains is how the patches of an image differ rather than what they share. iREPA uses a strength of 0.6 for
    latents and 0.8 for pixels; 1 is a z-score. Computed in float32, with the unbiased standard deviation, which a
    single token has not. Every frame of a clip is an image of its own.
    """
    images = tokens.as_images()
    if images.values.shape[1] < 2:
        raise ValueError("spatial normalisation compares tokens of one image; there is a single token")
    values = images.values.float()
    std, mean = torch.std_mean(values, dim=1, keepdim=True)
    return Tokens((values - strength * mean) / (std + 1e-6), tokens.grid).as_clips(tokens.frames)


def flatten_map(feature_map: torch.Tensor) -> Tokens:
    """Return a convolutional map ``(B, C, H, W)`` as tokens ``(B, H*W, C)``, row by row."""
    if feature_map.ndim != 4:
        raise ValueError(f"a feature map must be (B, C, H, W), got shape {tuple(feature_map.shape)}")
    height, width = feature_map.shape[-2:]
    return Tokens(feature_map.flatten(2).transpose(1, 2), (height, width))


def resample_tokens(tokens: torch.Tensor, grid: Grid, to: Grid) -> torch.Tensor:
    """Resample tokens bilinearly in two dimensions, with torch's ``align_corners=False``.

    ``(B, h*w, D)`` on the grid ``(h, w)`` become ``(B, H*W, D)`` on ``(H, W)``, in the input's dtype but computed in
    float32; if the grids are equal, the input itself is returned. Where a side shrinks more than twofold, the average
    over the area is taken (antialiasing): plain bilinear interpolation would skip tokens, which would learn nothing.

    Raises:
        ValueError: the tokens do not fill ``grid``, or a size is not positive.
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


def _require_grid(tokens: torch.Tensor, grid: Grid, frames: int = 1) -> None:
    if tokens.ndim != 3:
        raise ValueError(f"tokens must be (B, N, D), got shape {tuple(tokens.shape)}")
    if tokens.shape[1] != frames * grid[0] * grid[1]:
        per_frame = "" if frames == 1 else f" of {frames} frames"
        raise ValueError(f"{tokens.shape[1]} tokens do not fill the grid {grid[0]}x{grid[1]}{per_frame}")


class Projector(nn.Module):
    """Maps tokens ``(B, N, in_dim)`` to ``(B, N, out_dim)`` on the same grid.

    - ``mlp`` is REPA's: three linear layers of ``width`` with SiLU between and Xavier-uniform init, token by token (as
      in the papers' code; 7,344,896 parameters for 768 to 768).
    - ``linear`` is SimpleTuner's LayerNorm + Linear, with torch's init.
    - ``conv`` is iREPA's convolution over the grid, zero-padded, with torch's init.
    """

    def __init__(self, in_dim: int, out_dim: int, settings: ProjectorSettings = _MLP) -> None:
        super().__init__()
        self.net = nn.ModuleDict()
        if settings.type == "conv":
            self.net["conv"] = nn.Conv2d(in_dim, out_dim, settings.kernel, padding=settings.kernel // 2)
        elif settings.type == "linear":
            self.net["layers"] = nn.Sequential(nn.LayerNorm(in_dim), nn.Linear(in_dim, out_dim))
        else:
            widths = (in_dim, settings.width, settings.width, out_dim)
            first, second, third = (nn.Linear(*pair) for pair in itertools.pairwise(widths))
            for layer in (first, second, third):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
            self.net["layers"] = nn.Sequential(first, nn.SiLU(), second, nn.SiLU(), third)

    def forward(self, tokens: Tokens) -> Tokens:
        """Project tokens ``(B, N, in_dim)`` to ``(B, N, out_dim)`` on the same grid, in the dtype of the parameters."""
        images = tokens.as_images()
        values = images.values.to(next(self.net.parameters()).dtype)
        if "conv" in self.net:
            projected = flatten_map(self.net["conv"](Tokens(values, tokens.grid).to_map()))
        else:
            projected = Tokens(self.net["layers"](values), tokens.grid)
        return projected.as_clips(tokens.frames)
