"""LayerSync: a later block of the denoiser teaches an earlier one."""

from __future__ import annotations

from typing import ClassVar

from repa_lab.align.losses import alignment_loss
from repa_lab.align.methods.settings import (
    LayerSyncSettings,
)
from repa_lab.align.regularizer import Loss, Regularizer, Signals
from repa_lab.align.settings import RegularizerSettings


class LayerSync(Regularizer):
    """LayerSync (2510.12581): ``-mean_bn cos(h_bn, sg(g_bn))``.

    ``h`` are the tokens that leave an early block and ``g`` those that leave a later block in the same forward pass; no
    gradient reaches the later block through them (sg). Where the blocks' grids differ, the teacher is resampled.
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
