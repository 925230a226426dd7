"""The fields of a spec file. The fields of :class:`RunConfig` are part of a run's identity; no other field is."""

from __future__ import annotations

import functools
import math
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import AfterValidator, Field, field_validator, model_validator

from repa_lab.align.settings import REGULARIZERS, EncoderSettings, NoSettings, RegularizerSettings, Schedule
from repa_lab.data.settings import SOURCES, SourceSettings
from repa_lab.settings import (
    Count,
    Fraction,
    HubOrLocal,
    NotNegative,
    Positive,
    Settings,
    SettingsOf,
    UsedIf,
    later,
    settings_in,
)
from repa_lab.spec.errors import dotted
from repa_lab.spec.evaluate import EvaluateConfig, ExtractorConfig
from repa_lab.spec.options import BudgetConfig, CompareConfig, PublishedConfig, RunOptions, SearchConfig, StopRule
from repa_lab.spec.ranges import RangeConfig, RangeOrLevels, Values

S = TypeVar("S", bound=Settings)

# The sections whose fields are those of the component that they name.
COMPONENTS = {
    "regularizer": SettingsOf(REGULARIZERS, "type", "none", several=True),
    "data": SettingsOf(SOURCES, "source", None),
}


class ModelConfig(Settings):
    """The denoiser."""

    family: str
    """The family; `repa-lab families` lists them."""
    size: str | None = None
    """Size of a family that is trained from scratch: `B/2`, ..."""
    pretrained: HubOrLocal | None = None
    """For all other families: a hub id or a folder of a diffusers pipeline."""
    train: Literal["full", "lora"] = "full"
    """Train all weights, or a LoRA."""
    rank: Annotated[Positive, UsedIf("train", ("lora",))] = 16
    """Rank of the LoRA."""
    revision: str | None = later(None)
    """The hub's branch, tag or commit."""


_MOMENTS = ("betas", "eps")
# Classes of torch.optim by name, and the settings below that each takes.
OPTIMIZERS: dict[str, tuple[str, ...]] = {
    "AdamW": _MOMENTS,
    "Adam": _MOMENTS,
    "Adamax": _MOMENTS,
    "NAdam": _MOMENTS,
    "RAdam": _MOMENTS,
    "RMSprop": ("eps", "momentum"),
    "SGD": ("momentum",),
    "Adagrad": ("eps",),
    "Adadelta": ("eps",),
    "Adafactor": (),
}
Decay = Annotated[float, Field(ge=0, lt=1)]


class OptimizerSettings(Settings):
    """A class of torch.optim; null leaves a setting at the class's own default."""

    type: Literal["AdamW", "Adam", "Adamax", "NAdam", "RAdam", "RMSprop", "SGD", "Adagrad", "Adadelta", "Adafactor"] = (
        "AdamW"
    )
    """The class."""
    betas: tuple[Decay, Decay] | None = None
    """Decays of the averages of the gradient and of its square."""
    eps: NotNegative | None = None
    """Added to the denominator."""
    momentum: Fraction | None = None
    """Momentum of `SGD` and `RMSprop`."""

    @model_validator(mode="after")
    def _class_takes_them(self) -> Self:
        for name in ("betas", "eps", "momentum"):
            if getattr(self, name) is not None and name not in OPTIMIZERS[self.type]:
                takes = ", ".join(OPTIMIZERS[self.type]) or "none of them"
                raise ValueError(f"{self.type} has no {name}; of betas, eps and momentum it takes {takes}")
        return self

    @property
    def arguments(self) -> dict[str, object]:
        """The settings that are not null, as arguments of the class."""
        given = {name: getattr(self, name) for name in OPTIMIZERS[self.type]}
        return {name: value for name, value in given.items() if value is not None}


class LearningRateSettings(Settings):
    """The learning rate over steps, as a share of `train.lr`: a linear warm-up from 0, then a decay to `end`."""

    type: Literal["constant", "linear", "cosine"] = "constant"
    """The shape of the decay."""
    warmup_steps: Count = 0
    """Steps over which the rate rises from 0; the first step has the share 1 / (warmup_steps + 1)."""
    decay_steps: Annotated[Count, UsedIf("type", but=("constant",))] = 0
    """The step at which the decay ends, counted from 0, warm-up included; 0 is the end of training."""
    end: Annotated[Fraction, UsedIf("type", but=("constant",))] = 0.0
    """The share of `train.lr` at the end of the decay."""

    @model_validator(mode="after")
    def _decay_ends_after_warmup(self) -> Self:
        if self.type != "constant" and 0 < self.decay_steps <= self.warmup_steps:
            raise ValueError("decay_steps is counted from step 0, so it must be more than warmup_steps")
        return self

    def depends_on_length(self) -> bool:
        """Return whether the rate at a step depends on the length of the training."""
        return self.type != "constant" and not self.decay_steps


class LossWeightSettings(Settings):
    """The weight of a sample's denoising loss, by the sample's noise."""

    type: Literal["none", "min_snr"] = "none"
    """`min_snr` (2303.09556) weights the clean image's error by min(signal-to-noise ratio, `gamma`)."""
    gamma: Annotated[float, Field(gt=0), UsedIf("type", ("min_snr",))] = 5.0
    """The largest signal-to-noise ratio that counts."""


