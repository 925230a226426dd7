"""The fields of a spec. What stands in :class:`RunConfig` is part of a run's identity."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from repa_lab.align.schedule import Schedule
from repa_lab.align.settings import EncoderSettings, NoSettings, RegularizerSettings
from repa_lab.data.settings import SourceSettings
from repa_lab.settings import Fraction, HubOrLocal, NotNegative, Positive, Settings, later, settings_in
from repa_lab.spec.averaging import Ema, EmaConfig
from repa_lab.spec.component import COMPONENTS
from repa_lab.spec.evaluate import EvaluateConfig, ExtractorConfig
from repa_lab.spec.optimization import LearningRateSettings, LossWeightSettings, OptimizerSettings


class ModelConfig(Settings):
    """The denoiser."""

    family: str
    """The family; `repa-lab families` lists them."""
    size: str | None = None
    """Size of a family that is trained from scratch: `B/2`, ..."""
    pretrained: HubOrLocal | None = None
    """Of any other family: a hub id or a folder of a diffusers pipeline."""
    train: Literal["full", "lora"] = "full"
    """Train all weights, or a LoRA."""
    rank: Positive = 16
    """Rank of the LoRA."""
    revision: str | None = later(None)
    """The hub's branch, tag or commit."""


class TrainConfig(Settings):
    """How a run is optimised; the defaults are those of the papers' code."""

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
    """The largest norm of the gradient; null leaves it as it is."""
    ema: Ema = 0.9999
    """The averaged weights, which are measured: the decay, or `{decay, warmup}`."""
    label_dropout: Fraction = 0.1
    """How often the class or the caption is left out."""
    loss_weight: LossWeightSettings = later(LossWeightSettings())
    """The weight of a sample's denoising loss by its noise."""
    time: Literal["auto", "uniform", "lognormal"] = "auto"
    """Distribution of times; `auto` is uniform from scratch, as in the papers, else what the model was trained with."""

    @property
    def averaging(self) -> EmaConfig:
        """The averaging of the weights, whichever way ``ema`` is written."""
        return self.ema if isinstance(self.ema, EmaConfig) else EmaConfig(decay=self.ema)

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of the step after ``step`` earlier ones."""
        schedule = self.lr_schedule
        if step < schedule.warmup_steps:
            return self.lr * (step + 1) / (schedule.warmup_steps + 1)
        if schedule.type == "constant":
            return self.lr
        return self.lr * Schedule(1.0, self.steps, **schedule.model_dump())(step)


class RunConfig(Settings):
    """All that decides what a run computes, but for its seed."""

    model: ModelConfig
    regularizer: Annotated[RegularizerSettings, COMPONENTS["regularizer"]] = NoSettings()
    data: Annotated[SourceSettings, COMPONENTS["data"]]
    train: TrainConfig
    evaluate: EvaluateConfig = EvaluateConfig()

    @property
    def milestones(self) -> tuple[int, ...]:
        """The steps at which the protocol of milestones is measured."""
        full, steps = self.evaluate.full, self.train.steps
        return () if full is None else tuple(step for step in full.at if step <= steps) or (steps,)

    @property
    def alignment_encoder(self) -> EncoderSettings | None:
        """The encoder that measures alignment, or None if nothing does."""
        return self.evaluate.encoder or next(iter(self.regularizer.encoders), None)

    @property
    def encoder_paths(self) -> tuple[tuple[str, EncoderSettings], ...]:
        """Every encoder the run needs with its dotted path: none for an unregularised run that measures no alignment."""
        sections = {"regularizer": self.regularizer, "evaluate": self.evaluate}
        found = (pair for name, section in sections.items() for pair in settings_in(section, (name,)))
        return tuple((".".join(map(str, path)), value) for path, value in found if isinstance(value, EncoderSettings))

    @property
    def extractor_paths(self) -> tuple[tuple[str, ExtractorConfig], ...]:
        """Every extractor that measures samples, with its dotted path."""
        found = settings_in(self.evaluate, ("evaluate",))
        return tuple((".".join(map(str, path)), value) for path, value in found if isinstance(value, ExtractorConfig))


SECTIONS = tuple(RunConfig.model_fields)


class CompareConfig(Settings):
    """What the report compares."""

    baseline: dict[str, Any] = Field(default_factory=lambda: {"regularizer.type": "none"})
    """Dotted paths, or axes, to values: the arms that others are compared with. A list means any of its values."""
    metric: str = "frechet"
    """By its kind or its full name."""
    goal: Literal["min", "max"] = "min"
    """Which values are better."""
    targets: dict[str, list[float]] = Field(default_factory=dict)
    """Metric to values: when does an arm reach them."""
