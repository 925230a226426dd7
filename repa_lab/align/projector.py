"""The trainable map from the denoiser's width to the encoder's."""

from __future__ import annotations

import itertools

import torch
from torch import nn

from repa_lab.align.settings import ProjectorSettings
from repa_lab.align.tokens import Grid, Tokens, flatten_map

_MLP = ProjectorSettings()


class Projector(nn.Module):
    """Maps tokens ``(B, N, in_dim)`` to ``(B, N, out_dim)`` on the same grid.

    - ``mlp`` is REPA's: three linear layers of ``width`` with SiLU between and Xavier-uniform init, token by token (as
      in the papers' code; 7,344,896 parameters for 768 to 768).
    - ``linear`` is SimpleTuner's LayerNorm + Linear, with torch's init.
    - ``conv`` is iREPA's convolution over the grid, zero-padded, with torch's init; ``kernel`` is odd, so that tokens
      keep their places.

    Args:
        in_dim: the denoiser's width.
        out_dim: the encoder's width.
        settings: the type of the map, and its sizes.
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

    def forward(self, values: torch.Tensor, grid: Grid | None = None) -> torch.Tensor:
        """Project ``(B, N, in_dim)`` to ``(B, N, out_dim)``, in the dtype of the projector's parameters.

        Raises:
            ValueError: ``conv`` is used without the grid.
        """
        values = values.to(next(self.net.parameters()).dtype)
        if "conv" not in self.net:
            projected: torch.Tensor = self.net["layers"](values)
            return projected
        if grid is None:
            raise ValueError("a conv projector needs the grid of its tokens")
        return flatten_map(self.net["conv"](Tokens(values, grid).to_map())).values

    def project(self, tokens: Tokens) -> Tokens:
        """Project tokens ``(B, N, in_dim)`` to ``(B, N, out_dim)`` on the same grid, every frame alike."""
        images = tokens.as_images()
        return Tokens(self(images.values, tokens.grid), tokens.grid).as_clips(tokens.frames)
