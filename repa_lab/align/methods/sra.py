"""SRA: the averaged model teaches an earlier block from an image with less noise."""

from __future__ import annotations

from typing import ClassVar

from torch.nn import functional

from repa_lab.align.losses import token_cosine
from repa_lab.align.methods.averaged_teacher import AveragedTeacher
from repa_lab.align.methods.settings import SRASettings
from repa_lab.align.regularizer import Loss, Signals
from repa_lab.align.settings import RegularizerSettings


class SRA(AveragedTeacher):
    """SRA (2505.02831): ``mean_bnk smooth_l1(P(h)_bnk - g_bnk)`` with ``beta`` 0.05.

    ``h`` are the tokens that leave a block of the model that trains, at time t. ``g`` are the tokens that leave a later
    block of the averaged model at time ``max(0, t - u)`` with the same noise and conditioning, u uniform between 0 and
    ``less_noise`` for each image. ``smooth_l1(d)`` is ``d^2 / (2 beta)`` where ``|d| < beta``, else ``|d| - beta / 2``.

    ``loss: cosine`` is ``-mean_bn cos(P(h)_bn, g_bn)`` over the channels of every token. The released code takes its
    cosine over the second of three dimensions, which are the tokens; the paper compares tokens.
    """

    Settings: ClassVar[type[RegularizerSettings]] = SRASettings
    settings: SRASettings

    def forward(self, signals: Signals, step: int = 0) -> Loss:
        """Return the smooth L1 loss or minus the mean cosine; the mean cosine is a part.

        Args:
            signals: one tap ``(B, N, D)`` and one tap of the averaged model ``(B, M, D)``.
            step: optimizer steps already taken.
        """
        pair = self.match(signals)
        cosine = token_cosine(*pair).mean()
        parts = {"cosine": cosine.detach()}
        if self.settings.loss == "cosine":
            return Loss(-cosine, parts)
        return Loss(functional.smooth_l1_loss(*pair, beta=self.settings.beta), parts)
