"""What a search looks for, and how."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from repa_lab.settings import AS_TUPLE, Positive, Settings


class Interval(Settings):
    """One searched field: exactly one of ``log``, ``uniform`` (floats from a to b), ``int`` or ``choice``.

    ``when`` (dotted path to a value or a list of them) searches the field only where these hold of what was drawn for fields
    before it in the space, or of the arm's own settings; elsewhere the field keeps the arm's setting.
    """

    model_config = ConfigDict(json_schema_extra={"minProperties": 1, "maxProperties": 2})

    log: Annotated[list[float], Field(min_length=2, max_length=2)] | None = None
    uniform: Annotated[list[float], Field(min_length=2, max_length=2)] | None = None
    int_: Annotated[list[int], Field(min_length=2, max_length=2)] | None = Field(default=None, alias="int")
    choice: Annotated[list[Any], Field(min_length=1)] | None = None
    when: dict[str, Any] = Field(default_factory=dict)

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
    """The metric that a search improves, by its kind (``frechet`` or ``fid``) or its full name, and its direction.

    Of several objectives, some may be what a run costs: ``seconds`` of training, or those times the GPUs, in ``gpu_hours``.
    """

    metric: str = "frechet"
    goal: Literal["min", "max"] = "min"

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
    """An Optuna search; a trial is one setting with all its seeds; ``trials`` is the total, pruned ones included.

    ``objective`` may be a list: the search then looks for the settings of which none is better in every objective.
    ``storage`` is the URL of a database for the study; null keeps it in a file in the sweep's folder.
    """

    space: Annotated[dict[str, Interval], Field(min_length=1)]
    objective: Objective | Objectives = Objective()
    trials: Positive = 20
    sampler: Literal["tpe", "random", "qmc", "cmaes"] = "tpe"
    prune: Literal["none", "median", "asha", "hyperband"] = "none"
    seed: int = 0
    storage: str | None = None

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """The objectives, be it one or several."""
        return self.objective if isinstance(self.objective, tuple) else (self.objective,)
