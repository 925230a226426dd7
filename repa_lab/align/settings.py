"""The registry of regularizers, their settings, and the weight over steps. Imports no torch: planning is fast."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import BeforeValidator, Field, model_validator

from repa_lab.align.needs import Needs, Overhead, Sizes, TrainingFacts
from repa_lab.registry import Registry
from repa_lab.settings import (
    BlockIndex,
    Count,
    HubOrLocal,
    LocalFile,
    NotNegative,
    Positive,
    Settings,
    UsedIf,
    settings_in,
)

if TYPE_CHECKING:
    from repa_lab.align.regularizer import Regularizer

C = TypeVar("C", bound=type)


class EncoderSettings(Settings):
    """The frozen vision encoder whose patch tokens are the target."""

    name: str = "dinov2_vitg14"
    """A registered encoder, or any model of timm."""
    image_size: Positive | None = None
    """Side of the encoder's input in pixels; null is the papers' rule (an image of 256 is seen at 224 by patch 14)."""
    weights: LocalFile | None = None
    """A local file of weights, for use without the hub."""
    standardize: bool = False
    """Give every channel mean 0 and standard deviation 1 over the data set's tokens."""
    cache: bool = True
    """Compute the features once for all runs and store them."""
    pixels: Literal["image", "vae", "tae"] = "image"
    """The encoder's input: the image, as in the papers, or its reconstruction by the VAE or a tiny autoencoder."""
    tae: Annotated[HubOrLocal | None, UsedIf("pixels", ("tae",))] = None
    """The tiny autoencoder that `pixels: tae` decodes with."""

    @model_validator(mode="after")
    def _settings_fit(self) -> Self:
        if self.standardize and not self.cache:
            raise ValueError("standardize needs the statistics of all features, so cache must be true")
        if (self.pixels == "tae") != (self.tae is not None):
            raise ValueError("tae names the tiny autoencoder that pixels: tae decodes with; give both or neither")
        return self


ProjectorType = Literal["mlp", "linear", "conv"]


class ProjectorSettings(Settings):
    """The trainable map from the denoiser's width to the encoder's."""

    type: ProjectorType = "mlp"
    """REPA's three layers with SiLU, SimpleTuner's LayerNorm + Linear, or iREPA's convolution over the grid."""
    width: Annotated[Positive, UsedIf("type", ("mlp",))] = 2048
    """Hidden width of `mlp`."""
    kernel: Annotated[Positive, UsedIf("type", ("conv",))] = 3
    """Size of the `conv` kernel; odd."""

    @model_validator(mode="after")
    def _kernel_is_odd(self) -> Self:
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, so that tokens keep their places; got {self.kernel}")
        return self

    def overhead(self, in_dim: int, out_dim: int, tokens: float) -> Overhead:
        """Return what the map of so many tokens adds to a step."""
        if self.type == "linear":
            parameters, macs, hidden = in_dim * out_dim + out_dim + 2 * in_dim, in_dim * out_dim, in_dim
        elif self.type == "conv":
            macs = self.kernel**2 * in_dim * out_dim
            parameters, hidden = macs + out_dim, in_dim
        else:
            macs = in_dim * self.width + self.width**2 + self.width * out_dim
            parameters, hidden = macs + 2 * self.width + out_dim, 4 * self.width  # before and after each SiLU
        return Overhead(parameters, macs * tokens, hidden * tokens)


class ResampleSettings(Settings):
    """How different grids are matched.

    In U-REPA (2503.18414), resampling the student is better than shrinking the teacher (Table 6: FID 5.72 against
    5.99), and projecting first is better than resampling first (Table 7: 5.72 against 5.84).
    """

    side: Literal["student", "teacher"] = "student"
    """Which side is resampled to the other's grid."""
    when: Literal["after", "before"] = "after"
    """Whether the student is resampled after or before the projector."""


class ManifoldSettings(Settings):
    """Which pairs U-REPA's manifold loss compares, and how."""

    scope: Literal["intra", "batch_pooled", "batch_tokens"] = "intra"
    """Pairs of tokens of one image, of images by their mean token, or of tokens of the whole batch.

    The last two compare the images of one forward pass in all processes: they depend on the micro-batch, not on the
    number of processes."""
    reduction: Literal["mean", "sum", "offdiag_mean"] = "mean"
    """Mean over all N*N pairs, their sum, or the mean without pairs of a token with itself; then mean over images."""
    distance: Literal["l2", "l1_margin"] = "l2"
    """The squared difference of two similarities, or the amount by which the absolute difference exceeds `margin`."""
    margin: Annotated[NotNegative, UsedIf("distance", ("l1_margin",))] = 0.1
    """Margin of `l1_margin`: 0.1 in VideoREPA's relation loss, 0.25 in VA-VAE's matrix loss."""
    sample: Annotated[int, Field(ge=2), UsedIf("scope", ("batch_tokens",))] = 2048
    """Most tokens that `batch_tokens` compares, drawn anew at every step."""


