"""SRA2: the clean latents teach."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch.nn import functional

from repa_lab.align.methods.settings import (
    SRA2Settings,
)
from repa_lab.align.projector import Projector
from repa_lab.align.regularizer import Loss, Regularizer, Shapes, Signals
from repa_lab.align.settings import RegularizerSettings
from repa_lab.align.tokens import Grid, Tokens, flatten_map


class SRA2(Regularizer):
    """SRA2 (2601.17830): ``mean_bnk smooth_l1(P(h)_bnk - z_bnk)`` with ``beta`` 0.05.

    ``z_bn`` are the latents of the square of cells of token n; ``smooth_l1(d)`` is ``d^2 / (2 beta)`` where
    ``|d| < beta``, else ``|d| - beta / 2``. With ``normalize`` the latents of every image have mean 0 and standard
    deviation 1 over all of their values; the paper takes them as the VAE gives them. Users of ports saw a loss of 60
    beside a denoising loss of 0.06: the part ``ratio`` is the loss over the mean squared error of the prediction.
    """

    Settings: ClassVar[type[RegularizerSettings]] = SRA2Settings
    settings: SRA2Settings

    def __init__(self, settings: SRA2Settings, shapes: Shapes) -> None:
        super().__init__(settings, shapes)
        (width,), (stride,) = shapes.taps, shapes.strides
        self.projector = Projector(width, shapes.latents * stride**2, settings.projector)

    def forward(self, signals: Signals, step: int = 0) -> Loss:
        """Return the smooth L1 loss; its ratio to the denoising loss is a part.

        Args:
            signals: one tap ``(B, N, D)``, the latents ``(B, C, H, W)``, or of clips, and the prediction.
            step: optimizer steps already taken.

        Raises:
            ValueError: the tokens' grid does not divide the latents.
        """
        (student,), latents, prediction = signals.taps, signals.latents, signals.prediction
        assert latents is not None
        assert prediction is not None
        target = latents_of_tokens(_standardize(latents) if self.settings.normalize else latents.float(), student.grid)
        projected = self.projector.project(student).values.float()
        value = functional.smooth_l1_loss(projected, target.values, beta=self.settings.beta)
        with torch.no_grad():
            denoising = functional.mse_loss(prediction.output.float(), prediction.target.float())
            ratio = value / denoising.clamp_min(torch.finfo(torch.float32).tiny)
        return Loss(value, {"ratio": ratio})


def latents_of_tokens(latents: torch.Tensor, grid: Grid) -> Tokens:
    """Return for every token of a grid the latents of its square of cells, ``(B, h * w, C * s * s)``; clips by frame.

    Args:
        latents: ``(B, C, H, W)``, or of clips ``(B, C, F, H, W)``.
        grid: ``(h, w)`` with H = s * h and W = s * w.

    Raises:
        ValueError: the grid does not divide the latents.
    """
    if latents.ndim == 5:
        return latents_of_tokens(latents.transpose(1, 2).flatten(0, 1), grid).as_clips(latents.shape[2])
    height, width = latents.shape[-2:]
    stride = height // grid[0]
    if (grid[0] * stride, grid[1] * stride) != (height, width):
        raise ValueError(f"a grid of {grid[0]}x{grid[1]} tokens does not divide latents of {height}x{width}")
    return flatten_map(functional.pixel_unshuffle(latents, stride))


def _standardize(latents: torch.Tensor) -> torch.Tensor:
    values = latents.float()
    std, mean = torch.std_mean(values, dim=tuple(range(1, values.ndim)), keepdim=True, correction=0)
    return (values - mean) / std.clamp_min(1e-6)
