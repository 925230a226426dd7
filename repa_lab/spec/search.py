"""What a search looks for, and how."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from repa_lab.settings import AS_TUPLE, Positive, Settings


class Interval(Settings):
    """One searched field: exactly one of `log`, `uniform`, `int` or `choice`."""

    model_config = ConfigDict(json_schema_extra={"minProperties": 1, "maxProperties": 2})

    log: Annotated[list[float], Field(min_length=2, max_length=2)] | None = None
    """From a to b, both above 0, uniform in the logarithm."""
    uniform: Annotated[list[float], Field(min_length=2, max_length=2)] | None = None
    """Numbers from a to b."""
    int_: Annotated[list[int], Field(min_length=2, max_length=2)] | None = Field(default=None, alias="int")
    """Integers from a to b."""
    choice: Annotated[list[Any], Field(min_length=1)] | None = None
    """One of a list."""
    when: dict[str, Any] = Field(default_factory=dict)
    """Search the field only where these dotted paths have these values, or one of a list; elsewhere the arm's setting stays."""

    @model_validator(mode="after")
    def _one_form(self) -> Interval:
        given = [form for form in (self.log, self.uniform, self.int_, self.choice) if form is not None]
        if len(given) != 1:
            raise ValueError("give exactly one of log, uniform, int, choice")
        for bounds in (self.log, self.uniform, self.int_):
            if bounds is not None and not bounds[0] < bounds[1]:
                raise ValueError(f"the bounds must ascend, got {bounds}")
        if self.log is not None and self.log[0] <= 0:
            raise ValueError(f"a log range must start above 0, got {self.log}")
        return self

    @property
    def ends(self) -> list[Any]:
        """The choices, or the two ends of the range."""
        return self.choice or self.int_ or self.log or self.uniform or []

    @property
    def conditions(self) -> dict[str, list[Any]]:
        """``when`` with a list of allowed values at every path."""
        return {path: allowed if isinstance(allowed, list) else [allowed] for path, allowed in self.when.items()}

    def takes(self, value: Any) -> bool:
        """Whether a value is among the choices or in the range."""
        if self.choice is not None:
            return value in self.choice
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return False
        return bool(self.ends[0] <= value <= self.ends[1]) and (self.int_ is None or value == int(value))


COSTS = ("seconds", "gpu_hours")


class Objective(Settings):
    """What a search improves."""

    metric: str = "frechet"
    """By its kind (`frechet`, `fid`) or its full name; of several objectives, also `seconds` or `gpu_hours`."""
    goal: Literal["min", "max"] = "min"
    """Which values are better."""

    @property
    def is_cost(self) -> bool:
        """Whether it is what a run costs rather than what it measures."""
        return self.metric in COSTS


# A list in a file, a tuple here, so that what is read is fixed.
Objectives = Annotated[
    tuple[Objective, ...],
    AS_TUPLE,
    Field(min_length=1),
]


class SearchConfig(Settings):
    """An Optuna search. A trial is one setting with all its seeds."""

    space: Annotated[dict[str, Interval], Field(min_length=1)]
    """Dotted path to one of `log`, `uniform` (numbers), `int` (each `[from, to]`) or `choice` (a list)."""
    objective: Objective | Objectives = Objective()
    """What is improved; a list looks for the Pareto front."""
    trials: Positive = 20
    """The total, pruned ones included."""
    sampler: Literal["tpe", "random", "qmc", "cmaes"] = "tpe"
    """Optuna's sampler."""
    prune: Literal["none", "median", "asha", "hyperband"] = "none"
    """Optuna's pruner."""
    seed: int = 0
    """Seed of the sampler."""
    storage: str | None = None
    """URL of the study's database; null is a file in the sweep's folder."""

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """The objectives, be it one or several."""
        return self.objective if isinstance(self.objective, tuple) else (self.objective,)
