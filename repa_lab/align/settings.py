"""The registry of regularizers, their settings, and those of what they are made of.

Imports no torch, so that `plan` answers at once.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import BeforeValidator, Field, model_validator

from repa_lab.registry import Registry
from repa_lab.settings import (
    BlockIndex,
    Count,
    HubOrLocal,
    LocalFile,
    NotNegative,
    Positive,
    Settings,
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
    """Pixels along each side of the encoder's input; null follows the papers' rule (256 px is seen at 224 by patch 14)."""
    weights: LocalFile | None = None
    """A local file of weights, for when the hub is out of reach."""
    standardize: bool = False
    """Give every channel mean 0 and standard deviation 1 over the data set's tokens."""
    cache: bool = True
    """Compute the features once for all runs."""
    pixels: Literal["image", "vae", "tae"] = "image"
    """What the encoder looks at: the image, as in the papers, or its reconstruction by the VAE or a tiny autoencoder."""
    tae: HubOrLocal | None = None
    """The tiny autoencoder that `pixels: tae` decodes with."""

    @model_validator(mode="after")
    def _settings_fit(self) -> Self:
        if self.standardize and not self.cache:
            raise ValueError("standardize needs the statistics of all features, so cache must be true")
        if (self.pixels == "tae") != (self.tae is not None):
            raise ValueError("tae names the tiny autoencoder that pixels: tae decodes with; give both or neither")
        return self


class ProjectorSettings(Settings):
    """The trainable map from the denoiser's width to the encoder's."""

    type: Literal["mlp", "linear", "conv"] = "mlp"
    """REPA's three layers with SiLU, SimpleTuner's LayerNorm + Linear, or iREPA's convolution over the grid."""
    width: Positive = 2048
    """Hidden width of `mlp`."""
    kernel: Positive = 3
    """Size of the `conv` kernel; odd."""

    @model_validator(mode="after")
    def _kernel_is_odd(self) -> Self:
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, so that tokens keep their places; got {self.kernel}")
        return self


class ResampleSettings(Settings):
    """How grids that differ are matched.

    U-REPA (2503.18414) finds resampling the student better than shrinking the teacher (Table 6: FID 5.72 against 5.99),
    and projecting first better than resampling first (Table 7: 5.72 against 5.84).
    """

    side: Literal["student", "teacher"] = "student"
    """Which side is resampled to the other's grid."""
    when: Literal["after", "before"] = "after"
    """Whether the student is resampled after or before the projector."""


class ManifoldSettings(Settings):
    """Which pairs U-REPA's manifold loss compares, and how."""

    scope: Literal["intra", "batch_pooled", "batch_tokens"] = "intra"
    """Pairs of tokens of one image, of images by their mean token, or of tokens of the whole batch.

    The last two see the images of one forward pass in all processes: a micro-batch changes them, the number of
    processes does not."""
    reduction: Literal["mean", "sum", "offdiag_mean"] = "mean"
    """Mean over all N*N pairs, their sum, or the mean without each token's pair with itself; then the mean over images."""
    distance: Literal["l2", "l1_margin"] = "l2"
    """The squared difference of two similarities, or by how much its size exceeds `margin`."""
    margin: NotNegative = 0.1
    """Margin of `l1_margin`: 0.1 in VideoREPA's relation loss, 0.25 in VA-VAE's matrix loss."""
    sample: Annotated[int, Field(ge=2)] = 2048
    """Most tokens that `batch_tokens` compares, drawn anew at every step."""


class ScheduleSettings(Settings):
    """The weight over steps: a linear warm-up from 0, a decay from `weight` to `end`, and 0 from a cutoff on."""

    type: Literal["constant", "linear", "cosine", "polynomial"] = "constant"
    """The shape of the decay."""
    warmup_steps: Count = 0
    """Steps over which the weight rises from exactly 0."""
    decay_steps: Count = 0
    """The step at which the decay ends, counted from 0, warm-up included; 0 is the end of training."""
    end: NotNegative = 0.0
    """The weight at the end of the decay and after it."""
    cutoff_step: Count | None = None
    """The weight is exactly 0 from this step on; null or 0 is never."""
    power: NotNegative = 1.0
    """The exponent of `polynomial`."""
    similarity_threshold: Annotated[float, Field(ge=-1, le=1)] | None = None
    """The weight is 0 once the smoothed mean cosine of the tokens has reached this; null is never."""
    similarity_ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """The weight of the past in the smoothed cosine; 0 judges each step alone."""
    similarity_min_count: Positive = 100
    """Steps observed before the threshold is judged, so that an early spike switches nothing off."""
    threshold_mode: Literal["permanent", "recoverable"] = "permanent"
    """Whether the weight stays 0, or returns when the cosine falls below the threshold."""
    probe_every: Positive = 50
    """While a recoverable threshold holds, the cosine is measured at every so many steps, without gradient."""

    @model_validator(mode="after")
    def _decay_ends_after_warmup(self) -> Self:
        if self.type != "constant" and 0 < self.decay_steps <= self.warmup_steps:
            raise ValueError("decay_steps is counted from step 0, so it must be more than warmup_steps")
        return self


@dataclass(frozen=True)
class Needs:
    """What a regularizer asks to be captured or computed for it; nothing else is.

    Attributes:
        taps: blocks of the denoiser whose output is captured, 0-based, or ``mid``.
        encoders: encoders whose patch tokens are the target.
        ema_taps: blocks of the averaged model, which then runs on the same noisy images without gradient.
        latents: whether the clean latents (or pixels) of the batch are wanted.
        prediction: whether the denoiser's output and its target are wanted.
    """

    taps: tuple[BlockIndex | None, ...] = ()
    encoders: tuple[EncoderSettings, ...] = ()
    ema_taps: tuple[BlockIndex | None, ...] = ()
    latents: bool = False
    prediction: bool = False


