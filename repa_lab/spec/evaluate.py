"""The section ``evaluate`` of a spec: how a run is measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from repa_lab.align.settings import EncoderSettings
from repa_lab.metrics.protocol import EXTRACTORS, METRICS
from repa_lab.settings import BlockIndex, Fraction, LocalFile, Positive, Settings, UsedIf, later


class SamplerConfig(Settings):
    """How samples are drawn from a denoiser that is trained from scratch; a pretrained family uses ``steps`` alone."""

    type: Literal["ode", "sde"] = "ode"
    """`ode` integrates the velocity; `sde` is the papers' Euler-Maruyama."""
    solver: Annotated[Literal["euler", "heun"], UsedIf("type", ("ode",))] = "euler"
    """Solver of `ode`."""
    steps: Annotated[int, Field(ge=2)] = 50
    """Sampling steps."""


class GuidanceConfig(Settings):
    """Classifier-free guidance of the drift."""

    scale: Annotated[float, Field(ge=1)] = 1.0
    """Scale of classifier-free guidance; 1 is none."""
    low: Annotated[Fraction, UsedIf("scale", but=(1,))] = 0.0
    """Guidance acts from this time on; 0 is data, 1 is noise."""
    high: Annotated[Fraction, UsedIf("scale", but=(1,))] = 1.0
    """Guidance acts up to this time."""

    @model_validator(mode="after")
    def _low_is_below_high(self) -> Self:
        if self.low > self.high:
            raise ValueError(f"low must not be above high, got {self.low} and {self.high}")
        return self


if TYPE_CHECKING:
    ExtractorName = str
else:
    ExtractorName = Literal[tuple(EXTRACTORS)]


class ExtractorConfig(Settings):
    """The network whose features of samples and real images are compared."""

    name: ExtractorName = "inception"
    """`inception` gives FID, `dinov2_*` the FD-DINOv2, `efficientnet_lite0` a distance that needs no network."""
    weights: LocalFile | None = None
    """A local file of weights."""
    reference: LocalFile | None = later(None)
    """Statistics to compare with, such as ADM's `VIRTUAL_*.npz`; null is the training images."""


Extractors = Annotated[tuple[ExtractorConfig, ...], Field(min_length=1)]


def _known_metric(name: str) -> str:
    METRICS[name]
    return name


QualityMetric = Annotated[str, AfterValidator(_known_metric)]
QualityMetrics = Annotated[tuple[QualityMetric, ...], Field(min_length=1)]
Labelling = Literal["balanced", "random"]
Rounding = Literal["nearest", "truncate"]


class FullConfig(Settings):
    """A second protocol for milestones. A field that is null has the value of ``evaluate``."""

    at: tuple[Positive, ...] = ()
    """Steps to measure at, multiples of `every`; an empty list is the end alone."""
    samples: Annotated[int, Field(ge=16)] | None = None
    """Samples that are drawn."""
    sampler: SamplerConfig | None = None
    """How samples are drawn."""
    guidance: GuidanceConfig | None = None
    """Classifier-free guidance."""
    labels: Labelling | None = None
    """Labels of the samples."""
    metrics: QualityMetrics | None = None
    """Metrics, as in `evaluate.metrics`."""
    extractor: ExtractorConfig | Extractors | None = None
    """One extractor, or a list."""


class EvaluateConfig(Settings):
    """How a run is measured, with the averaged weights. `precision` and `rounding` hold for `full` too."""

    every: Positive = 10_000
    """Steps between measurements; the end is measured too."""
    samples: Annotated[int, Field(ge=16)] = 10_000
    """Samples that are drawn for a measurement."""
    batch_size: Positive = 125
    """Samples drawn at a time."""
    sampler: SamplerConfig = SamplerConfig()
    """How samples are drawn."""
    guidance: GuidanceConfig = GuidanceConfig()
    """Classifier-free guidance."""
    extractor: ExtractorConfig | Extractors = ExtractorConfig()
    """The network whose features are compared, or a list; runs are compared by the Frechet distance of the first."""
    encoder: EncoderSettings | None = None
    """Measures alignment in every arm; fields as in `regularizer.encoder`. Null is the arm's own encoder, if any."""
    block_index: BlockIndex | None = None
    """Where alignment is measured; null is the regularizer's block."""
    timestep: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """The noise at which alignment is measured: 0 is data, 1 is noise."""
    prompts: tuple[str, ...] = later(())
    """Captions that are drawn to look at, always from the same noise; without any, the first samples are shown."""
    labels: Labelling = later("balanced")
    """Every class (or caption) in turn, or drawn at random, which costs about 0.1 of FID."""
    metrics: QualityMetrics = later(("frechet",))
    """`frechet`, `sfid`, `kid`, `inception_score`, `precision_recall`, or a plugin's, from one pass of features; see
    [protocol.md](protocol.md)."""
    full: FullConfig | None = later(None)
    """A second, more expensive protocol for milestones; a field that it leaves out is as above."""
    precision: Literal["train", "fp32", "tf32"] = later("train")
    """Precision of the denoiser in measurements: as in training, float32, or float32 with TF32 matrix products."""
    rounding: Rounding = later("nearest")
    """How samples become 8-bit pixels; `truncate` drops the fraction, as REPA's script does."""

    @model_validator(mode="after")
    def _protocols_fit(self) -> Self:
        if "frechet" not in self.metrics:
            raise ValueError("metrics must have frechet among them, for it is what runs are compared by")
        off = [step for step in self.full.at if step % self.every] if self.full else []
        if off:
            raise ValueError(f"full.at must be multiples of every ({self.every}), got {off[0]}")
        return self

    @property
    def extractors(self) -> tuple[ExtractorConfig, ...]:
        """``extractor`` as a tuple."""
        return self.extractor if isinstance(self.extractor, tuple) else (self.extractor,)

    @property
    def milestone(self) -> EvaluateConfig | None:
        """The protocol of milestones with every field filled in; None without one."""
        if self.full is None:
            return None
        given = {name: getattr(self.full, name) for name in FullConfig.model_fields if name != "at"}
        return self.model_copy(
            update={"full": None} | {name: value for name, value in given.items() if value is not None}
        )
