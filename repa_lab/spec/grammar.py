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
    """The arm's name, one line of text."""
    set: dict[str, Any]
    """The arm's settings by dotted path."""


Condition = Annotated[dict[str, Any], Field(min_length=1)]
SeedCount = Annotated[int, Field(ge=1, le=1000)]


class Grammar(Settings):
    """The whole of a spec. The sections of :class:`RunConfig` are only mappings here: they are checked arm by arm.

    ``base`` names a spec file under this one and ``use`` fragments between the two; both are resolved before this model
    sees the document.
    """

    base: None = None
    """A spec file under this one, relative to this file."""
    use: None = None
    """A fragment, or a list of them, between the base and this file."""
    model: dict[str, Any] = Field(default_factory=dict)
    """The denoiser."""
    regularizer: dict[str, Any] = Field(default_factory=dict)
    """What is added to the denoising loss."""
    data: dict[str, Any] = Field(default_factory=dict)
    """The images."""
    train: dict[str, Any] = Field(default_factory=dict)
    """How a run is optimised."""
    evaluate: dict[str, Any] = Field(default_factory=dict)
    """How a run is measured."""
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,63}$")]
    """The sweep's name and folder: a-z, 0-9, `_`, `.`, `-`, at most 64."""
    question: str = ""
    """Printed over every plan and report."""
    plugins: Annotated[tuple[str, ...], AS_TUPLE] = ()
    """Python files that register components, relative to this file; see [extending.md](extending.md)."""
    axes: dict[str, Values | RangeOrLevels] = Field(default_factory=dict)
    """The product of these; see [arms](#arms)."""
    one_at_a_time: dict[str, Values | RangeConfig] = Field(default_factory=dict)
    """An arm for each of these; see [arms](#arms)."""
    exclude: list[Condition] = Field(default_factory=list)
    """Rules that take arms out; see [arms](#arms)."""
    include: list[Include] = Field(default_factory=list)
    """Named extra arms; see [arms](#arms)."""
    seeds: SeedCount | Annotated[list[Count], Field(min_length=1)] = 1
    """Their number, or a list."""
    search: SearchConfig | None = None
    """An Optuna search around every arm."""
    compare: CompareConfig = CompareConfig()
    """What the report compares."""
    budget: BudgetConfig = BudgetConfig()
    """What the sweep may cost."""
    stop: StopRule | Annotated[list[StopRule], Field(min_length=1)] | None = None
    """What ends a run early: a rule, or a list of which any suffices."""
    run: RunOptions = RunOptions()
    """How runs are carried out."""
    published: PublishedConfig | None = None
    """What a paper reports of the arms."""