class TimeSettings(Settings):
    """The distribution of the times at which a denoiser is trained, from 0 (data) to 1 (noise)."""

    type: Literal["uniform", "logit_normal"] = "logit_normal"
    """`logit_normal` draws the logit of the time from a normal distribution (SD3, 2403.03206)."""
    mean: Annotated[float, UsedIf("type", ("logit_normal",))] = 0.0
    """Mean of the logit of `logit_normal`; above 0 there is more noise."""
    std: Annotated[float, Field(gt=0), UsedIf("type", ("logit_normal",))] = 1.0
    """Standard deviation of the logit of `logit_normal`."""

    @model_validator(mode="after")
    def _uniform_has_no_moments(self) -> Self:
        if self.type == "uniform" and (self.mean, self.std) != (0.0, 1.0):
            raise ValueError("uniform has no mean and no std; they are settings of logit_normal")
        return self


def _shortest(time: str | TimeSettings | None) -> str | TimeSettings | None:
    return time.type if isinstance(time, TimeSettings) and (time.mean, time.std) == (0.0, 1.0) else time


# At mean 0 and std 1 the section and its type alone are one setting, which is kept as the word.
Time = Annotated[Literal["uniform", "logit_normal"] | TimeSettings | None, AfterValidator(_shortest)]


_NEGLIGIBLE_SHARE = 0.05  # of initial weights in an average


class EmaConfig(Settings):
    """The moving average of the weights: ``decay * average + (1 - decay) * weights`` after every step."""

    decay: Decay = 0.9999
    """The share of the average that an update keeps."""
    warmup: bool = False
    """Keep at most `(1 + n) / (10 + n)` after `n` updates, so that short runs forget their initial weights."""

    def decay_at(self, updates: int) -> float:
        """Return the decay of the update that follows ``updates`` earlier ones."""
        return min(self.decay, (1 + updates) / (10 + updates)) if self.warmup else self.decay

    def initial_share(self, steps: int) -> float:
        """Return the share of the initial weights in the average after ``steps`` updates: the product of the decays."""
        return _initial_share(self, steps)

    def warning(self, steps: int) -> str | None:
        """Return a warning if more than 5 % of the average after ``steps`` updates are initial weights, else None."""
        if (share := self.initial_share(steps)) <= _NEGLIGIBLE_SHARE:
            return None
        return (
            f"train.ema: at decay {self.decay:g} the measured average still holds {100 * share:.0f} % of the initial "
            f"weights after {steps:,} steps; set train.ema.warmup, or lower the decay"
        )


@functools.lru_cache  # a report asks for every run, and warm-up takes a product over all steps
def _initial_share(ema: EmaConfig, steps: int) -> float:
    return math.prod(map(ema.decay_at, range(steps))) if ema.warmup else ema.decay**steps


def _without_section(ema: float | EmaConfig) -> float | EmaConfig:
    return ema.decay if isinstance(ema, EmaConfig) and not ema.warmup else ema


# A section without a warm-up is kept as the number: one setting must have one form, for it is part of run ids.
Ema = Annotated[Decay | EmaConfig, AfterValidator(_without_section)]


