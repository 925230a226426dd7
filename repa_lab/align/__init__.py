"""The regularizer core: pure torch, usable alone inside anyone's training loop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from repa_lab.align.cutoff import SimilarityCutoff
    from repa_lab.align.losses import alignment_loss, nt_xent_loss
    from repa_lab.align.manifold import manifold_loss
    from repa_lab.align.projector import Projector
    from repa_lab.align.regularizer import REPA, UREPA, Loss, Prediction, Regularizer, Shapes, Signals
    from repa_lab.align.schedule import Schedule
    from repa_lab.align.settings import (
        ManifoldSettings,
        Needs,
        ProjectorSettings,
        RegularizerSettings,
        ScheduleSettings,
    )
    from repa_lab.align.tokens import Tokens, flatten_map, normalise_over_space, resample_tokens

_HOMES = {
    "cutoff": ("SimilarityCutoff",),
    "losses": ("alignment_loss", "nt_xent_loss"),
    "manifold": ("manifold_loss",),
    "projector": ("Projector",),
    "regularizer": ("REPA", "UREPA", "Loss", "Prediction", "Regularizer", "Shapes", "Signals"),
    "schedule": ("Schedule",),
    "settings": ("ManifoldSettings", "Needs", "ProjectorSettings", "RegularizerSettings", "ScheduleSettings"),
    "tokens": ("Tokens", "flatten_map", "normalise_over_space", "resample_tokens"),
}

__all__ = [
    "REPA",
    "UREPA",
    "Loss",
    "ManifoldSettings",
    "Needs",
    "Prediction",
    "Projector",
    "ProjectorSettings",
    "Regularizer",
    "RegularizerSettings",
    "Schedule",
    "ScheduleSettings",
    "Shapes",
    "Signals",
    "SimilarityCutoff",
    "Tokens",
    "alignment_loss",
    "flatten_map",
    "manifold_loss",
    "normalise_over_space",
    "nt_xent_loss",
    "resample_tokens",
]


def __getattr__(name: str) -> Any:
    """Import public names on first use, so that `plan` can ask a schedule without waiting for torch."""
    for home, names in _HOMES.items():
        if name in names:
            from importlib import import_module

            return getattr(import_module(f"repa_lab.align.{home}"), name)
    raise AttributeError(f"module 'repa_lab.align' has no attribute {name!r}")
