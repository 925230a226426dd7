"""The sections of a spec that are not part of a run's identity: search, compare, budget, stop, published, run, axes."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    ConfigDict,
    Discriminator,
    Field,
    PlainSerializer,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)

from repa_lab.errors import hide_passwords, shortened
from repa_lab.settings import Count, NotNegative, Positive, Settings

COSTS = ("seconds", "gpu_hours")
Bounds = Annotated[list[float], Field(min_length=2, max_length=2)]
_NOT_IN_WANDB_NAMES = "/\\#?%:"
_MOST_LOADERS = 8  # processes that load images for one process of a run


class Interval(Settings):
    """A searched field: exactly one of `log`, `uniform`, `int` or `choice`."""

    model_config = ConfigDict(json_schema_extra={"minProperties": 1, "maxProperties": 2})

    log: Bounds | None = None
    """From a to b, both above 0, uniform in the logarithm."""
    uniform: Bounds | None = None
    """Numbers from a to b."""
    int_: Annotated[list[int], Field(min_length=2, max_length=2)] | None = Field(default=None, alias="int")
    """Integers from a to b."""
    choice: Annotated[list[Any], Field(min_length=1)] | None = None
    """One of a list."""
    when: dict[str, Any] = Field(default_factory=dict)
    """Search the field only if these dotted paths have these values, or one of a list; else the arm's value stays."""

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        given = [form for form in (self.log, self.uniform, self.int_, self.choice) if form is not None]
        if len(given) != 1:
            raise ValueError("give exactly one of log, uniform, int, choice")
        if self.choice is None and not self.ends[0] < self.ends[1]:
            raise ValueError(f"the bounds must ascend, got {self.ends}")
        if self.log is not None and self.log[0] <= 0:
            raise ValueError(f"a log range must start above 0, got {self.log}")
        return self

    @property
    def ends(self) -> list[Any]:
        """The choices, or the two ends of the range."""
        return self.choice or self.int_ or self.log or self.uniform or []

    @property
    def values(self) -> Sequence[Any] | None:
        """All choices, or all integers of the range; None for a range of real numbers."""
        return self.choice or (range(self.int_[0], self.int_[1] + 1) if self.int_ else None)

    @property
    def conditions(self) -> dict[str, list[Any]]:
        """``when`` with a list of allowed values for every path."""
        return {path: allowed if isinstance(allowed, list) else [allowed] for path, allowed in self.when.items()}

    def takes(self, value: Any) -> bool:
        """Return whether a value is one of the choices or lies in the range."""
        if self.choice is not None:
            return value in self.choice
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return False
        return bool(self.ends[0] <= value <= self.ends[1]) and (self.int_ is None or value == int(value))


class Objective(Settings):
    """What a search improves."""

    metric: str = "frechet"
    """By its kind (`frechet`, `fid`) or its full name; of several objectives, also `seconds` or `gpu_hours`."""
    goal: Literal["min", "max"] = "min"
    """Which values are better."""

    @property
    def is_cost(self) -> bool:
        """Whether the objective is what a run costs rather than what it measures."""
        return self.metric in COSTS


class SearchConfig(Settings):
    """An Optuna search. A trial is one setting with all its seeds."""

    space: Annotated[dict[str, Interval], Field(min_length=1)]
    """Dotted path to one of `log`, `uniform` (numbers), `int` (each `[from, to]`) or `choice` (a list)."""
    objective: Objective | Annotated[tuple[Objective, ...], Field(min_length=1)] = Objective()
    """What is improved; with a list, the search looks for the Pareto front."""
    trials: Positive = 20
    """The total, pruned ones included."""
    sampler: Literal["tpe", "random", "qmc", "cmaes"] = "tpe"
    """Optuna's sampler."""
    prune: Literal["none", "median", "asha", "hyperband"] = "none"
    """Optuna's pruner."""
    seed: int = 0
    """Seed of the sampler."""
    storage: Annotated[str, PlainSerializer(hide_passwords, when_used="json")] | None = None
    """URL of the study's database; null is the URL in `OPTUNA_STORAGE`, or else a file in the sweep's folder."""

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """``objective`` as a tuple."""
        return self.objective if isinstance(self.objective, tuple) else (self.objective,)


class CompareConfig(Settings):
    """What the report compares."""

    baseline: dict[str, Any] = Field(default_factory=lambda: {"regularizer.type": "none"})
    """The baseline arms: dotted paths, or axes, to values. A list means any of its values."""
    metric: str = "frechet"
    """By its kind or its full name."""
    goal: Literal["min", "max"] = "min"
    """Which values are better."""
    targets: dict[str, list[float]] = Field(default_factory=dict)
    """Metric to values; the report says when each arm reaches them."""


