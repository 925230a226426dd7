"""How a run is measured."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from repa_lab.align.settings import EncoderSettings
from repa_lab.metrics.protocol import METRICS
from repa_lab.settings import AS_TUPLE, BlockIndex, Fraction, LocalFile, Positive, Settings, later


class SamplerConfig(Settings):
    """``ode`` integrates the velocity with ``euler`` or ``heun`` over ``steps``; ``sde`` is the papers' Euler-Maruyama."""

    type: Literal["ode", "sde"] = "ode"
    solver: Literal["euler", "heun"] = "euler"
    steps: Annotated[int, Field(ge=2)] = 50


class GuidanceConfig(Settings):
    """Classifier-free guidance of the drift by ``scale`` for times in [``low``, ``high``]; 1 is none."""

    scale: Annotated[float, Field(ge=1)] = 1.0
    low: Fraction = 0.0
    high: Fraction = 1.0

    @model_validator(mode="after")
    def _low_is_below_high(self) -> GuidanceConfig:
        if self.low > self.high:
            raise ValueError(f"low must not be above high, got {self.low} and {self.high}")
        return self


# `tiny-`, as with encoders, is of random weights, for rehearsals.
ExtractorName = Literal[
    "inception",
    "efficientnet_lite0",
    "dinov2_vits14",
    "dinov2_vitb14",
    "dinov2_vitl14",
    "dinov2_vitg14",
    "tiny-dinov2_vits14",
    "tiny-dinov2_vitb14",
    "tiny-dinov2_vitl14",
    "tiny-dinov2_vitg14",
]


class ExtractorConfig(Settings):
    """Whose features the Frechet distance compares: ``inception`` gives FID; others are named and are not FID.

    ``reference`` is a file of statistics to compare with, such as ADM's VIRTUAL_*.npz; null compares with the training images.
    """

    name: ExtractorName = "inception"
    weights: LocalFile | None = None
    reference: LocalFile | None = later(None)


# Lists in a file, tuples here, as with encoders.
Extractors = Annotated[
    tuple[ExtractorConfig, ...],
    AS_TUPLE,
    Field(min_length=1),
]


def _known_metric(name: str) -> str:
    METRICS[name]
    return name


QualityMetric = Annotated[str, AfterValidator(_known_metric)]
QualityMetrics = Annotated[
    tuple[QualityMetric, ...],
    AS_TUPLE,
    Field(min_length=1),
]
Labelling = Literal["balanced", "random"]
Rounding = Literal["nearest", "truncate"]
Steps = Annotated[tuple[Positive, ...], AS_TUPLE]


class FullConfig(Settings):
    """The protocol of milestones, measured beside the other one ``at`` these steps, or, without any, at the end alone.

    What is null is as in ``evaluate``.
    """

    at: Steps = ()
    samples: Annotated[int, Field(ge=16)] | None = None
    sampler: SamplerConfig | None = None
    guidance: GuidanceConfig | None = None
    labels: Labelling | None = None
    metrics: QualityMetrics | None = None
    extractor: ExtractorConfig | Extractors | None = None


Prompts = Annotated[tuple[str, ...], AS_TUPLE]


class EvaluateConfig(Settings):
    """Measurements on EMA weights ``every`` so many steps and at the end.

    ``metrics`` are computed from the features of one pass over ``samples``; ``extractor`` may be a list, and the first one's
    Frechet distance is what is compared. ``labels`` are every class in turn, or drawn at random. ``full`` is a second, dearer
    protocol for milestones.

    ``encoder`` measures alignment in every arm, baselines included; null measures it with the arm's own encoder, if any.
    ``block_index`` is where, null the regularizer's; ``timestep`` at which noise. ``prompts`` are drawn for people to look at,
    each always from the same noise; without them it is the first samples.

    ``precision`` is the denoiser's while it is measured: ``train`` is that of training, ``tf32`` is float32 with TF32 matrix
    products on a GPU. ``rounding`` makes 8-bit samples. Both hold for ``full`` too.
    """

    every: Positive = 10_000
    samples: Annotated[int, Field(ge=16)] = 10_000
    batch_size: Positive = 125
    sampler: SamplerConfig = SamplerConfig()
    guidance: GuidanceConfig = GuidanceConfig()
    extractor: ExtractorConfig | Extractors = ExtractorConfig()
    encoder: EncoderSettings | None = None
    block_index: BlockIndex | None = None
    timestep: Annotated[float, Field(gt=0, lt=1)] = 0.5
    prompts: Prompts = later(())
    labels: Labelling = later("balanced")
    metrics: QualityMetrics = later(("frechet",))
    full: FullConfig | None = later(None)
    precision: Literal["train", "fp32", "tf32"] = later("train")
    rounding: Rounding = later("nearest")

    @model_validator(mode="after")
    def _tiers_fit(self) -> EvaluateConfig:
        if "frechet" not in self.metrics:
            raise ValueError("metrics must have frechet among them, for it is what runs are compared by")
        off = [step for step in self.full.at if step % self.every] if self.full else []
        if off:
            raise ValueError(f"full.at must be multiples of every ({self.every}), got {off[0]}")
        return self

    @property
    def extractors(self) -> tuple[ExtractorConfig, ...]:
        """The extractors, be it one or several."""
        return self.extractor if isinstance(self.extractor, tuple) else (self.extractor,)

    @property
    def milestone(self) -> EvaluateConfig | None:
        """The protocol of milestones, whole; None without one."""
        if self.full is None:
            return None
        own = {name: getattr(self.full, name) for name in FullConfig.model_fields if name != "at"}
        return self.model_copy(update={"full": None} | {name: value for name, value in own.items() if value is not None})
