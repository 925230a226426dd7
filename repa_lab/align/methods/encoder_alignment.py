"""Methods that an encoder teaches beside REPA: relations of tokens, frames of clips (CREPA), attention (HASTE)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch.nn import functional

from repa_lab.align.losses import manifold_loss, scale_to_unit, token_cosine
from repa_lab.align.methods.settings import CREPASettings, HASTESettings, RelationSettings
from repa_lab.align.ranks import world_size
from repa_lab.align.regularizer import REPA, Attention, CosineTarget, EncoderTarget, Loss, Pair, Signals
from repa_lab.align.settings import RegularizerSettings


class Relation(EncoderTarget):
    """Relations of projected and of encoder tokens: ``mean_bij max(0, |cos(s_bi, s_bj) - cos(y_bi, y_bj)| - m)``.

    With a margin m of 0.1 this is VideoREPA's token relation distillation (2505.23656), with 0.25 the matrix loss of
    VA-VAE (2501.01423). ``relation`` has the other readings, among them U-REPA's squared differences; see
    :func:`repa_lab.align.losses.manifold_loss`.
    """

    Settings: ClassVar[type[RegularizerSettings]] = RelationSettings
    settings: RelationSettings

    def forward(self, signals: Signals, step: int = 0) -> Loss:
        """Return the mean loss over the encoders, which is a part too.

        Args:
            signals: one tap ``(B, N, in_dim)`` and the tokens ``(B, M, out_dim)`` of every encoder.
            step: optimizer steps already taken, which seed the sample of tokens.

        Raises:
            ValueError: the signals do not fit together, or a single token or image leaves no pair to compare.
        """
        pairs = self.pairs(signals)
        scope, (images, tokens) = self.settings.relation.scope, pairs[0].teacher.shape[:2]
        if scope == "intra" and tokens < 2:
            raise ValueError("relation compares tokens of one image; there is a single token")
        if scope == "batch_pooled" and images * world_size() < 2:
            raise ValueError("relation with scope batch_pooled compares images; there is a single one")
        value = torch.stack([manifold_loss(*pair, self.settings.relation, step) for pair in pairs]).mean()
        return Loss(value, {"relation": value.detach()})


class CREPA(CosineTarget):
    """CREPA (2506.09229), Eq. 6: ``-mean_bf [S_bff + sum_(k in K) exp(-|k - f| / tau) S_bfk]``.

    ``S_bfk`` is ``mean_n cos(P(h)_bfn, y_bkn)``, between the projected tokens of frame f and the encoder's tokens of
    frame k at the same places, and K are the frames ``f - distance`` and ``f + distance`` that the clip has. With
    ``cumulative`` K are all frames up to that distance. The paper sums over f where ``normalize_frames`` is false.
    Frames are the denoiser's: where an autoencoder joins several frames of a clip into one, the encoder sees the last.

    Args as for :class:`EncoderTarget`, with the fields of :class:`CREPASettings`.
    """

    Settings: ClassVar[type[RegularizerSettings]] = CREPASettings
    settings: CREPASettings

    def forward(self, signals: Signals, step: int = 0) -> Loss:
        """Return minus the weighted cosines; their mean, and the mean cosine of frames with themselves, are parts.

        Args:
            signals: one tap ``(B, frames * N, in_dim)`` and the tokens ``(B, frames * M, out_dim)`` of every encoder.
            step: optimizer steps already taken.

        Raises:
            ValueError: the signals do not fit together.
        """
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

    Args:
        pair: student and teacher, ``(B, frames * N, D)`` each.
        weights: ``(frames, frames)``.
    """
    # Autocast would run the product in half precision; similarities must be float32.
    with torch.autocast(pair.student.device.type, enabled=False):
        ours, theirs = (
            scale_to_unit(side)[0].unflatten(1, (len(weights), -1)) for side in (pair.student, pair.teacher.detach())
        )
        # The cosines of a token with several unit vectors add up to its product with their sum.
        cosines: torch.Tensor = (ours * torch.einsum("fk,bknd->bfnd", weights, theirs)).sum(-1)
    return cosines.mean()


class HASTE(REPA):
    """HASTE (2505.16792): ``-mean_bn cos(P(h)_bn, y_bn) + w mean_lbkn H(softmax(A'_lbkn), softmax(A_lbkn))``.

    The first term is REPA's. In the second, ``A_lbkn`` are the scaled products of the query of token n with all keys in
    head k of the denoiser's l-th aligned block, and ``A'`` the encoder's between patches, in its last blocks; ``H(p, q)
    = -sum p log q`` is the cross-entropy and w is ``attention_weight``. Where one side has more heads, its first are
    taken. Where the grids differ, the encoder's queries and keys are resampled. The paper's termination, which drops
    both terms at a step, is ``schedule.cutoff_step``: from then on neither the encoder nor the taps are asked.

    Args as for :class:`REPA`, with the fields of :class:`HASTESettings`.
    """

    Settings: ClassVar[type[RegularizerSettings]] = HASTESettings
    settings: HASTESettings

    def forward(self, signals: Signals, step: int = 0) -> Loss:
        """Return the alignment loss plus the weighted attention loss; the mean cosine and the latter are parts.

        Args:
            signals: one tap ``(B, N, in_dim)``, the tokens ``(B, M, out_dim)`` of every encoder, and the attention of
                as many blocks of the denoiser and of every encoder.
            step: optimizer steps already taken.

        Raises:
            ValueError: the signals do not fit together.
        """
        alignment, cosine, _ = self._align(signals)
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