class BudgetConfig(Settings):
    """What a sweep may cost at most."""

    gpu_hours: NotNegative | None = None
    """A sweep that would take more is refused before it starts; null is no limit."""
    disk_gib: NotNegative | None = None
    """GiB of disk; a sweep that would take more is refused."""


class StopRule(Settings):
    """Ends a run once a measured ``metric`` is ``below`` or ``above`` a value, from step ``after`` on.

    A sweep with the rule treats a run that it ended as done. A sweep without the rule resumes the run: the rule is not
    part of the run's identity.
    """

    metric: str = "frechet"
    """By its kind or full name."""
    below: float | None = None
    """Ends the run once the metric is below; give exactly one of the two."""
    above: float | None = None
    """Ends the run once the metric is above."""
    after: Count = 0
    """The first step at which the rule applies."""

    @model_validator(mode="after")
    def _one_side(self) -> Self:
        if (self.below is None) == (self.above is None):
            raise ValueError("give exactly one of below, above")
        return self

    def holds(self, row: Mapping[str, Any]) -> bool:
        """Return whether the run must end.

        Args:
            row: measurements by full metric name, with their ``step``.
        """
        value = row.get(self.metric)
        if value is None or row["step"] < self.after:
            return False
        return bool(value < self.below if self.below is not None else value > self.above)


class PublishedConfig(Settings):
    """What a paper reports of the arms."""

    source: str = ""
    """The paper and its table."""
    protocol: str = ""
    """How the paper measured."""
    tolerance: dict[str, NotNegative] = Field(default_factory=dict)
    """Kind of metric to the largest difference, in the metric's unit, that counts as agreement."""
    basis: str = ""
    """The reason for the tolerance."""
    deviations: tuple[str, ...] = ()
    """Where the spec differs from the paper."""
    arms: dict[str, Annotated[dict[str, float], Field(min_length=1)]] = Field(default_factory=dict)
    """Label to values by kind: `fid`, `sfid`, `is`, `precision`, `recall`."""


def _without_url_characters(name: str) -> str:
    if refused := sorted(set(name) & set(_NOT_IN_WANDB_NAMES)):
        raise ValueError(f"W&B takes no name with {' '.join(_NOT_IN_WANDB_NAMES)}, got {' '.join(refused)} in {name!r}")
    return name


def _without_spaces(name: str) -> str:
    if any(character.isspace() for character in name):
        raise ValueError(f"W&B takes no user or team with spaces, got {name!r}")
    return name


WandbName = Annotated[str, Field(min_length=1, max_length=128), AfterValidator(_without_url_characters)]


class WandbOptions(Settings):
    """Weights & Biases."""

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """`auto` is online with a key in the environment and offline without."""
    project: WandbName = "repa-lab"
    """The W&B project."""
    entity: Annotated[WandbName, AfterValidator(_without_spaces)] | None = None
    """User or team whose project it is; null is the key's own."""
    tags: tuple[Annotated[str, Field(min_length=1, max_length=64)], ...] = ()
    """Added to the tags for family and regularizer."""
    artifacts: Literal[False, "final"] = False
    """`final` uploads the averaged weights of every run that is done."""


class RayOptions(Settings):
    """A Ray cluster."""

    address: str | None = None
    """Null starts a cluster on this machine, `auto` finds a running one, else `host:port`."""
    num_cpus: NotNegative = 1.0
    """CPUs of each run."""
    num_gpus: NotNegative = 0.0
    """GPUs of each run."""
    resources: dict[str, NotNegative] = Field(default_factory=dict)
    """The cluster's own resources of each run."""
    retries: Count = 3
    """How often a run that was lost with its worker or node is started again from its last checkpoint."""


class SlurmOptions(Settings):
    """What each run asks of Slurm."""

    partition: str | None = None
    """The partition; null is the cluster's default."""
    account: str | None = None
    """The account; null is the user's default."""
    time_min: Positive = 1440
    """Minutes that a job may take."""
    gpus_per_node: Count | None = None
    """GPUs of a job; null is those of its runs."""
    cpus_per_task: Positive = 4
    """CPU cores of a task."""
    mem_gb: Positive | None = None
    """Memory of a job in GB; null is the cluster's default."""
    array_parallelism: Positive = 64
    """Most runs at a time."""
    setup: tuple[str, ...] = ()
    """Shell commands before each run."""


@dataclass(frozen=True)
class Machine:
    """What `auto` among the options of a run depends on.

    Attributes:
        half: 16-bit precision of the GPU; None without a GPU.
        compiles: whether `torch.compile` works on the GPU.
        cores: CPU cores for each process of a run.
        processes: processes that train a run together.
    """

    half: Literal["bf16", "fp16"] | None = None
    compiles: bool = True
    cores: int = 1
    processes: int = 1


