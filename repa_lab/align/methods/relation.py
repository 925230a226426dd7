"""Relations between tokens agree with those between the encoder's."""

from __future__ import annotations

import torch

from repa_lab.align.losses import manifold_loss
from repa_lab.align.methods import RelationSettings
from repa_lab.align.regularizer import EncoderTarget, Loss, Signals


class Relation(EncoderTarget):
    """Relations of projected and of encoder tokens: ``mean_bij max(0, |cos(s_bi, s_bj) - cos(y_bi, y_bj)| - m)``.

    With a margin m of 0.1 this is VideoREPA's token relation distillation (2505.23656), with 0.25 the matrix loss of
    VA-VAE (2501.01423). ``relation`` has the other readings, among them U-REPA's squared differences; see
    :func:`repa_lab.align.losses.manifold_loss`.
    """

    Settings = RelationSettings
    settings: RelationSettings

    def forward(self, signals: Signals, step: int = 0) -> Loss:
        """Return the mean loss over the encoders, which is a part too; ``step`` seeds the sample of tokens."""
        pairs = self.pairs(signals)
        self.require_relations(pairs[0], self.settings.relation)
        value = torch.stack([manifold_loss(*pair, self.settings.relation, step) for pair in pairs]).mean()
        return Loss(value, {"relation": value.detach()})
