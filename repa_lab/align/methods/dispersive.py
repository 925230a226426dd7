"""Dispersive loss: the images of a batch repel each other."""

from __future__ import annotations

import torch
from torch.nn import functional

from repa_lab.align.losses import gather
from repa_lab.align.methods import DispersiveSettings
from repa_lab.align.regularizer import Loss, Regularizer, Signals


class Dispersive(Regularizer):
    """Dispersive loss (2506.09027): a contrastive loss without positive pairs.

    With ``z_i`` all tokens of image i as one vector of n numbers and ``t`` the temperature:

    - ``infonce_l2``: ``log mean_ij exp(-|z_i - z_j|^2 / (n t))``, whose mean is over all B * B pairs, also of an
      image with itself, as in the released code;
    - ``infonce_cosine``: ``log mean_ij exp(cos(z_i, z_j) / t)`` over the same pairs;
    - ``hinge``: ``mean_(i != j) max(0, margin - |z_i - z_j|^2 / n)^2``.

    The pairs are those of one forward pass in all processes: the loss depends on the micro-batch, not on the number of
    processes. Distances are divided by n as in the released code, so that one temperature serves all widths.
    """

    Settings = DispersiveSettings
    settings: DispersiveSettings

    def forward(self, signals: Signals, step: int = 0) -> Loss:
        """Return the loss of a tap ``(B, N, D)`` of two images or more; the mean distance of two images is a part."""
        (tokens,) = signals.taps
        images = gather(tokens.values.float().flatten(1))
        count = len(images)
        if count < 2:
            raise ValueError("dispersive compares the images of one forward pass; there is a single one")
        is_cosine = self.settings.loss == "infonce_cosine"
        # Unit vectors are 2 - 2 cos apart, squared.
        vectors = functional.normalize(images) if is_cosine else images
        distances = torch.pdist(vectors).square() / (2 if is_cosine else images.shape[1])
        parts = {"distance": distances.detach().mean()}
        if self.settings.loss == "hinge":
            return Loss((self.settings.margin - distances).clamp_min(0).square().mean(), parts)
        # Every pair twice, and every image with itself at distance 0.
        similar = 2 * (-distances / self.settings.temperature).exp().sum() + count
        nearest = 1 / self.settings.temperature if is_cosine else 0.0
        return Loss((similar / count**2).log() + nearest, parts)
