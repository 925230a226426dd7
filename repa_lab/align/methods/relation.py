"""Relations between tokens agree with those between the encoder's."""

from __future__ import annotations

from typing import ClassVar

import torch

from repa_lab.align.losses import manifold_loss
from repa_lab.align.methods.settings import RelationSettings
from repa_lab.align.ranks import world_size
from repa_lab.align.regularizer import EncoderTarget, Loss, Signals
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