_WithThreshold = UsedIf("similarity_threshold", but=(None,))


class ScheduleSettings(Settings):
    """The weight over steps: a linear warm-up from 0, a decay from `weight` to `end`, and 0 after a cutoff."""

    type: Literal["constant", "linear", "cosine", "polynomial"] = "constant"
    """The shape of the decay."""
    warmup_steps: Count = 0
    """Steps over which the weight rises from exactly 0."""
    decay_steps: Annotated[Count, UsedIf("type", but=("constant",))] = 0
    """The step at which the decay ends, counted from 0, warm-up included; 0 is the end of training."""
    end: Annotated[NotNegative, UsedIf("type", but=("constant",))] = 0.0
    """The weight at the end of the decay and after it."""
    cutoff_step: Count | None = None
    """The weight is exactly 0 from this step on; null or 0 is no cutoff."""
    power: Annotated[NotNegative, UsedIf("type", ("polynomial",))] = 1.0
    """The exponent of `polynomial`."""
    similarity_threshold: Annotated[float, Field(ge=-1, le=1)] | None = None
    """The weight is 0 once the smoothed mean cosine of the tokens has reached this value; null is no threshold."""
    similarity_ema_decay: Annotated[float, Field(ge=0, lt=1), _WithThreshold] = 0.99
    """Decay of the smoothed cosine; at 0 each step is judged alone."""
    similarity_min_count: Annotated[Positive, _WithThreshold] = 100
    """Steps before the threshold applies, so that an early spike switches nothing off."""
    threshold_mode: Annotated[Literal["permanent", "recoverable"], _WithThreshold] = "permanent"
    """Whether the weight stays 0, or returns when the cosine falls below the threshold."""
    probe_every: Annotated[Positive, _WithThreshold, UsedIf("threshold_mode", ("recoverable",))] = 50
    """Steps between measurements of the cosine while a recoverable threshold holds the weight at 0."""

    @model_validator(mode="after")
    def _decay_ends_after_warmup(self) -> Self:
        if self.type != "constant" and 0 < self.decay_steps <= self.warmup_steps:
            raise ValueError("decay_steps is counted from step 0, so it must be more than warmup_steps")
        return self


class RegularizerSettings(Settings):
    """The settings that every regularizer has."""

    type: str = "none"
    """The regularizer's registered name; `none` is the baseline."""
    weight: NotNegative = 0.5
    """Lambda: the weight after warm-up. At 0 nothing is computed."""
    schedule: ScheduleSettings = ScheduleSettings()
    """The weight over steps."""
    block_index: BlockIndex | None = None
    """The block whose output is regularized, 0-based: the papers' depth 8 is 7. Null is the family's suggestion."""
    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,31}$")] | None = Field(
        default=None, exclude_if=lambda name: name is None, json_schema_extra={"neutral": True}
    )
    """Tells the regularizers of a list apart, in dotted paths and in the log; null is the type."""

    kinds: ClassVar[tuple[str, ...]] = ("transformer", "unet")
    """Kinds of denoisers that the regularizer fits."""
    has_cosine: ClassVar[bool] = True
    """Whether the loss has a part ``cosine``, which a similarity threshold watches."""
    adds_nothing: ClassVar[bool] = False
    """Whether a step needs nothing worth counting beside what the regularizer needs."""

    @model_validator(mode="after")
    def _name_is_no_field(self) -> Self:
        if self.name in type(self).model_fields:
            raise ValueError(f"name '{self.name}' is a field, so a dotted path could mean either: take another name")
        return self

    def unused_fields(self) -> set[str]:
        """Return the names of the fields that have no effect: at weight 0, all but those that say so."""
        used_at_zero = {"type", "weight", "name"}
        return {*type(self).model_fields} - used_at_zero if self.weight == 0 else super().unused_fields()

    @property
    def label(self) -> str:
        """What the regularizer is called among several: its name, or else its type."""
        return self.name or self.type

    @property
    def encoders(self) -> tuple[EncoderSettings, ...]:
        """The encoders among the settings, in the order of the fields."""
        return tuple(value for _, value in settings_in(self) if isinstance(value, EncoderSettings))

    def resolved(self, block_index: BlockIndex, total_steps: int, depth: int) -> Self:
        """Return the settings with a block, else the suggested one, and with ``decay_steps`` if the weight decays."""
        schedule = self.schedule
        if schedule.type != "constant" and not schedule.decay_steps:
            schedule = schedule.model_copy(update={"decay_steps": total_steps})
        block = block_index if self.block_index is None else self.block_index
        return self.model_copy(update={"schedule": schedule, "block_index": block})

    def needs(self) -> Needs:
        """Return the default needs of a regularizer: its block and the encoders among its settings."""
        return Needs(taps=(self.block_index,), encoders=self.encoders)

    def overhead(self, sizes: Sizes) -> Overhead | None:
        """Return what the regularizer adds to a step beside its needs; None if that is not known."""
        return Overhead(0, 0) if self.adds_nothing else None

    def problems(self, facts: TrainingFacts) -> Iterator[tuple[str, str]]:
        """Yield what does not fit a training, for settings that are resolved: a field and a message."""
        if self.schedule.similarity_threshold is not None and not self.has_cosine:
            message = f"{self.type} measures no cosine of tokens that could reach a threshold: leave it out"
            yield "schedule.similarity_threshold", message