def cores_here() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class RunOptions(Settings):
    """How runs are carried out. Nothing here changes what is computed, so nothing here is part of a run's identity."""

    executor: Literal["local", "ray", "slurm"] = "local"
    """Where runs are trained."""
    ray: RayOptions = RayOptions()
    """A Ray cluster."""
    slurm: SlurmOptions = SlurmOptions()
    """What each run asks of Slurm."""
    workers: Positive | None = None
    """Runs at a time; null is one for each GPU, or each core without."""
    slots_per_gpu: Positive = 1
    """Runs that share a GPU."""
    gpus_per_run: Positive = 1
    """Processes that share a run, one on each GPU, or on the CPU without any."""
    max_failures: Positive | None = None
    """No further runs are started after so many failures."""
    hang_minutes: Annotated[float, Field(gt=0)] | None = None
    """A run that is silent for so many minutes is started again, once."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where runs are trained."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of the denoiser's forward and backward pass; the weights stay float32. `auto` is bf16 on a GPU (fp16 on
    one without bf16) and fp32 on a CPU. On a GPU, all but fp32 let products that stay float32 use TF32 in training."""
    share: bool = True
    """Train steps that runs have in common once; `--no-share` on the command line."""
    micro_batch: Positive | Literal["auto"] | None = "auto"
    """Images of one forward pass; gradients accumulate over the batch. Null is the whole batch. `auto` begins with it,
    and halves it if memory runs out in a run of one process."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: the same numbers, less memory, more time."""
    compile: Literal["auto"] | bool = "auto"
    """Compile the denoiser with `torch.compile`. `auto` does so on a GPU."""
    encoder_precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of encoders. `auto` is bf16 on a GPU that has it, else fp32."""
    encoder_compile: Literal["auto"] | bool = "auto"
    """Compile encoders with `torch.compile`. `auto` does so on a GPU."""
    encoder_batch_size: Positive | None = None
    """Most images that an encoder sees at a time."""
    encoder_storage: Literal["fp16", "fp32", "fp8", "int8"] = "fp16"
    """Precision of cached features; fp8 and int8 have a scale for each token."""
    log_every: Positive = 10
    """Steps between rows of the training loss."""
    checkpoint_every: Positive | None = None
    """Steps between checkpoints; null is whenever the run is measured."""
    data_workers: Count | Literal["auto"] = "auto"
    """Processes that load images. `auto` is one for each core but one, up to 8, on a GPU, and none on a CPU."""
    wandb: WandbOptions = WandbOptions()
    """Weights & Biases; see [tracking.md](tracking.md)."""
    tensorboard: bool = False
    """Also write TensorBoard's files into each run directory."""

    def resolved(self, machine: Machine) -> ResolvedOptions:
        """Return the options with every `auto` replaced by what is right on a machine; other values stay."""
        has_gpu = machine.half is not None
        auto = {
            "precision": machine.half or "fp32",
            "micro_batch": "auto" if machine.processes == 1 else None,  # several would have to agree on a size
            "compile": has_gpu and machine.compiles,
            "encoder_precision": "bf16" if machine.half == "bf16" else "fp32",
            "encoder_compile": has_gpu and machine.compiles,
            "data_workers": min(machine.cores - 1, _MOST_LOADERS) if has_gpu else 0,
        }
        return ResolvedOptions.model_validate({**dict(self), **{name: auto[name] for name in self.automatic}})

    @property
    def automatic(self) -> tuple[str, ...]:
        """The names of the options that are `auto`."""
        return tuple(name for name, value in self if value == "auto" and name != "device")


class ResolvedOptions(RunOptions):
    """The options of a run on its machine; only ``micro_batch`` may still be `auto`."""

    precision: Literal["fp32", "bf16", "fp16"]
    compile: bool
    encoder_precision: Literal["fp32", "bf16"]
    encoder_compile: bool
    data_workers: Count


# ---- ranges of values on an axis, as a person would list them: 0.3, not floating point's 0.30000000000000004

FORMS = ("range", "linspace", "logspace")
# The forms of a search, which are easily written on an axis by mistake.
_SEARCH_FORMS = ("log", "uniform", "int", "choice")
_MAX_VALUES = 10_000
# Digits of a value that is no short decimal, such as 10 ** 0.5; its label is the value, so it can be typed again.
_DIGITS = 6
Number = int | float
_Three = Annotated[list[Number], Field(min_length=3, max_length=3)]


