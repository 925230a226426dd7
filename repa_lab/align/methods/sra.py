"""SRA: the averaged model teaches an earlier block from an image with less noise."""

from __future__ import annotations

import torch
from torch.nn import functional

from repa_lab.align.losses import token_cosine
from repa_lab.align.methods import ProjectedTeacherSettings, SRASettings
from repa_lab.align.regularizer import Loss, Pair, Regularizer, Shapes, Signals
from repa_lab.align.tokens import Projector


class ProjectedTeacher(Regularizer):
    """The base of regularizers that match a block's projected tokens with those of a later block of another model.

    That model is the averaged or a frozen one. No gradient reaches it. Its tokens are resampled where the grids differ.
    """

    def __init__(self, settings: ProjectedTeacherSettings, shapes: Shapes) -> None:
        super().__init__(settings, shapes)
        (student,), (teacher,) = shapes.taps, shapes.ema_taps + shapes.frozen_taps
        self.projector = Projector(student, teacher, settings.projector)

    def forward(self, signals: Signals, step: int = 0) -> Loss:
        """Return the loss of the student's tap ``(B, N, D)`` and the teacher's ``(B, M, D)``; the cosine is a part."""
        (student,), (teacher,) = signals.taps, signals.ema_taps + signals.frozen_taps
        target = teacher.resample(student.grid).values.detach()
        pair = Pair(self.projector(student).values.float(), target.float())
        cosine = token_cosine(*pair)
        return Loss(self.compare(pair, cosine, signals), {"cosine": cosine.detach().mean()})

    def compare(self, pair: Pair, cosine: torch.Tensor, signals: Signals) -> torch.Tensor:
        """Return the loss of matched tokens in float32, given their cosines ``(B, N)``: minus the mean cosine."""
        return -cosine.mean()


class SRA(ProjectedTeacher):
    """SRA (2505.02831): ``mean_bnk smooth_l1(P(h)_bnk - g_bnk)`` with ``beta`` 0.05.

    ``h`` are the tokens that leave a block of the model that trains, at time t. ``g`` are the tokens that leave a later
    block of the averaged model at time ``max(0, t - u)`` with the same noise and conditioning, u uniform between 0 and
    ``less_noise`` for each image. ``smooth_l1(d)`` is ``d^2 / (2 beta)`` where ``|d| < beta``, else ``|d| - beta / 2``.

    ``loss: cosine`` is ``-mean_bn cos(P(h)_bn, g_bn)`` over the channels of every token. The released code takes its
    cosine over the second of three dimensions, which are the tokens; the paper compares tokens.
    """

    Settings = SRASettings
    settings: SRASettings

    def compare(self, pair: Pair, cosine: torch.Tensor, signals: Signals) -> torch.Tensor:
        """Return the smooth L1 loss or minus the mean cosine."""
        if self.settings.loss == "cosine":
            return -cosine.mean()
        return functional.smooth_l1_loss(*pair, beta=self.settings.beta)