class TrainConfig(Settings):
    """The optimisation of a run; the defaults are those of the papers' code."""

    steps: Positive
    """Optimizer steps."""
    batch_size: Positive = 256
    """Images of a step, whatever the micro-batch and the number of GPUs."""
    lr: Annotated[float, Field(gt=0)] = 1e-4
    """The learning rate."""
    lr_schedule: LearningRateSettings = later(LearningRateSettings())
    """The learning rate over steps."""
    optimizer: OptimizerSettings = later(OptimizerSettings())
    """The optimizer."""
    weight_decay: NotNegative = 0.0
    """The optimizer's weight decay."""
    grad_clip: Annotated[float, Field(gt=0)] | None = 1.0
    """The largest norm of the gradient; null does not clip."""
    ema: Ema = 0.9999
    """The averaged weights, which are measured: the decay, or `{decay, warmup}`."""
    label_dropout: Fraction = 0.1
    """How often the class or the caption is left out."""
    loss_weight: LossWeightSettings = later(LossWeightSettings())
    """The weight of a sample's denoising loss, by the sample's noise."""
    time: Time = None
    """Distribution of times, a type or `{type, mean, std}`; null is uniform from scratch, as in the papers, else what
    the model was trained with."""

    @property
    def averaging(self) -> EmaConfig:
        """``ema`` as a section."""
        return self.ema if isinstance(self.ema, EmaConfig) else EmaConfig(decay=self.ema)

    @property
    def times(self) -> TimeSettings | None:
        """``time`` as a section; None is the distribution that the model was trained with."""
        return TimeSettings(type=self.time) if isinstance(self.time, str) else self.time

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of the step that follows ``step`` earlier ones."""
        schedule = self.lr_schedule
        if step < schedule.warmup_steps:
            return self.lr * (step + 1) / (schedule.warmup_steps + 1)
        if schedule.type == "constant":
            return self.lr
        return self.lr * Schedule(1.0, self.steps, **schedule.model_dump())(step)


class RunConfig(Settings):
    """All settings that decide what a run computes, except its seed."""

    model: ModelConfig
    regularizer: Annotated[RegularizerSettings | tuple[RegularizerSettings, ...], COMPONENTS["regularizer"]] = (
        NoSettings()
    )
    data: Annotated[SourceSettings, COMPONENTS["data"]]
    train: TrainConfig
    evaluate: EvaluateConfig = EvaluateConfig()

    @field_validator("regularizer")
    @classmethod
    def _names_differ(
        cls, given: RegularizerSettings | tuple[RegularizerSettings, ...]
    ) -> RegularizerSettings | tuple[RegularizerSettings, ...]:
        if isinstance(given, RegularizerSettings):
            if given.name is not None:
                raise ValueError(f"name '{given.name}' tells a list's regularizers apart: leave it out, or make a list")
            return given
        labels = [member.label for member in given if member.name is not None or member.type != "none"]
        if twice := next((label for label in labels if labels.count(label) > 1), None):
            raise ValueError(f"two regularizers of the list are called '{twice}': give each a name of its own")
        return given

    @property
    def regularizer_paths(self) -> tuple[tuple[str, RegularizerSettings], ...]:
        """Every regularizer with its dotted path; ``none`` is left out."""
        return tuple(pair for pair in self._inside(RegularizerSettings, "regularizer") if pair[1].type != "none")

    @property
    def regularizers(self) -> tuple[RegularizerSettings, ...]:
        """Every regularizer; ``none`` is left out."""
        return tuple(settings for _, settings in self.regularizer_paths)

    @property
    def milestones(self) -> tuple[int, ...]:
        """The steps that are measured by the protocol of milestones."""
        full, steps = self.evaluate.full, self.train.steps
        return () if full is None else tuple(step for step in full.at if step <= steps) or (steps,)

    @property
    def alignment_encoder(self) -> EncoderSettings | None:
        """The encoder that measures alignment; None if alignment is not measured."""
        targets = (encoder for settings in self.regularizers for encoder in settings.encoders)
        return self.evaluate.encoder or next(targets, None)

    @property
    def encoder_paths(self) -> tuple[tuple[str, EncoderSettings], ...]:
        """Every encoder of the run with its dotted path, whether it is a target or measures alignment."""
        return self._inside(EncoderSettings, "regularizer", "evaluate")

    @property
    def extractor_paths(self) -> tuple[tuple[str, ExtractorConfig], ...]:
        """Every extractor that measures samples, with its dotted path."""
        return self._inside(ExtractorConfig, "evaluate")

    def _inside(self, kind: type[S], *sections: str) -> tuple[tuple[str, S], ...]:
        """Return the settings of a kind inside sections, each with its dotted path."""
        settings = (pair for name in sections for pair in settings_in(getattr(self, name), (name,)))
        return tuple((dotted(path), value) for path, value in settings if isinstance(value, kind))


SECTIONS = tuple(RunConfig.model_fields)

Condition = Annotated[dict[str, Any], Field(min_length=1)]
SeedCount = Annotated[int, Field(ge=1, le=1000)]


class Include(Settings):
    """A named extra arm."""

    label: Annotated[str, Field(min_length=1)]
    """The arm's name, one line of text."""
    set: dict[str, Any]
    """The arm's settings by dotted path."""


class SpecFile(Settings):
    """A whole spec file. The sections of :class:`RunConfig` are plain mappings here: they are validated arm by arm.

    ``base`` names a spec file below this one, and ``use`` the fragments between the two; both are merged before the
    document is validated.
    """

    base: str | None = None
    """A spec file under this one, relative to this file."""
    use: str | tuple[str, ...] | None = None
    """A fragment, or a list of them, between the base and this file; relative to this file."""
    model: dict[str, Any] = Field(default_factory=dict)
    """The denoiser."""
    regularizer: dict[str, Any] | list[dict[str, Any]] = Field(default_factory=dict)
    """What is added to the denoising loss: a section, or a list of sections."""
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
    plugins: tuple[str, ...] = ()
    """Python files that register components, relative to this file; see [extending.md](extending.md)."""
    axes: dict[str, Values | RangeOrLevels] = Field(default_factory=dict)
    """Arms for every combination of these; see [arms](#arms)."""
    one_at_a_time: dict[str, Values | RangeConfig] = Field(default_factory=dict)
    """An arm for each of these; see [arms](#arms)."""
    exclude: list[Condition] = Field(default_factory=list)
    """Rules that remove arms; see [arms](#arms)."""
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
    """What ends a run early: a rule, or a list of rules of which any one is enough."""
    run: RunOptions = RunOptions()
    """How runs are carried out."""
    published: PublishedConfig | None = None
    """What a paper reports of the arms."""

    @field_validator("base", "use")
    @classmethod
    def _is_merged(cls, value: object) -> None:
        if value is not None:
            raise ValueError("only a spec file can name other files; give a mapping whole")
