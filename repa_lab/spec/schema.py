"""The fields of a spec. What stands in :class:`RunConfig` is part of a run's identity."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from repa_lab.spec.averaging import Ema, EmaConfig
from repa_lab.spec.evaluate import EvaluateConfig, ExtractorConfig
from repa_lab.spec.regularizer import EncoderConfig, RegularizerConfig
from repa_lab.spec.section import Fraction, NotNegative, Positive, Section, later

_HELD_OUT = 256


class ModelConfig(Section):
    """The denoiser: a ``size`` of a family trained from scratch, or a ``pretrained`` pipeline of diffusers, a hub id or folder.

    A pretrained one is trained in ``full`` or through ``lora`` of a ``rank``. ``revision`` is the hub's branch, tag or commit.
    """

    family: str
    size: str | None = None
    pretrained: str | None = None
    train: Literal["full", "lora"] = "full"
    rank: Positive = 16
    revision: str | None = later(None)


class BucketsConfig(Section):
    """Images keep about their aspect: sizes are multiples of ``step`` pixels of about the area of a square of the resolution,
    one side at most ``max_aspect`` times the other."""

    step: Positive = 64
    max_aspect: Annotated[float, Field(ge=1)] = 2.0


FOLDER_SOURCES = ("imagefolder", "datasets", "repa")
# The sources that a field of `data` belongs to, where it does not belong to all.
SOURCES_OF = {
    "path": FOLDER_SOURCES,
    "name": ("hub",),
    "config": ("hub",),
    "split": ("hub",),
    "revision": ("hub",),
    "caption_column": ("imagefolder", "datasets", "hub"),
}


class DataConfig(Section):
    """The images: scikit-learn's digits, a folder of images, a folder that `Dataset.save_to_disk` of `datasets` wrote, a
    folder that REPA's preprocessing or `repa-lab data prepare` wrote (``repa``), whose latents are taken as they are, or a
    ``split`` of the data set ``name`` of the Hugging Face hub, at a ``revision`` (a branch, a tag or a commit).

    ``resolution`` null is 256, or 8 for digits. ``vae`` (a hub id or folder) trains in its latent space; a pretrained model has
    its own. ``holdout`` images are never trained on; null is 256 or, if that is less, a tenth of the images, one at least.
    ``flip`` mirrors every other image at random as it is seen; ``buckets`` keeps aspects, where null cuts squares.
    ``caption_column`` names the column of captions; null is ``text``, ``caption`` or ``prompt``, the first there is.
    """

    source: Literal["digits", "imagefolder", "datasets", "repa", "hub"]
    path: str | None = None
    resolution: Positive | None = None
    vae: str | None = None
    holdout: Positive | None = None
    flip: bool = later(False)
    buckets: BucketsConfig | None = later(None)
    caption_column: str | None = later(None)
    name: str | None = later(None)
    config: str | None = later(None)
    split: str = later("train")
    revision: str | None = later(None)

    @model_validator(mode="after")
    def _fields_are_of_the_source(self) -> DataConfig:
        for name, sources in SOURCES_OF.items():
            if self.source not in sources and getattr(self, name) != type(self).model_fields[name].default:
                advice = "leave it out, or set data.source"
                raise ValueError(f"{name} is a field of source {' or '.join(sources)}, not of {self.source}: {advice}")
        if self.source == "hub" and self.name is None:
            raise ValueError("source hub takes the name of a data set: owner/name")
        return self

    @model_validator(mode="after")
    def _digits_are_8x8(self) -> DataConfig:
        if self.source == "digits" and self.resolution not in (None, 8):
            raise ValueError("digits are 8 pixels wide and high: resolution must be 8 or left out")
        return self

    @model_validator(mode="after")
    def _prepared_is_fixed(self) -> DataConfig:
        if self.source == "repa" and (self.flip or self.buckets):
            raise ValueError("prepared latents are of square images, none of them mirrored: leave flip and buckets out")
        return self

    def held_out(self, images: int | None) -> int:
        """How many of so many images are held out; None where their number is not known. Of the digits 256 always were."""
        if self.holdout is not None:
            return self.holdout
        if images is None or self.source == "digits":
            return _HELD_OUT
        return max(1, min(_HELD_OUT, images // 10))

    @property
    def side(self) -> int:
        """Pixels along each side of a training image."""
        return 8 if self.source == "digits" else self.resolution or 256


class TrainConfig(Section):
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


class RunConfig(Section):
    """All that decides what a run computes, but for its seed."""

    model: ModelConfig
    regularizer: RegularizerConfig = RegularizerConfig()
    data: DataConfig
    train: TrainConfig
    evaluate: EvaluateConfig = EvaluateConfig()

    @property
    def milestones(self) -> tuple[int, ...]:
        """The steps at which the protocol of milestones is measured."""
        full, steps = self.evaluate.full, self.train.steps
        return () if full is None else tuple(step for step in full.at if step <= steps) or (steps,)

    @property
    def alignment_encoder(self) -> EncoderConfig | None:
        """The encoder that measures alignment, or None if nothing does."""
        return self.evaluate.encoder or next(iter(self.regularizer.encoders), None)

    @property
    def encoder_paths(self) -> tuple[tuple[str, EncoderConfig], ...]:
        """Every encoder the run needs with its dotted path: none for an unregularised run that measures no alignment."""
        own = self.regularizer.encoders
        several = isinstance(self.regularizer.encoder, tuple)
        named = [(f"regularizer.encoder.{i}" if several else "regularizer.encoder", one) for i, one in enumerate(own)]
        measuring = [("evaluate.encoder", self.evaluate.encoder)] if self.evaluate.encoder else []
        return (*named, *measuring)

    @property
    def extractor_paths(self) -> tuple[tuple[str, ExtractorConfig], ...]:
        """Every extractor that measures samples, with its dotted path."""
        full = self.evaluate.full and self.evaluate.full.extractor
        held = {"evaluate.extractor": self.evaluate.extractor, "evaluate.full.extractor": full}
        several = {path: value for path, value in held.items() if isinstance(value, tuple)}
        lone = [(path, value) for path, value in held.items() if isinstance(value, ExtractorConfig)]
        return (*lone, *((f"{path}.{i}", one) for path, value in several.items() for i, one in enumerate(value)))


SECTIONS = tuple(RunConfig.model_fields)


class CompareConfig(Section):
    """What the report compares: arms against the ``baseline`` (dotted path to value) on ``metric``; ``targets`` by metric."""

    baseline: dict[str, Any] = Field(default_factory=lambda: {"regularizer.type": "none"})
    metric: str = "frechet"
    goal: Literal["min", "max"] = "min"
    targets: dict[str, list[float]] = Field(default_factory=dict)
