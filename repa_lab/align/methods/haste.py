"""HASTE: the encoder's features and its attention teach, for a part of the training."""

from __future__ import annotations

import torch
from torch.nn import functional

from repa_lab.align.methods import HASTESettings
from repa_lab.align.regularizer import REPA, Attention, Loss, Signals


class HASTE(REPA):
    """HASTE (2505.16792): ``-mean_bn cos(P(h)_bn, y_bn) + w mean_lbkn H(softmax(A'_lbkn), softmax(A_lbkn))``.

    The first term is REPA's. In the second, ``A_lbkn`` are the scaled products of the query of token n with all keys in
    head k of the denoiser's l-th aligned block, and ``A'`` the encoder's between patches, in its last blocks; ``H(p, q)
    = -sum p log q`` is the cross-entropy and w is ``attention_weight``. Where one side has more heads, its first are
    taken. Where the grids differ, the encoder's queries and keys are resampled. The paper's termination, which drops
    both terms at a step, is ``schedule.cutoff_step``: from then on neither the encoder nor the taps are asked.
    """

    Settings = HASTESettings
    settings: HASTESettings

    def forward(self, signals: Signals, step: int = 0) -> Loss:
        """Return the alignment loss plus the weighted attention loss; the mean cosine and the latter are parts.

        The signals have the attention of as many blocks of the denoiser and of every encoder.
        """
        alignment, cosine = self.align(self.pairs(signals))
        if not self.settings.attention_weight:
            return Loss(alignment, {"cosine": cosine})
        pairs = [pair for taught in signals.encoder_attention for pair in zip(signals.attention, taught, strict=True)]
        attention = torch.stack([attention_loss(*pair) for pair in pairs]).mean()
        value = alignment + self.settings.attention_weight * attention
        return Loss(value, {"cosine": cosine, "attention": attention.detach()})


def attention_loss(student: Attention, teacher: Attention) -> torch.Tensor:
    """Return the mean cross-entropy of the student's attention relative to the teacher's, in float32.

    No gradient reaches the teacher. The least value is the mean entropy of the teacher's attention.
    """
    heads = min(student.query.shape[1], teacher.query.shape[1])
    ours, theirs = (
        Attention(side.query[:, :heads], side.key[:, :heads], side.grid).logits()
        for side in (student, teacher.resample(student.grid))
    )
    products = theirs.detach().softmax(-1) * functional.log_softmax(ours, -1)
    return -products.sum(-1).mean()
