"""Methods in which a later block of the same network teaches an earlier one: LayerSync, SRA, Self-Flow, and more.

The teacher is the denoiser itself (LayerSync), its averaged model (SRA, Self-Flow), or a frozen earlier model of its
kind (Self-Transcendence). Where the blocks' grids differ, the teacher is resampled; no gradient reaches it.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch.nn import functional

from repa_lab.align.losses import alignment_loss, token_cosine
from repa_lab.align.methods.settings import (
    AveragedTeacherSettings,
    LayerSyncSettings,
    SelfFlowSettings,
    SelfTranscendenceSettings,
    SRASettings,
)
from repa_lab.align.projector import Projector
from repa_lab.align.regularizer import Loss, Pair, Regularizer, Shapes, Signals
from repa_lab.align.settings import RegularizerSettings


class LayerSync(Regularizer):
    """LayerSync (2510.12581): ``-mean_bn cos(h_bn, sg(g_bn))``.

    ``h`` are the tokens that leave an early block and ``g`` those that leave a later block in the same forward pass; no
    gradient reaches the later block through them (sg).
    """

    Settings: ClassVar[type[RegularizerSettings]] = LayerSyncSettings
    settings: LayerSyncSettings

    def forward(self, signals: Signals, step: int = 0) -> Loss:
        """Return minus the mean cosine, which is a part.

        Args:
            signals: the student's and the teacher's tokens, ``(B, N, D)`` and ``(B, M, D)``.
            step: optimizer steps already taken.
        """
        student, teacher = signals.taps
        value = alignment_loss(student.values, teacher.resample(student.grid).values)
        return Loss(value, {"cosine": -value.detach()})


class AveragedTeacher(Regularizer):
    """The base of regularizers that match a block's projected tokens with those of a later block of the averaged model.

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


class SelfFlow(AveragedTeacher):
    """Self-Flow (2603.06507): ``-mean_bn cos(P(h)_bn, g_bn)``.

    Each image has two times t and s, drawn alike, and a mask that takes every token with probability ``mask_ratio``.
    The denoiser gets masked tokens at time s and the others at t, with one noise, and predicts each token's target.
    ``h`` are the tokens that leave a block in this pass. ``g`` are the tokens that leave a later block of the averaged
    model, which gets the whole image at ``min(t, s)``. The mean is over all tokens, masked or not.
    """

    Settings: ClassVar[type[RegularizerSettings]] = SelfFlowSettings


class SelfTranscendence(Regularizer):
    """Self-Transcendence (2601.07773): ``-mean_bn 1[low <= t_bn <= high] cos(P(h)_bn, f_bn)``.

    ``h`` are the tokens that leave a block of the model that trains. ``f = u + s (c - u)`` are the guided tokens of a
    later block of a frozen model with the same input: c are its conditional tokens, u its unconditional ones, and s is
    the guidance. The mean is over all tokens; those whose time is out of range count as 0, so that the loss does not
    depend on the micro-batch. ``loss: mse`` has the mean squared error over the channels in place of minus the cosine.
    All tokens of an image have one time, unless another regularizer asks for two.
    """

    Settings: ClassVar[type[RegularizerSettings]] = SelfTranscendenceSettings
    settings: SelfTranscendenceSettings

    def __init__(self, settings: SelfTranscendenceSettings, shapes: Shapes) -> None:
        super().__init__(settings, shapes)
        (student,), (teacher,) = shapes.taps, shapes.frozen_taps
        self.projector = Projector(student, teacher, settings.projector)

    def forward(self, signals: Signals, step: int = 0) -> Loss:
        """Return the mean loss of the tokens in range; the mean cosine of all tokens is a part.

        Args:
            signals: one tap ``(B, N, D)``, one tap of the frozen model ``(B, M, D)``, and the times
                ``(B,)``, or ``(B, 1, h, w)`` on the student's grid.
            step: optimizer steps already taken.
        """
        (student,), (teacher,), times = signals.taps, signals.frozen_taps, signals.times
        assert times is not None
        projected = self.projector.project(student).values
        target = teacher.resample(student.grid).values.detach()
        cosine = token_cosine(projected, target)
        is_used = ((times >= self.settings.low) & (times <= self.settings.high)).reshape(len(times), -1)
        loss = -cosine if self.settings.loss == "cosine" else (projected.float() - target.float()).square().mean(-1)
        return Loss((loss * is_used).mean(1).mean(), {"cosine": cosine.detach().mean(1).mean()})
