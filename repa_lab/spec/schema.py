"""The fields of a spec. What stands in :class:`RunConfig` is part of a run's identity."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from repa_lab.align.settings import EncoderSettings, NoSettings, RegularizerSettings
from repa_lab.data.settings import SourceSettings
from repa_lab.settings import Fraction, HubOrLocal, NotNegative, Positive, Settings, later, settings_in
from repa_lab.spec.averaging import Ema, EmaConfig
from repa_lab.spec.component import COMPONENTS
from repa_lab.spec.evaluate import EvaluateConfig, ExtractorConfig


class ModelConfig(Settings):
    """The denoiser: a ``size`` of a family trained from scratch, or a ``pretrained`` pipeline of diffusers, a hub id or folder.

    A pretrained one is trained in ``full`` or through ``lora`` of a ``rank``. ``revision`` is the hub's branch, tag or commit.
    """

    family: str
    size: str | None = None
    pretrained: HubOrLocal | None = None
    train: Literal["full", "lora"] = "full"
    rank: Positive = 16
    revision: str | None = later(None)


class TrainConfig(Settings):
    """Optimisation: AdamW at a constant rate; defaults are those of the papers' code.

    ``ema`` is the decay of the averaged weights, or ``{decay, warmup}``; see :class:`EmaConfig`.

    ``label_dropout`` is how often the class or the caption is left out. ``time`` is the distribution of times: ``auto`` is
    uniform for SiT and the UNet, as in the papers, and what a pretrained model was trained with.
    """

    steps: Positive
    batch_size: Positive = 256
    lr: Annotated[float, Field(gt=0)] = 1e-4
    weight_decay: NotNegative = 0.0
    grad_clip: Annotated[float, Field(gt=0)] | None = 1.0
    ema: Ema = 0.9999
    label_dropout: Fraction = 0.1
    time: Literal["auto", "uniform", "lognormal"] = "auto"

    @property
    def averaging(self) -> EmaConfig:
        """The averaging of the weights, whichever way ``ema`` is written."""
        return self.ema if isinstance(self.ema, EmaConfig) else EmaConfig(decay=self.ema)


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
    """What the report compares: arms against the ``baseline`` (dotted path to value) on ``metric``; ``targets`` by metric."""

    baseline: dict[str, Any] = Field(default_factory=lambda: {"regularizer.type": "none"})
    metric: str = "frechet"
    goal: Literal["min", "max"] = "min"
    targets: dict[str, list[float]] = Field(default_factory=dict)
