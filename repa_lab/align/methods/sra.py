"""SRA: the averaged model teaches an earlier block from an image with less noise."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch.nn import functional

from repa_lab.align.losses import token_cosine
from repa_lab.align.methods.settings import (
    AveragedTeacherSettings,
    SRASettings,
)
from repa_lab.align.projector import Projector
from repa_lab.align.regularizer import Loss, Pair, Regularizer, Shapes, Signals
from repa_lab.align.settings import RegularizerSettings


class AveragedTeacher(Regularizer):
    """The base of regularizers that match a block's projected tokens with those of a later block of the averaged model.

    No gradient reaches the teacher, which is resampled where the blocks' grids differ.

    Args:
        settings: an instance of ``Settings``.
        shapes: the widths of the tap and of the averaged model's tap.
    """

    Settings: ClassVar[type[RegularizerSettings]] = AveragedTeacherSettings

    def __init__(self, settings: AveragedTeacherSettings, shapes: Shapes) -> None:
        super().__init__(settings, shapes)
        (student,), (teacher,) = shapes.taps, shapes.ema_taps
        self.projector = Projector(student, teacher, settings.projector)

    def forward(self, signals: Signals, step: int = 0) -> Loss:
        """Return the loss of :meth:`compare`; the mean cosine is a part.

        Args:
            signals: one tap ``(B, N, D)`` and one tap of the averaged model ``(B, M, D)``.
            step: optimizer steps already taken.
        """
        (student,), (teacher,) = signals.taps, signals.ema_taps
        target = teacher.resample(student.grid).values.detach()
        pair = Pair(self.projector.project(student).values.float(), target.float())
        cosine = token_cosine(*pair).mean()
        return Loss(self.compare(pair, cosine), {"cosine": cosine.detach()})

    def compare(self, pair: Pair, cosine: torch.Tensor) -> torch.Tensor:
        """Return the loss of matched tokens in float32, given their mean cosine: minus the cosine."""
        return -cosine


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

    def compare(self, pair: Pair, cosine: torch.Tensor) -> torch.Tensor:
        """Return the smooth L1 loss or minus the mean cosine."""
        if self.settings.loss == "cosine":
            return -cosine
        return functional.smooth_l1_loss(*pair, beta=self.settings.beta)