class RangeConfig(Settings):
    """Evenly spaced values, exactly one of ``range`` [start, stop, step] (stop is included where it falls on a step),
    ``linspace`` [start, stop, count] and ``logspace`` [start, stop, count] (in equal ratios); both ends are
    included."""

    model_config = ConfigDict(json_schema_extra={"minProperties": 1, "maxProperties": 1})

    range: _Three | None = None
    linspace: _Three | None = None
    logspace: _Three | None = None

    @field_validator(*FORMS, mode="before")
    @classmethod
    def _has_values(cls, given: Any, info: ValidationInfo) -> Any:
        """Check three numbers together, so that a mistake is placed at the form."""
        if given is None:
            return None
        numbers, form = given if isinstance(given, list) else [], str(info.field_name)
        if len(numbers) != 3 or not all(isinstance(n, Number) and not isinstance(n, bool) for n in numbers):
            last = "step" if form == "range" else "count"
            raise ValueError(f"expected three numbers, [start, stop, {last}], got {shortened(given)}")
        if not all(map(math.isfinite, numbers)):
            raise ValueError(f"expected finite numbers, got {shortened(given)}")
        _values_of(form, numbers)
        return given

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if len(self.model_dump(exclude_none=True)) != 1:
            raise ValueError(f"give exactly one of {', '.join(FORMS)}")
        return self

    @property
    def form(self) -> str:
        """The form that is given."""
        return next(form for form in FORMS if getattr(self, form) is not None)

    @property
    def values(self) -> list[Number]:
        """The values in order."""
        return _values_of(self.form, getattr(self, self.form))


def _values_of(form: str, numbers: Sequence[Number]) -> list[Number]:
    """Return the values of a range.

    Raises:
        ValueError: the numbers make no range, or a range of too many values.
    """
    start, stop, step = (Decimal(repr(number)) for number in numbers)  # 0.1 is a tenth, not the float next to it
    if form == "range":
        if step == 0 or (stop - start) / step < 0:
            raise ValueError(f"the step {numbers[2]} does not lead from {numbers[0]} to {numbers[1]}")
        count = math.floor((stop - start) / step) + 1
        if count > _MAX_VALUES:
            raise ValueError(f"{count:,} values; at most {_MAX_VALUES:,}")
        values = [start + index * step for index in range(count)]
    else:
        if form == "logspace" and min(start, stop) <= 0:
            raise ValueError(f"a logspace starts and stops above 0, got {numbers}")
        if not isinstance(numbers[2], int) or not 2 <= numbers[2] <= _MAX_VALUES:
            raise ValueError(f"the count is an integer from 2 to {_MAX_VALUES:,}, got {numbers[2]}")
        if start == stop:
            raise ValueError(f"start and stop must differ, got {numbers}")
        last = numbers[2] - 1
        if form == "linspace":
            values = [start + (stop - start) * index / last for index in range(last + 1)]
        else:
            values = [start * (stop / start) ** (Decimal(index) / last) for index in range(last + 1)]
    are_integers = all(isinstance(number, int) for number in numbers)
    for digits in range(_DIGITS, 18):  # as few as tell the values apart
        rounded = [_rounded(value, are_integers, digits) for value in values]
        if len(set(rounded)) == len(values):
            return rounded
    raise ValueError(f"the values are too close to tell apart, got {list(numbers)}")


def _rounded(value: Decimal, may_be_integer: bool, digits: int) -> Number:
    """Return a value as a file has it: exact if it is a short decimal, else with some digits."""
    exact = Decimal(f"{value:.24g}")  # without the error in the last of 28 digits
    if may_be_integer and exact == int(exact):
        return int(exact)
    near = float(exact)
    return near if Decimal(repr(near)) == exact else float(f"{near:.{digits}g}")


def _tag(value: Any) -> str:
    """Return whether an axis that is a mapping is a range or has named levels: levels hold settings or nothing."""
    given = value.items() if isinstance(value, dict) else ()
    forms = (key for key, inner in given if not isinstance(inner, dict | None))
    is_range = any(key in _SEARCH_FORMS or difflib.get_close_matches(key, FORMS, n=1) for key in forms)
    return "\0range" if is_range or isinstance(value, RangeConfig) else "\0levels"


Values = Annotated[list[Any], Field(min_length=1)]
Levels = Annotated[dict[Annotated[str, Field(min_length=1)], dict[str, Any] | None], Field(min_length=1)]
# The tags appear in the paths of pydantic's errors, so they must not be keys of a mapping.
RangeOrLevels = Annotated[
    Annotated[RangeConfig, Tag("\0range")] | Annotated[Levels, Tag("\0levels")], Discriminator(_tag)
]
