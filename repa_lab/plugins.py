"""The public names for plugins: the functions that register components, and the types of their arguments."""

from __future__ import annotations

from typing import TYPE_CHECKING

from repa_lab.lazy import on_first_use

if TYPE_CHECKING:
    from repa_lab.align import Loss, Needs, Prediction, Regularizer, RegularizerSettings, Shapes, Signals, Tokens
    from repa_lab.align.needs import FrozenModel, Overhead, Sizes, TokenSize, TrainingFacts
    from repa_lab.align.regularizer import Attention
    from repa_lab.align.settings import EncoderSettings, regularizer
    from repa_lab.data.settings import Dataset, SourceSettings, source
    from repa_lab.data.sources import Source
    from repa_lab.encoders.registry import encoder
    from repa_lab.metrics.protocol import metric
    from repa_lab.models.families import family
    from repa_lab.models.family import Family, Network, Pipeline, Shape

__all__ = [
    "Attention",
    "Dataset",
    "EncoderSettings",
    "Family",
    "FrozenModel",
    "Loss",
    "Needs",
    "Network",
    "Overhead",
    "Pipeline",
    "Prediction",
    "Regularizer",
    "RegularizerSettings",
    "Shape",
    "Shapes",
    "Signals",
    "Sizes",
    "Source",
    "SourceSettings",
    "TokenSize",
    "Tokens",
    "TrainingFacts",
    "encoder",
    "family",
    "metric",
    "regularizer",
    "source",
]

__getattr__ = on_first_use(
    __name__,
    {
        "align": ("Loss", "Needs", "Prediction", "Regularizer", "RegularizerSettings", "Shapes", "Signals", "Tokens"),
        "align.needs": ("FrozenModel", "Overhead", "Sizes", "TokenSize", "TrainingFacts"),
        "align.regularizer": ("Attention",),
        "align.settings": ("EncoderSettings", "regularizer"),
        "data.settings": ("Dataset", "SourceSettings", "source"),
        "data.sources": ("Source",),
        "encoders.registry": ("encoder",),
        "metrics.protocol": ("metric",),
        "models.families": ("family",),
        "models.family": ("Family", "Network", "Pipeline", "Shape"),
    },
)