class RegularizerSettings(Settings):
    """What every regularizer has."""

    type: str = "none"
    """The regularizer's registered name; `none` is the baseline."""
    weight: NotNegative = 0.5
    """Lambda: the weight after warm-up. At 0 nothing is computed."""
    schedule: ScheduleSettings = ScheduleSettings()
    """The weight over steps."""
    block_index: BlockIndex | None = None
    """The block whose output is regularized, 0-based: the papers' depth 8 is 7. Null is the family's suggestion."""

    kinds: ClassVar[tuple[str, ...]] = ("transformer", "unet")
    """Kinds of denoisers that it fits."""

    @property
    def encoders(self) -> tuple[EncoderSettings, ...]:
        """The encoders among the settings, in the order of the fields."""
        return tuple(value for _, value in settings_in(self) if isinstance(value, EncoderSettings))

    def resolved(self, block_index: BlockIndex, total_steps: int) -> Self:
        """Return the settings with numbers where null or 0 stands for what the run decides.

        Args:
            block_index: the family's suggestion.
            total_steps: the length of the training, where a decay without ``decay_steps`` ends.
        """
        schedule = self.schedule
        if schedule.type != "constant" and not schedule.decay_steps:
            schedule = schedule.model_copy(update={"decay_steps": total_steps})
        block = block_index if self.block_index is None else self.block_index
        return self.model_copy(update={"schedule": schedule, "block_index": block})

    def needs(self) -> Needs:
        """Return what is asked for unless the regularizer's own ``needs`` says otherwise: its block and its encoders."""
        return Needs(taps=(self.block_index,), encoders=self.encoders)


@dataclass(frozen=True)
class Component:
    """A registered regularizer: its settings, and how its class is had."""

    settings: type[RegularizerSettings]
    load: Callable[[], type[Regularizer]]
    needs: Callable[[Any], Needs]


REGULARIZERS: Registry[Component] = Registry("regularizer")


def regularizer(name: str, implementation: str | None = None) -> Callable[[C], C]:
    """Register a regularizer under the ``type`` by which a spec names it.

    Decorates a :class:`Regularizer` with its ``Settings`` inside, or settings by themselves, whose class stands in
    another module and is imported when a run trains with it: `plan` then needs no torch.

    Args:
        name: the ``type``.
        implementation: where the class of decorated settings is, ``package.module:Class``.

    Raises:
        PluginError: the name is taken.
        TypeError: the class lacks what a regularizer has; the message says what.
    """

    def register(decorated: C) -> C:
        if hasattr(decorated, "model_fields"):
            settings: Any = decorated
            REGULARIZERS.add(name, Component(settings, lambda: _imported(implementation), settings.needs))
            return decorated
        cls: Any = decorated
        if not hasattr(cls, "defect"):
            raise TypeError(f"the regularizer '{name}' must be a subclass of repa_lab.plugins.Regularizer")
        if message := cls.defect():
            raise TypeError(f"the regularizer '{name}' {message}")
        REGULARIZERS.add(name, Component(cls.Settings, lambda: cls, cls.needs))
        return decorated

    return register


def _imported(implementation: str | None) -> Any:
    assert implementation is not None
    module, _, name = implementation.partition(":")
    return getattr(importlib.import_module(module), name)


@regularizer("none")
class NoSettings(RegularizerSettings):
    """No regularizer: the baseline."""

    type: Literal["none"] = "none"
    weight: NotNegative = Field(default=0.0, exclude=True)
    schedule: ScheduleSettings = Field(default=ScheduleSettings(), exclude=True)
    block_index: None = Field(default=None, exclude=True)

    def needs(self) -> Needs:
        """Return nothing: no block is tapped and no encoder is loaded."""
        return Needs()


Encoders = Annotated[tuple[EncoderSettings, ...], Field(min_length=1)]
# `projector: conv` means `projector: {type: conv}`.
Projector = Annotated[
    ProjectorSettings, BeforeValidator(lambda value: {"type": value} if isinstance(value, str) else value)
]


@regularizer("repa", "repa_lab.align.regularizer:REPA")
class REPASettings(RegularizerSettings):
    """REPA (2410.06940): raise the cosine of projected tokens with an encoder's patch tokens."""

    type: Literal["repa"] = "repa"
    encoder: EncoderSettings | Encoders = EncoderSettings()
    """The encoder, or a list: each has a projector of its own, and their losses are averaged."""
    projector: Projector = ProjectorSettings()
    """The map from the denoiser's width to the encoder's."""
    loss: Literal["cosine", "nt_xent"] = "cosine"
    """Minus the mean cosine of matching tokens, or the NT-Xent loss over all tokens of the batch."""
    temperature: Annotated[float, Field(gt=0)] = 0.1
    """Temperature of `nt_xent`."""
    spatial_align: bool = True
    """False compares the mean projected token with the mean encoder token instead of place with place."""
    spatial_norm: NotNegative | None = None
    """How much of each encoder channel's mean over an image is taken out before its deviation is made 1 (iREPA: 0.6)."""
    resample: ResampleSettings = ResampleSettings()
    """How grids that differ are matched."""

    kinds: ClassVar[tuple[str, ...]] = ("transformer",)


@regularizer("urepa", "repa_lab.align.regularizer:UREPA")
class UREPASettings(REPASettings):
    """U-REPA (2503.18414): REPA at the middle of a U-shaped denoiser, and a manifold loss."""

    type: Literal["urepa"] = "urepa"  # type: ignore[assignment]
    manifold_weight: NotNegative = 3.0
    """The paper's w, the weight of the manifold loss within the regularizer; 0 is 0."""
    manifold: ManifoldSettings = ManifoldSettings()
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
