"""What a paper reports of an experiment's arms. No part of a run's identity: it is what measurements are held against."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from repa_lab.settings import AS_TUPLE, NotNegative, Settings

Sentences = Annotated[tuple[str, ...], AS_TUPLE]
Values = Annotated[dict[str, float], Field(min_length=1)]


class PublishedConfig(Settings):
    """What a paper reports of the arms; no part of a run's identity."""

    source: str = ""
    """The paper and its table."""
    protocol: str = ""
    """How the paper measured."""
    tolerance: dict[str, NotNegative] = Field(default_factory=dict)
    """By kind of metric, in its own unit: within it, a measured value agrees."""
    basis: str = ""
    """Where the tolerance is from."""
    deviations: Sentences = ()
    """What the spec does otherwise than the paper."""
    arms: dict[str, Values] = Field(default_factory=dict)
    """Label to values by kind: `fid`, `sfid`, `is`, `precision`, `recall`."""
