"""Self-Transcendence: an earlier model of the same kind, guided, teaches the new one."""

from __future__ import annotations

from typing import ClassVar

from repa_lab.align.losses import token_cosine
from repa_lab.align.methods.settings import (
    SelfTranscendenceSettings,
)
from repa_lab.align.projector import Projector
from repa_lab.align.regularizer import Loss, Regularizer, Shapes, Signals
from repa_lab.align.settings import RegularizerSettings


class SelfTranscendence(Regularizer):
    """Self-Transcendence (2601.07773): ``-mean_bn 1[low <= t_bn <= high] cos(P(h)_bn, f_bn)``.

    ``h`` are the tokens that leave a block of the model that trains. ``f = u + s (c - u)`` are the guided tokens of a
    later block of a frozen model with the same input: c are its conditional tokens, u its unconditional ones, and s is
    the guidance. The mean is over all tokens; those whose time is out of range count as 0, so that the loss does not
    depend on the micro-batch. ``loss: mse`` has the mean squared error over the channels in place of minus the cosine.
    All tokens of an image have one time, unless another regularizer asks for two. Where the blocks' grids differ, the
    teacher is resampled; no gradient reaches it.
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
