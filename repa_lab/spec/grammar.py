"""The whole of a spec file: the settings of runs, how they are varied, and what is asked of the sweep."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from repa_lab.settings import AS_TUPLE, Count, Settings
from repa_lab.spec.limits import BudgetConfig, StopRule
from repa_lab.spec.options import RunOptions
from repa_lab.spec.published import PublishedConfig
from repa_lab.spec.ranges import RangeConfig, RangeOrLevels, Values
from repa_lab.spec.schema import CompareConfig
from repa_lab.spec.search import SearchConfig


class Include(Settings):
    """A named extra arm."""

    label: Annotated[str, Field(min_length=1)]
    set: dict[str, Any]


Condition = Annotated[dict[str, Any], Field(min_length=1)]
SeedCount = Annotated[int, Field(ge=1, le=1000)]


class Grammar(Settings):
    """The whole of a spec. The sections of :class:`RunConfig` are only mappings here: they are checked arm by arm.

    ``base`` names a spec file under this one and ``use`` fragments between the two; both are resolved before this model sees
    the document.
    """

    base: None = None
    use: None = None
    model: dict[str, Any] = Field(default_factory=dict)
    regularizer: dict[str, Any] = Field(default_factory=dict)
    data: dict[str, Any] = Field(default_factory=dict)
    train: dict[str, Any] = Field(default_factory=dict)
    evaluate: dict[str, Any] = Field(default_factory=dict)
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,63}$")]
    question: str = ""
    plugins: Annotated[tuple[str, ...], AS_TUPLE] = ()
    axes: dict[str, Values | RangeOrLevels] = Field(default_factory=dict)
    one_at_a_time: dict[str, Values | RangeConfig] = Field(default_factory=dict)
    exclude: list[Condition] = Field(default_factory=list)
    include: list[Include] = Field(default_factory=list)
    seeds: SeedCount | Annotated[list[Count], Field(min_length=1)] = 1
    search: SearchConfig | None = None
    compare: CompareConfig = CompareConfig()
    budget: BudgetConfig = BudgetConfig()
    stop: StopRule | Annotated[list[StopRule], Field(min_length=1)] | None = None
    run: RunOptions = RunOptions()
    published: PublishedConfig | None = None