class Schedule:
    """The weight at a step: a linear warm-up from 0, a decay from ``weight`` to ``end``, and 0 from ``cutoff_step`` on.

    Args:
        weight: the weight after the warm-up (SimpleTuner's lambda).
        total_steps: the length of the training, where a decay without ``decay_steps`` ends.
        settings: the shape of the schedule; its fields may also be given by keyword.

    Raises:
        ValidationError: an unknown type, a negative number, or a decay that ends before the warm-up.
        ValueError: the weight is negative, or a decay has no end.
    """

    def __init__(
        self,
        weight: float = 0.5,
        total_steps: int | None = None,
        settings: ScheduleSettings | None = None,
        **shape: Any,
    ) -> None:
        self.weight, self.shape = weight, settings or ScheduleSettings.model_validate(shape)
        if not weight >= 0:
            raise ValueError(f"the weight must not be negative, got {weight}")
        if self.shape.type != "constant" and not self.shape.decay_steps and total_steps is None:
            raise ValueError(f"a {self.shape.type} schedule needs decay_steps, the step at which it ends")
        self.decay_end = self.shape.decay_steps or total_steps or 0

    @classmethod
    def of(cls, settings: RegularizerSettings, total_steps: int | None = None) -> Self:
        """Return the schedule of a regularizer's settings."""
        return cls(settings.weight, total_steps, settings.schedule)

    def __call__(self, step: int) -> float:
        """Return the weight at ``step``, the number of optimizer steps already taken."""
        shape, start, end = self.shape, self.weight, self.shape.end
        if shape.cutoff_step and step >= shape.cutoff_step:
            return 0.0
        if step < shape.warmup_steps:
            return start * step / shape.warmup_steps
        if shape.type == "constant":
            return start
        progress = min((step - shape.warmup_steps) / max(self.decay_end - shape.warmup_steps, 1), 1.0)
        if shape.type == "linear":
            return start + (end - start) * progress
        if shape.type == "cosine":
            return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2
        decayed: float = end + (start - end) * (1 - progress) ** shape.power
        return decayed

    @property
    def bends(self) -> set[int]:
        """The steps at which the formula of the weight changes."""
        decay = () if self.shape.type == "constant" else (self.decay_end,)
        return {0, self.shape.warmup_steps, *decay, self.shape.cutoff_step or 0}

    def formula(self, step: int) -> tuple[object, ...]:
        """Return a key of the weight's formula from ``step`` to the next bend; equal keys give equal weights."""
        shape = self.shape
        is_cut = bool(shape.cutoff_step) and step >= (shape.cutoff_step or 0)
        if step < shape.warmup_steps and not is_cut:
            return ("warmup", self.weight, shape.warmup_steps)
        if is_cut or shape.type == "constant" or step >= self.decay_end:
            return (self(step),)
        return (shape.type, self.weight, shape.end, shape.warmup_steps, self.decay_end, shape.power)


def agreement(one: Schedule, other: Schedule, steps: int) -> int:
    """Return the first step, up to ``steps``, at which two schedules have different weights; ``steps`` if none has."""
    bends = sorted({bend for bend in one.bends | other.bends if bend < steps} | {steps})
    for start, end in itertools.pairwise(bends):
        if one.formula(start) != other.formula(start):
            differing = next((step for step in range(start, end) if one(step) != other(step)), None)
            if differing is not None:
                return differing
    return steps


@dataclass(frozen=True)
class Component:
    """A registered regularizer: ``load`` returns its class, importing a built-in one, ``needs`` what settings need."""

    settings: type[RegularizerSettings]
    load: Callable[[], type[Regularizer]]
    needs: Callable[[Any], Needs]


REGULARIZERS: Registry[Component] = Registry("regularizer")


