"""The trainable map from the denoiser's width to the encoder's."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from repa_lab.align.settings import ProjectorSettings
from repa_lab.align.tokens import Grid, Tokens, flatten_map


class _Conv(nn.Module):
    """A convolution over the grid of the tokens."""

    def __init__(self, in_dim: int, out_dim: int, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_dim, out_dim, kernel, padding=kernel // 2)

    def forward(self, values: torch.Tensor, grid: Grid | None) -> torch.Tensor:
        if grid is None:
            raise ValueError("a conv projector needs the grid of its tokens")
        return flatten_map(self.conv(Tokens(values, grid).to_map())).values


class _TokenWise(nn.Module):
    """Layers that see every token alone."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, values: torch.Tensor, grid: Grid | None) -> torch.Tensor:
        projected: torch.Tensor = self.layers(values)
        return projected


def _mlp(in_dim: int, out_dim: int, width: int, kernel: int) -> nn.Module:
    layers = [nn.Linear(in_dim, width), nn.Linear(width, width), nn.Linear(width, out_dim)]
    for layer in layers:
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
    return _TokenWise(layers[0], nn.SiLU(), layers[1], nn.SiLU(), layers[2])


def _linear(in_dim: int, out_dim: int, width: int, kernel: int) -> nn.Module:
    return _TokenWise(nn.LayerNorm(in_dim), nn.Linear(in_dim, out_dim))


def _conv(in_dim: int, out_dim: int, width: int, kernel: int) -> nn.Module:
    return _Conv(in_dim, out_dim, kernel)


KINDS: dict[str, Callable[[int, int, int, int], nn.Module]] = {"mlp": _mlp, "linear": _linear, "conv": _conv}


_MLP = ProjectorSettings()


class Projector(nn.Module):
    """Maps tokens ``(B, N, in_dim)`` to ``(B, N, out_dim)`` and keeps their grid.

    ``mlp`` is REPA's: three linear layers of ``width`` with SiLU between and Xavier-uniform init, token by token (the
    papers' code; 7,344,896 parameters for 768 to 768). ``linear`` is SimpleTuner's LayerNorm + Linear. ``conv`` is
    iREPA's convolution over the grid with zeros around it, of an odd ``kernel`` so that tokens keep their places;
    torch's own init for both.

    Args:
        in_dim: the denoiser's width.
        out_dim: the encoder's width.
        settings: which map, and its sizes.
    """

    def __init__(self, in_dim: int, out_dim: int, settings: ProjectorSettings = _MLP) -> None:
        super().__init__()
        self.net = KINDS[settings.type](in_dim, out_dim, settings.width, settings.kernel)

    def forward(self, values: torch.Tensor, grid: Grid | None = None) -> torch.Tensor:
        """Project ``(B, N, in_dim)`` to ``(B, N, out_dim)``, in the dtype of the projector's parameters.

        Raises:
            ValueError: ``conv`` is not told the grid.
        """
        projected: torch.Tensor = self.net(values.to(next(self.net.parameters()).dtype), grid)
        return projected

    def project(self, tokens: Tokens) -> Tokens:
        """Project tokens ``(B, N, in_dim)`` to ``(B, N, out_dim)`` on the same grid; see :meth:`forward`."""
        return Tokens(self(tokens.values, tokens.grid), tokens.grid)
