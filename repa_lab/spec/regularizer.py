"""The regularizer's part of a spec: encoder, projector, schedule, and what is compared."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from repa_lab.spec.section import AS_TUPLE, BlockIndex, Count, NotNegative, Positive, Section, later


class EncoderConfig(Section):
    """The frozen vision encoder.

    ``image_size`` null derives it from the training resolution by the papers' rule (256 px is seen at 224 by patch 14).
    ``weights`` is a local file for when the hub is out of reach. ``standardize`` gives every channel mean 0 and standard
    deviation 1 over the data set's tokens. ``cache`` computes the features once for all runs. ``pixels`` is what the encoder
    looks at: the ``image`` itself, as in the papers, or its reconstruction by the ``vae`` of the data or by a tiny
    autoencoder of the same latents (``tae``, a hub id or folder), as in the guide's trainer.
    """

    name: str = "dinov2_vitg14"
    image_size: Positive | None = None
    weights: str | None = None
    standardize: bool = False
    cache: bool = True
    pixels: Literal["image", "vae", "tae"] = later("image")
    tae: str | None = later(None)

    @model_validator(mode="after")
    def _settings_fit(self) -> EncoderConfig:
        if self.standardize and not self.cache:
            raise ValueError("standardize needs the statistics of all features, so cache must be true")
        if (self.pixels == "tae") != (self.tae is not None):
            raise ValueError("tae names the tiny autoencoder that pixels: tae decodes with; give both or neither")
        return self


# A list in a file, a tuple here: settings are keys of mappings, so all of them must be hashable.
Encoders = Annotated[
    tuple[EncoderConfig, ...],
    AS_TUPLE,
    Field(min_length=1),
]


class ProjectorConfig(Section):
    """The map from the denoiser's width to the encoder's: REPA's ``mlp`` of three layers, the guide's ``linear``, or a ``conv``
    of an odd ``kernel`` over the grid."""

    type: Literal["mlp", "linear", "conv"] = "mlp"
    width: Positive = 2048
    kernel: Annotated[int, Field(ge=1)] = later(3)

    @model_validator(mode="after")
    def _kernel_is_odd(self) -> ProjectorConfig:
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, so that tokens keep their places; got {self.kernel}")
        return self


class ManifoldConfig(Section):
    """Which pairs U-REPA's manifold loss compares and how; see :class:`repa_lab.align.Manifold`."""

    scope: Literal["intra", "batch_pooled", "batch_tokens"] = "intra"
    reduction: Literal["mean", "sum", "offdiag_mean"] = "mean"
    distance: Literal["l2", "l1_margin"] = "l2"
    margin: NotNegative = 0.1
    sample: Annotated[int, Field(ge=2)] = 2048


class ResampleConfig(Section):
    """Which ``side`` is brought to the other's grid where they differ, and ``when``: after or before the projector."""

    side: Literal["student", "teacher"] = "student"
    when: Literal["after", "before"] = "after"


class ScheduleConfig(Section):
    """The weight over steps; see :class:`repa_lab.align.Schedule` and, for what depends on how similar the tokens have become,
    :class:`repa_lab.align.SimilarityCutoff`. ``decay_steps`` is absolute, 0 means the end of training."""

    type: Literal["constant", "linear", "cosine", "polynomial"] = "constant"
    warmup_steps: Count = 0
    decay_steps: Count = 0
    end: NotNegative = 0.0
    cutoff_step: Count | None = None
    power: NotNegative = 1.0
    similarity_threshold: Annotated[float, Field(ge=-1, le=1)] | None = later(None)
    similarity_ema_decay: Annotated[float, Field(ge=0, lt=1)] = later(0.99)
    similarity_min_count: Positive = later(100)
    threshold_mode: Literal["permanent", "recoverable"] = later("permanent")
    probe_every: Positive = later(50)

    @model_validator(mode="after")
    def _decay_ends_after_warmup(self) -> ScheduleConfig:
        if self.type != "constant" and 0 < self.decay_steps <= self.warmup_steps:
            raise ValueError("decay_steps is counted from step 0, so it must be more than warmup_steps")
        return self


class RegularizerConfig(Section):
    """``none``, ``repa`` or ``urepa``; ``block_index`` is 0-based, null takes the family's suggestion.

    ``encoder`` may be a list: each has its projector, and the loss is the mean over them. ``spatial_align`` false compares the
    means over tokens; ``spatial_norm`` is iREPA's normalisation of the encoder's channels over an image (0.6 there).
    ``temperature`` is that of the ``nt_xent`` loss.
    """

    type: Literal["none", "repa", "urepa"] = "none"
    weight: NotNegative = 0.5
    manifold_weight: NotNegative = 3.0
    block_index: BlockIndex | None = None
    encoder: EncoderConfig | Encoders = EncoderConfig()
    projector: ProjectorConfig = ProjectorConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    loss: Literal["cosine", "nt_xent"] = later("cosine")
    temperature: Annotated[float, Field(gt=0)] = later(0.1)
    spatial_align: bool = later(True)
    spatial_norm: NotNegative | None = later(None)
    resample: ResampleConfig = later(ResampleConfig())
    manifold: ManifoldConfig = later(ManifoldConfig())

    @property
    def encoders(self) -> tuple[EncoderConfig, ...]:
        """The encoders that are aligned to; none for ``none``."""
        if self.type == "none":
            return ()
        return self.encoder if isinstance(self.encoder, tuple) else (self.encoder,)

    @model_validator(mode="after")
    def _pairs_exist(self) -> RegularizerConfig:
        pooled = self.manifold.scope == "batch_pooled"
        if self.type == "urepa" and not self.spatial_align and self.manifold_weight > 0 and not pooled:
            raise ValueError(
                "spatial_align false leaves one token an image, so there are no pairs of tokens:"
                " use manifold.scope batch_pooled or manifold_weight 0"
            )
        return self
