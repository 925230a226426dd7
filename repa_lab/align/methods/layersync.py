"""LayerSync: a later block of the denoiser teaches an earlier one."""

from __future__ import annotations

from repa_lab.align.losses import alignment_loss
from repa_lab.align.methods import LayerSyncSettings
from repa_lab.align.regularizer import Loss, Regularizer, Signals


class LayerSync(Regularizer):
    """LayerSync (2510.12581): ``-mean_bn cos(h_bn, sg(g_bn))``.

    ``h`` are the tokens that leave an early block and ``g`` those that leave a later block in the same forward pass; no
    gradient reaches the later block through them (sg). Where the blocks' grids differ, the teacher is resampled.
    """

    Settings = LayerSyncSettings
    settings: LayerSyncSettings

    def forward(self, signals: Signals, step: int = 0) -> Loss:
        """Return minus the mean cosine of student ``(B, N, D)`` and teacher ``(B, M, D)``, which is a part."""
        student, teacher = signals.taps
        value = alignment_loss(student.values, teacher.resample(student.grid).values)
        return Loss(value, {"cosine": -value.detach()})