def regularizer(name: str, implementation: str | None = None) -> Callable[[C], C]:
    """Register a regularizer under the ``type`` by which a spec names it.

    Decorates a :class:`Regularizer` with its inner class ``Settings``, or a settings class whose regularizer is the
    ``implementation``, a ``package.module:Class`` that is imported when a run trains with it: planning needs no torch.

    Raises:
        PluginError: the name is taken.
        TypeError: the class is no regularizer; the message says why.
    """

    def register(decorated: C) -> C:
        if hasattr(decorated, "model_fields"):
            settings: Any = decorated
            REGULARIZERS.add(name, Component(settings, lambda: resolve_name(str(implementation)), settings.needs))
            return decorated
        cls: Any = decorated
        if not hasattr(cls, "defect"):
            raise TypeError(f"the regularizer '{name}' must be a subclass of repa_lab.plugins.Regularizer")
        if message := cls.defect():
            raise TypeError(f"the regularizer '{name}' {message}")
        REGULARIZERS.add(name, Component(cls.Settings, lambda: cls, cls.needs))
        return decorated

    return register


@regularizer("none")
class NoSettings(RegularizerSettings):
    """No regularizer: the baseline."""

    type: Literal["none"] = "none"
    weight: NotNegative = Field(default=0.0, exclude=True)
    schedule: ScheduleSettings = Field(default=ScheduleSettings(), exclude=True)
    block_index: None = Field(default=None, exclude=True)

    adds_nothing: ClassVar[bool] = True

    def needs(self) -> Needs:
        """Return no needs: no block is tapped and no encoder is loaded."""
        return Needs()


Encoders = Annotated[tuple[EncoderSettings, ...], Field(min_length=1)]
# `projector: conv` means `projector: {type: conv}`.
ProjectorSection = Annotated[
    ProjectorSettings,
    BeforeValidator(
        lambda value: {"type": value} if isinstance(value, str) else value,
        json_schema_input_type=ProjectorType | ProjectorSettings,
    ),
]


class EncoderTargetSettings(RegularizerSettings):
    """The settings of regularizers that match a block's tokens with encoders' patch tokens."""

    encoder: EncoderSettings | Encoders = EncoderSettings()
    """The encoder, or a list of encoders: each has its own projector, and the losses are averaged."""
    projector: ProjectorSection = ProjectorSettings()
    """The map from the denoiser's width to the encoder's."""
    spatial_norm: NotNegative | None = None
    """Normalise the encoder's channels over each image; the value is the share of the mean to subtract (iREPA: 0.6)."""
    resample: ResampleSettings = ResampleSettings()
    """How different grids are matched."""

    def overhead(self, sizes: Sizes) -> Overhead:
        """Return the projectors, one for each encoder; relations between tokens are not counted."""
        (tap,) = sizes.taps
        is_resampled = (self.resample.side, self.resample.when) == ("student", "before")
        overheads = [
            self.projector.overhead(tap.dim, encoder.dim, encoder.number if is_resampled else tap.number)
            for encoder in sizes.encoders
        ]
        return Overhead(*map(sum, zip(*overheads, strict=True)))


class CosineTargetSettings(EncoderTargetSettings):
    """The settings of regularizers that raise the cosine of projected tokens with an encoder's patch tokens."""

    spatial_align: bool = True
    """Compare token by token; false compares the mean projected token with the mean encoder token."""

    kinds: ClassVar[tuple[str, ...]] = ("transformer",)


@regularizer("repa", "repa_lab.align.regularizer:REPA")
class REPASettings(CosineTargetSettings):
    """REPA (2410.06940): raises the cosine of projected tokens with an encoder's patch tokens."""

    type: Literal["repa"] = "repa"
    loss: Literal["cosine", "nt_xent"] = "cosine"
    """Minus the mean cosine of matching tokens, or the NT-Xent loss over the tokens of each image."""
    temperature: Annotated[float, Field(gt=0), UsedIf("loss", ("nt_xent",))] = 0.1
    """Temperature of `nt_xent`."""


@regularizer("urepa", "repa_lab.align.regularizer:UREPA")
class UREPASettings(REPASettings):
    """U-REPA (2503.18414): REPA at the middle of a U-shaped denoiser, and a manifold loss."""

    type: Literal["urepa"] = "urepa"  # type: ignore[assignment]
    manifold_weight: NotNegative = 3.0
    """The paper's w, the weight of the manifold loss within the regularizer."""
    manifold: Annotated[ManifoldSettings, UsedIf("manifold_weight", but=(0,))] = ManifoldSettings()
    """Which pairs are compared, and how."""

    kinds: ClassVar[tuple[str, ...]] = ("unet", "u_shaped")

    @model_validator(mode="after")
    def _pairs_exist(self) -> Self:
        if not self.spatial_align and self.manifold_weight > 0 and self.manifold.scope != "batch_pooled":
            raise ValueError(
                "spatial_align false leaves one token an image, so there are no pairs of tokens:"
                " use manifold.scope batch_pooled or manifold_weight 0"
            )
        return self
