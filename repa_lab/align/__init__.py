"""The regularizer core: pure torch, usable alone inside anyone's training loop."""

from repa_lab.align.cutoff import SimilarityCutoff
from repa_lab.align.losses import alignment_loss, nt_xent_loss
from repa_lab.align.manifold import Manifold, manifold_loss
from repa_lab.align.projector import Projector
from repa_lab.align.regularizer import REPA, UREPA, Alignment, Resample
from repa_lab.align.schedule import Schedule
from repa_lab.align.tokens import Tokens, flatten_map, normalise_over_space, resample_tokens

__all__ = [
    "REPA",
    "UREPA",
    "Alignment",
    "Manifold",
    "Projector",
    "Resample",
    "Schedule",
    "SimilarityCutoff",
    "Tokens",
    "alignment_loss",
    "flatten_map",
    "manifold_loss",
    "normalise_over_space",
    "nt_xent_loss",
    "resample_tokens",
]
