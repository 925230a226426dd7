"""Self-Transcendence: an earlier model of the same kind, guided, teaches the new one."""

from __future__ import annotations

import torch

from repa_lab.align.methods import SelfTranscendenceSettings
from repa_lab.align.methods.sra import ProjectedTeacher
from repa_lab.align.regularizer import Pair, Signals


class SelfTranscendence(ProjectedTeacher):
    """Self-Transcendence (2601.07773): ``-mean_bn 1[low <= t_bn <= high] cos(P(h)_bn, f_bn)``.

    ``h`` are the tokens that leave a block of the model that trains. ``f = u + s (c - u)`` are the guided tokens of a
    later block of a frozen model with the same input: c are its conditional tokens, u its unconditional ones, and s is
    the guidance. The mean is over all tokens; those whose time is out of range count as 0, so that the loss does not
    depend on the micro-batch. ``loss: mse`` has the mean squared error over the channels in place of minus the cosine.
    All tokens of an image have one time, unless another regularizer asks for two.
    """

    Settings = SelfTranscendenceSettings
    settings: SelfTranscendenceSettings

    def compare(self, pair: Pair, cosine: torch.Tensor, signals: Signals) -> torch.Tensor:
        """Return the mean loss; the times are ``(B,)``, or ``(B, 1, h, w)`` on the student's grid."""
        assert signals.times is not None
        times = signals.times.reshape(len(cosine), -1)
        is_used = (times >= self.settings.low) & (times <= self.settings.high)
        loss = -cosine if self.settings.loss == "cosine" else (pair.student - pair.teacher).square().mean(-1)
        return (loss * is_used).mean(1).mean()
