"""The regularizers: pure torch, usable in any training loop."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from repa_lab.lazy import on_first_use

if TYPE_CHECKING:
    from repa_lab.align.losses import alignment_loss, manifold_loss, nt_xent_loss
    from repa_lab.align.needs import Needs
    from repa_lab.align.regularizer import REPA, UREPA, Loss, Prediction, Regularizer, Shapes, Signals, SimilarityCutoff
    from repa_lab.align.settings import (
        ManifoldSettings,
        ProjectorSettings,
        RegularizerSettings,
        Schedule,
        ScheduleSettings,
    )
    from repa_lab.align.tokens import Projector, Tokens, flatten_map, normalise_over_space, resample_tokens

import_module("repa_lab.align.methods")  # registers the methods

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

__getattr__ = on_first_use(
    __name__,
    {
        "align.losses": ("alignment_loss", "manifold_loss", "nt_xent_loss"),
        "align.needs": ("Needs",),
        "align.regularizer": (
            "REPA",
            "UREPA",
            "Loss",
            "Prediction",
            "Regularizer",
            "Shapes",
            "Signals",
            "SimilarityCutoff",
        ),
        "align.settings": (
            "ManifoldSettings",
            "ProjectorSettings",
            "RegularizerSettings",
            "Schedule",
            "ScheduleSettings",
        ),
        "align.tokens": ("Projector", "Tokens", "flatten_map", "normalise_over_space", "resample_tokens"),
    },
)
