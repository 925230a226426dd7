"""Latents as the sequences that transformers take, and back. Imports no torch: it asks the tensors that it is given."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def pack(latents: torch.Tensor) -> torch.Tensor:
    """Patches of 2x2 as tokens: ``(B, C, 2h, 2w)`` to ``(B, h*w, 4C)``, their values in the order (channel, row, column)."""
    cut = latents.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # (B, C, h, 2, w, 2)
    packed: torch.Tensor = cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    return packed


def unpack(output: Any, latents: torch.Tensor) -> torch.Tensor:
    """The inverse of :func:`pack` for a prediction of the latents' shape."""
    batch, channels, height, width = latents.shape
    cut = output.reshape(batch, height // 2, width // 2, channels, 2, 2)
    latent: torch.Tensor = cut.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, height, width)
    return latent


def flatten(latents: torch.Tensor) -> torch.Tensor:
    """Every cell as a token: ``(B, C, h, w)`` to ``(B, h*w, C)``."""
    return latents.flatten(2).transpose(1, 2)


def unflatten(output: Any, latents: torch.Tensor) -> torch.Tensor:
    """The inverse of :func:`flatten` for a prediction of the latents' shape."""
    latent: torch.Tensor = output.transpose(1, 2).reshape(latents.shape)
    return latent


def positions(grid: tuple[int, int], axes: int, like: torch.Tensor) -> torch.Tensor:
    """Rotary positions ``(h*w, axes)`` of an image's tokens: row and column on the second and third axis, 0 on the others."""
    ids = like.new_zeros(*grid, axes)
    ids[..., 1] += like.new_tensor(range(grid[0])).unsqueeze(1)
    ids[..., 2] += like.new_tensor(range(grid[1]))
    return ids.flatten(0, 1)
