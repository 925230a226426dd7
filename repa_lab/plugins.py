"""What a plugin imports: the decorators that register components, and the types that their code meets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from repa_lab.align import Loss, Needs, Prediction, Regularizer, RegularizerSettings, Shapes, Signals, Tokens
    from repa_lab.align.settings import EncoderSettings, regularizer

_HOMES = {
    "align": ("Loss", "Needs", "Prediction", "Regularizer", "RegularizerSettings", "Shapes", "Signals", "Tokens"),
    "align.settings": ("EncoderSettings", "regularizer"),
}

__all__ = [
    "EncoderSettings",
    "Loss",
    "Needs",
    "Prediction",
    "Regularizer",
    "RegularizerSettings",
    "Shapes",
    "Signals",
    "Tokens",
    "regularizer",
]


def __getattr__(name: str) -> Any:
    """Import public names on first use."""
    for home, names in _HOMES.items():
        if name in names:
            from importlib import import_module

            return getattr(import_module(f"repa_lab.{home}"), name)
    raise AttributeError(f"module 'repa_lab.plugins' has no attribute {name!r}")
