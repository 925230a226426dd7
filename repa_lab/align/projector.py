"""The trainable map from the denoiser's width to the encoder's."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from repa_lab.align.tokens import Tokens


def _mlp(in_dim: int, out_dim: int, width: int) -> nn.Module:
    layers = [nn.Linear(in_dim, width), nn.Linear(width, width), nn.Linear(width, out_dim)]
    for layer in layers:
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(layers[0], nn.SiLU(), layers[1], nn.SiLU(), layers[2])


def _linear(in_dim: int, out_dim: int, width: int) -> nn.Module:
    return nn.Sequential(nn.LayerNorm(in_dim), nn.Linear(in_dim, out_dim))


KINDS: dict[str, Callable[[int, int, int], nn.Module]] = {"mlp": _mlp, "linear": _linear}


class Projector(nn.Module):
    """Maps tokens ``(B, N, in_dim)`` to ``(B, N, out_dim)``, token by token.

    ``mlp`` is REPA's: three linear layers of ``width`` with SiLU between and Xavier-uniform init (the papers' code; 7,344,896
    parameters for 768 to 768). ``linear`` is the guide's LayerNorm + Linear, which has no use for ``width``.

    Raises:
        ValueError: ``kind`` is unknown.
    """

    def __init__(self, in_dim: int, out_dim: int, width: int = 2048, kind: str = "mlp") -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"unknown projector {kind!r}; allowed: {', '.join(KINDS)}")
        self.net = KINDS[kind](in_dim, out_dim, width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Project ``(B, N, in_dim)`` to ``(B, N, out_dim)``, in the dtype of the projector's parameters."""
        projected: torch.Tensor = self.net(tokens.to(next(self.net.parameters()).dtype))
        return projected

    def project(self, tokens: Tokens) -> Tokens:
        """Project tokens and keep their grid."""
        return Tokens(self(tokens.values), tokens.grid)
