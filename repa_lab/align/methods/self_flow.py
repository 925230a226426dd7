"""Self-Flow: the averaged model teaches from the cleaner of the two noise levels that an image has."""

from __future__ import annotations

from repa_lab.align.methods import SelfFlowSettings
from repa_lab.align.methods.sra import ProjectedTeacher


class SelfFlow(ProjectedTeacher):
    """Self-Flow (2603.06507): ``-mean_bn cos(P(h)_bn, g_bn)``.

    Each image has two times t and s, drawn alike, and a mask that takes every token with probability ``mask_ratio``.
    The denoiser gets masked tokens at time s and the others at t, with one noise, and predicts each token's target.
    ``h`` are the tokens that leave a block in this pass. ``g`` are the tokens that leave a later block of the averaged
    model, which gets the whole image at ``min(t, s)``. The mean is over all tokens, masked or not.
    """

    Settings = SelfFlowSettings
