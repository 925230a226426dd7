"""What a paper reports of an experiment's arms. No part of a run's identity: it is what measurements are held against."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from repa_lab.settings import AS_TUPLE, NotNegative, Settings

Sentences = Annotated[tuple[str, ...], AS_TUPLE]
Values = Annotated[dict[str, float], Field(min_length=1)]


class PublishedConfig(Settings):
    """Numbers of a paper: of ``arms`` by label, a value for each kind of metric (``fid``, ``sfid``, ``is``, ...).

    ``source`` is the table, ``protocol`` how it was measured. A measured value agrees where it is within the ``tolerance`` of
    its kind, in the metric's own unit; ``basis`` says where that is from. ``deviations`` are what the spec does otherwise.
    """

    source: str = ""
    protocol: str = ""
    tolerance: dict[str, NotNegative] = Field(default_factory=dict)
    basis: str = ""
    deviations: Sentences = ()
    arms: dict[str, Values] = Field(default_factory=dict)
