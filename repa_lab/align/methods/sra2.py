"""SRA2: the clean latents teach."""

from __future__ import annotations

import torch
from torch.nn import functional

from repa_lab.align.methods import SRA2Settings
from repa_lab.align.regularizer import Loss, Regularizer, Shapes, Signals
from repa_lab.align.tokens import Grid, Projector, Tokens, flatten_map


class SRA2(Regularizer):
    """SRA2 (2601.17830): ``mean_bnk smooth_l1(P(h)_bnk - z_bnk)`` with ``beta`` 0.05.

    ``z_bn`` are the latents of the square of cells of token n; ``smooth_l1(d)`` is ``d^2 / (2 beta)`` where
    ``|d| < beta``, else ``|d| - beta / 2``. With ``normalize`` the latents of every image have mean 0 and standard
    deviation 1 over all of their values; the paper takes them as the VAE gives them. Users of ports saw a loss of 60
    beside a denoising loss of 0.06: the part ``ratio`` is the loss over the mean squared error of the prediction.
    """

    Settings = SRA2Settings
    settings: SRA2Settings

    def __init__(self, settings: SRA2Settings, shapes: Shapes) -> None:
        super().__init__(settings, shapes)
        (width,), (stride,) = shapes.taps, shapes.strides
        self.projector = Projector(width, shapes.latents * stride**2, settings.projector)

    def forward(self, signals: Signals, step: int = 0) -> Loss:
        """Return the smooth L1 loss of one tap ``(B, N, D)``; its ratio to the denoising loss is a part."""
        (student,), latents, prediction = signals.taps, signals.latents, signals.prediction
        assert latents is not None
        assert prediction is not None
        latents = latents.float()
        if self.settings.normalize:
            std, mean = torch.std_mean(latents, dim=tuple(range(1, latents.ndim)), keepdim=True, correction=0)
            latents = (latents - mean) / std.clamp_min(1e-6)
        target = latents_of_tokens(latents, student.grid)
        projected = self.projector(student).values.float()
        value = functional.smooth_l1_loss(projected, target.values, beta=self.settings.beta)
        with torch.no_grad():
            denoising = functional.mse_loss(prediction.output.float(), prediction.target.float())
            ratio = value / denoising.clamp_min(torch.finfo(torch.float32).tiny)
        return Loss(value, {"ratio": ratio})


def latents_of_tokens(latents: torch.Tensor, grid: Grid) -> Tokens:
    """Return for every token of a grid the latents of its square of cells, ``(B, h * w, C * s * s)``; clips by frame.

    The latents are ``(B, C, s * h, s * w)``, or of clips ``(B, C, F, s * h, s * w)``, else it raises a ValueError.
    """
    if latents.ndim == 5:
        return latents_of_tokens(latents.transpose(1, 2).flatten(0, 1), grid).as_clips(latents.shape[2])
    height, width = latents.shape[-2:]
    stride = height // grid[0]
    if (grid[0] * stride, grid[1] * stride) != (height, width):
        raise ValueError(f"a grid of {grid[0]}x{grid[1]} tokens does not divide latents of {height}x{width}")
    return flatten_map(functional.pixel_unshuffle(latents, stride))
