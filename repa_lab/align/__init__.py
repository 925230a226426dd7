"""The regularizer core: pure torch, usable alone inside anyone's training loop."""

from repa_lab.align.losses import alignment_loss, manifold_loss
from repa_lab.align.projector import Projector
from repa_lab.align.regularizer import REPA, UREPA, Alignment
from repa_lab.align.schedule import Schedule
from repa_lab.align.tokens import Tokens, flatten_map, resample_tokens

__all__ = [
    "REPA",
    "UREPA",
    "Alignment",
    "Projector",
    "Schedule",
    "Tokens",
    "alignment_loss",
    "flatten_map",
    "manifold_loss",
    "resample_tokens",
]
