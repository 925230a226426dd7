"""CREPA: the encoder's features of a frame and of its neighbours teach the frame."""

from __future__ import annotations

import torch

from repa_lab.align.losses import scale_to_unit, token_cosine
from repa_lab.align.methods import CREPASettings
from repa_lab.align.regularizer import EncoderTarget, Loss, Pair, Signals


class CREPA(EncoderTarget):
    """CREPA (2506.09229), Eq. 6: ``-mean_bf [S_bff + sum_(k in K) exp(-|k - f| / tau) S_bfk]``.

    ``S_bfk`` is ``mean_n cos(P(h)_bfn, y_bkn)``, between the projected tokens of frame f and the encoder's tokens of
    frame k at the same places, and K are the frames ``f - distance`` and ``f + distance`` that the clip has. With
    ``cumulative`` K are all frames up to that distance. The paper sums over f where ``normalize_frames`` is false.
    Frames are the denoiser's: where an autoencoder joins several frames of a clip into one, the encoder sees the last.
    """

    Settings = CREPASettings
    settings: CREPASettings

    def forward(self, signals: Signals, step: int = 0) -> Loss:
        """Return minus the weighted cosines; their mean, and the mean cosine of frames with themselves, are parts."""
        (student,) = signals.taps
        pairs = self.pairs(signals)
        weights = frame_weights(self.settings, student.frames, student.values.device)
        similarity = torch.stack([weighted_similarity(pair, weights) for pair in pairs]).mean()
        own = torch.stack([token_cosine(*pair).detach().mean() for pair in pairs]).mean()
        value = -similarity if self.settings.normalize_frames else -similarity * student.frames
        return Loss(value, {"cosine": own, "similarity": similarity.detach()})


def frame_weights(settings: CREPASettings, frames: int, device: torch.device) -> torch.Tensor:
    """Return how much frame k counts for frame f, ``(frames, frames)``, float32: 1 for itself, 0 for no neighbour."""
    number = torch.arange(frames, device=device)
    apart = (number[:, None] - number).abs()
    is_neighbour = (apart <= settings.distance) if settings.cumulative else (apart == settings.distance)
    weights = torch.where(is_neighbour | (apart == 0), (-apart / settings.tau).exp(), 0.0)
    return weights / weights.sum(1, keepdim=True) if settings.normalize_neighbours else weights


def weighted_similarity(pair: Pair, weights: torch.Tensor) -> torch.Tensor:
    """Return ``mean_bfn sum_k weights_fk cos(student_bfn, teacher_bkn)``, in float32; no gradient reaches the teacher.

    Both sides are ``(B, frames * N, D)``, and the weights ``(frames, frames)``.
    """
    # Autocast would run the product in half precision; similarities must be float32.
    with torch.autocast(pair.student.device.type, enabled=False):
        ours, theirs = (
            scale_to_unit(side)[0].unflatten(1, (len(weights), -1)) for side in (pair.student, pair.teacher.detach())
        )
        # The cosines of a token with several unit vectors add up to its product with their sum.
        cosines: torch.Tensor = (ours * torch.einsum("fk,bknd->bfnd", weights, theirs)).sum(-1)
    return cosines.mean()
