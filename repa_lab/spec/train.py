"""The section ``train`` of a spec: how a run is optimised."""

from __future__ import annotations

import functools
import math
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from repa_lab.align.settings import Schedule
from repa_lab.settings import Count, Fraction, NotNegative, Positive, Settings, UsedIf, later

_NEGLIGIBLE_SHARE = 0.05  # of the initial weights in their average
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


# At mean 0 and std 1 the section and its type alone are one setting, which is kept as the word.
Time = Annotated[
    Literal["uniform", "logit_normal"] | TimeSettings | None,
    AfterValidator(lambda it: it.type if isinstance(it, TimeSettings) and (it.mean, it.std) == (0.0, 1.0) else it),
]


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
        return math.prod(map(self.decay_at, range(steps))) if self.warmup else self.decay**steps

    @functools.lru_cache  # noqa: B019  a report asks for every run, and there are few settings
    def warning(self, steps: int) -> str | None:
        """Return a warning if more than 5 % of the average after ``steps`` updates are initial weights, else None."""
        if (share := self.initial_share(steps)) <= _NEGLIGIBLE_SHARE:
            return None
        return (
            f"train.ema: at decay {self.decay:g} the measured average still holds {100 * share:.0f} % of the initial "
            f"weights after {steps:,} steps; set train.ema.warmup, or lower the decay"
        )


# A section without a warm-up is kept as the number: one setting must have one form, for it is part of run ids.
Ema = Annotated[
    Decay | EmaConfig, AfterValidator(lambda it: it.decay if isinstance(it, EmaConfig) and not it.warmup else it)
]


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
