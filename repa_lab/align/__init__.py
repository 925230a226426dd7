"""The regularizer core: pure torch, usable alone inside anyone's training loop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

_HOMES = {
    "cutoff": ("SimilarityCutoff",),
    "losses": ("alignment_loss", "nt_xent_loss"),
    "manifold": ("Manifold", "manifold_loss"),
    "projector": ("Projector",),
    "regularizer": ("REPA", "UREPA", "Alignment", "Resample"),
    "schedule": ("Schedule",),
    "tokens": ("Tokens", "flatten_map", "normalise_over_space", "resample_tokens"),
}


def __getattr__(name: str) -> Any:
    """Import public names on first use, so that `plan` can ask a schedule without waiting for torch."""
    for home, names in _HOMES.items():
        if name in names:
            from importlib import import_module

            return getattr(import_module(f"repa_lab.align.{home}"), name)
    raise AttributeError(f"module 'repa_lab.align' has no attribute {name!r}")
