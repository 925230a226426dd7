"""The fields of a spec. What stands in :class:`RunConfig` is part of a run's identity, :class:`RunOptions` is not."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from repa_lab.spec.section import Section as _Section

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
NotNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
BlockIndex = Annotated[int, Field(ge=0)] | Literal["mid"]


def _later(neutral: Any, **limits: Any) -> Any:
    """A field that came after runs were identified without it: at its neutral value, a run's id is what it was before."""
    return Field(default=neutral, json_schema_extra={"neutral": True}, **limits)


class ModelConfig(_Section):
    """The denoiser: a ``size`` of a family trained from scratch, or a ``pretrained`` pipeline of diffusers, a hub id or folder.

    A pretrained one is trained in ``full`` or through ``lora`` of a ``rank``. ``revision`` is the hub's branch, tag or commit.
    """

    family: str
    size: str | None = None
    pretrained: str | None = None
    train: Literal["full", "lora"] = "full"
    rank: Positive = 16
    revision: str | None = _later(None)


class EncoderConfig(_Section):
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
    pixels: Literal["image", "vae", "tae"] = _later("image")
    tae: str | None = _later(None)

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
    BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value),
    Field(min_length=1),
]


class ProjectorConfig(_Section):
    """The map from the denoiser's width to the encoder's: REPA's ``mlp`` of three layers, the guide's ``linear``, or a ``conv``
    of an odd ``kernel`` over the grid."""

    type: Literal["mlp", "linear", "conv"] = "mlp"
    width: Positive = 2048
    kernel: Annotated[int, Field(ge=1)] = _later(3)

    @model_validator(mode="after")
    def _kernel_is_odd(self) -> ProjectorConfig:
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, so that tokens keep their places; got {self.kernel}")
        return self


class ManifoldConfig(_Section):
    """Which pairs U-REPA's manifold loss compares and how; see :class:`repa_lab.align.Manifold`."""

    scope: Literal["intra", "batch_pooled", "batch_tokens"] = "intra"
    reduction: Literal["mean", "sum", "offdiag_mean"] = "mean"
    distance: Literal["l2", "l1_margin"] = "l2"
    margin: NotNegative = 0.1
    sample: Annotated[int, Field(ge=2)] = 2048


class ResampleConfig(_Section):
    """Which ``side`` is brought to the other's grid where they differ, and ``when``: after or before the projector."""

    side: Literal["student", "teacher"] = "student"
    when: Literal["after", "before"] = "after"


class ScheduleConfig(_Section):
    """The weight over steps; see :class:`repa_lab.align.Schedule` and, for what depends on how similar the tokens have become,
    :class:`repa_lab.align.SimilarityCutoff`. ``decay_steps`` is absolute, 0 means the end of training."""

    type: Literal["constant", "linear", "cosine", "polynomial"] = "constant"
    warmup_steps: Count = 0
    decay_steps: Count = 0
    end: NotNegative = 0.0
    cutoff_step: Count | None = None
    power: NotNegative = 1.0
    similarity_threshold: Annotated[float, Field(ge=-1, le=1)] | None = _later(None)
    similarity_ema_decay: Annotated[float, Field(ge=0, lt=1)] = _later(0.99)
    similarity_min_count: Positive = _later(100)
    threshold_mode: Literal["permanent", "recoverable"] = _later("permanent")
    probe_every: Positive = _later(50)

    @model_validator(mode="after")
    def _decay_ends_after_warmup(self) -> ScheduleConfig:
        if self.type != "constant" and 0 < self.decay_steps <= self.warmup_steps:
            raise ValueError("decay_steps is counted from step 0, so it must be more than warmup_steps")
        return self


class RegularizerConfig(_Section):
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
    loss: Literal["cosine", "nt_xent"] = _later("cosine")
    temperature: Annotated[float, Field(gt=0)] = _later(0.1)
    spatial_align: bool = _later(True)
    spatial_norm: NotNegative | None = _later(None)
    resample: ResampleConfig = _later(ResampleConfig())
    manifold: ManifoldConfig = _later(ManifoldConfig())

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


class BucketsConfig(_Section):
    """Images keep about their aspect: sizes are multiples of ``step`` pixels of about the area of a square of the resolution,
    one side at most ``max_aspect`` times the other."""

    step: Positive = 64
    max_aspect: Annotated[float, Field(ge=1)] = 2.0


class DataConfig(_Section):
    """The images: scikit-learn's digits, a folder of images, or one that `Dataset.save_to_disk` of `datasets` wrote.

    ``resolution`` null is 256, or 8 for digits. ``vae`` (a hub id or folder) trains in its latent space; a pretrained model has
    its own. ``holdout`` images are never trained on; ``flip`` mirrors every other image at random as it is seen; ``buckets``
    keeps aspects, where null cuts squares. ``caption_column`` names the captions of a saved data set.
    """

    source: Literal["digits", "imagefolder", "datasets"]
    path: str | None = None
    resolution: Positive | None = None
    vae: str | None = None
    holdout: Positive = 256
    flip: bool = _later(False)
    buckets: BucketsConfig | None = _later(None)
    caption_column: str | None = _later(None)

    @model_validator(mode="after")
    def _digits_are_8x8(self) -> DataConfig:
        if self.source == "digits" and self.resolution not in (None, 8):
            raise ValueError("digits are 8 pixels wide and high: resolution must be 8 or left out")
        return self

    @property
    def side(self) -> int:
        """Pixels along each side of a training image."""
        return 8 if self.source == "digits" else self.resolution or 256


class TrainConfig(_Section):
    """Optimisation: AdamW at a constant rate; defaults are those of the papers' code.

    ``label_dropout`` is how often the class or the caption is left out. ``time`` is the distribution of times: ``auto`` is
    uniform for SiT and the UNet, as in the papers, and what a pretrained model was trained with.
    """

    steps: Positive
    batch_size: Positive = 256
    lr: Annotated[float, Field(gt=0)] = 1e-4
    weight_decay: NotNegative = 0.0
    grad_clip: Annotated[float, Field(gt=0)] | None = 1.0
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.9999
    label_dropout: Fraction = 0.1
    time: Literal["auto", "uniform", "lognormal"] = "auto"


class SamplerConfig(_Section):
    """``ode`` integrates the velocity with ``euler`` or ``heun`` over ``steps``; ``sde`` is the papers' Euler-Maruyama."""

    type: Literal["ode", "sde"] = "ode"
    solver: Literal["euler", "heun"] = "euler"
    steps: Annotated[int, Field(ge=2)] = 50


class GuidanceConfig(_Section):
    """Classifier-free guidance of the drift by ``scale`` for times in [``low``, ``high``]; 1 is none."""

    scale: Annotated[float, Field(ge=1)] = 1.0
    low: Fraction = 0.0
    high: Fraction = 1.0

    @model_validator(mode="after")
    def _low_is_below_high(self) -> GuidanceConfig:
        if self.low > self.high:
            raise ValueError(f"low must not be above high, got {self.low} and {self.high}")
        return self


class ExtractorConfig(_Section):
    """Whose features the Frechet distance compares: ``inception`` gives FID; others are named and are not FID."""

    name: Literal["inception", "efficientnet_lite0"] = "inception"
    weights: str | None = None


# As a list of encoders.
Prompts = Annotated[tuple[str, ...], BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)]


class EvaluateConfig(_Section):
    """Measurements on EMA weights ``every`` so many steps and at the end.

    ``encoder`` measures alignment in every arm, baselines included; null measures it with the arm's own encoder, if any.
    ``block_index`` is where, null the regularizer's; ``timestep`` at which noise. ``prompts`` are drawn for people to look at,
    each always from the same noise; without them it is the first samples.
    """

    every: Positive = 10_000
    samples: Annotated[int, Field(ge=16)] = 10_000
    batch_size: Positive = 125
    sampler: SamplerConfig = SamplerConfig()
    guidance: GuidanceConfig = GuidanceConfig()
    extractor: ExtractorConfig = ExtractorConfig()
    encoder: EncoderConfig | None = None
    block_index: BlockIndex | None = None
    timestep: Annotated[float, Field(gt=0, lt=1)] = 0.5
    prompts: Prompts = _later(())


class RunConfig(_Section):
    """All that decides what a run computes, but for its seed."""

    model: ModelConfig
    regularizer: RegularizerConfig = RegularizerConfig()
    data: DataConfig
    train: TrainConfig
    evaluate: EvaluateConfig = EvaluateConfig()

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


SECTIONS = tuple(RunConfig.model_fields)


class WandbOptions(_Section):
    """W&B; ``auto`` is online with a key in the environment and offline without."""

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    project: str = "repa-lab"


class RayOptions(_Section):
    """A Ray cluster: ``address`` null starts one on this machine, ``auto`` finds a running one, else ``host:port``.

    ``num_cpus``, ``num_gpus`` and the cluster's own ``resources`` are what each run takes; a run that is lost with its worker
    or its node is started again from its last checkpoint, at most ``retries`` times.
    """

    address: str | None = None
    num_cpus: NotNegative = 1.0
    num_gpus: NotNegative = 0.0
    resources: dict[str, NotNegative] = Field(default_factory=dict)
    retries: Count = 3


# A list of shell commands.
Commands = Annotated[tuple[str, ...], BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)]


class SlurmOptions(_Section):
    """What each run asks of Slurm; ``setup`` are shell commands before it, ``array_parallelism`` how many go on at a time."""

    partition: str | None = None
    account: str | None = None
    time_min: Positive = 1440
    gpus_per_node: Count | None = None
    cpus_per_task: Positive = 4
    mem_gb: Positive | None = None
    array_parallelism: Positive = 64
    setup: Commands = ()


class RunOptions(_Section):
    """How runs are carried out; nothing here changes what is computed, so nothing here is part of a run's identity.

    ``micro_batch`` is the images of one forward pass; gradients accumulate over the batch; ``auto`` starts with all of them and
    halves them as often as the GPU runs out of memory. ``share`` trains steps that runs have in common once.
    ``encoder_storage`` is the precision of cached features, ``encoder_batch_size`` the images that an encoder sees at a time.

    ``gpus_per_run`` processes share a run, one on each GPU (on the CPU without any); ``slots_per_gpu`` runs share a GPU. After
    ``max_failures`` no further runs are started. A run that gives no sign of life for ``hang_minutes`` is started again, once.
    """

    executor: Literal["local", "ray", "slurm"] = "local"
    ray: RayOptions = RayOptions()
    slurm: SlurmOptions = SlurmOptions()
    workers: Positive | None = None
    slots_per_gpu: Positive = 1
    gpus_per_run: Positive = 1
    max_failures: Positive | None = None
    hang_minutes: Annotated[float, Field(gt=0)] | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    share: bool = True
    micro_batch: Positive | Literal["auto"] | None = None
    gradient_checkpointing: bool = False
    compile: bool = False
    encoder_precision: Literal["fp32", "bf16"] = "fp32"
    encoder_compile: bool = False
    encoder_batch_size: Positive | None = None
    encoder_storage: Literal["fp16", "fp32"] = "fp16"
    log_every: Positive = 10
    checkpoint_every: Positive | None = None
    data_workers: Count = 0
    wandb: WandbOptions = WandbOptions()


class Interval(_Section):
    """One searched field: exactly one of ``log``, ``uniform`` (floats from a to b), ``int`` or ``choice``.

    ``when`` (dotted path to a value or a list of them) searches the field only where these hold of what was drawn for fields
    before it in the space, or of the arm's own settings; elsewhere the field keeps the arm's setting.
    """

    model_config = ConfigDict(json_schema_extra={"minProperties": 1, "maxProperties": 2})

    log: Annotated[list[float], Field(min_length=2, max_length=2)] | None = None
    uniform: Annotated[list[float], Field(min_length=2, max_length=2)] | None = None
    int_: Annotated[list[int], Field(min_length=2, max_length=2)] | None = Field(default=None, alias="int")
    choice: Annotated[list[Any], Field(min_length=1)] | None = None
    when: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_form(self) -> Interval:
        given = [form for form in (self.log, self.uniform, self.int_, self.choice) if form is not None]
        if len(given) != 1:
            raise ValueError("give exactly one of log, uniform, int, choice")
        for bounds in (self.log, self.uniform, self.int_):
            if bounds is not None and not bounds[0] < bounds[1]:
                raise ValueError(f"the bounds must ascend, got {bounds}")
        if self.log is not None and self.log[0] <= 0:
            raise ValueError(f"a log range must start above 0, got {self.log}")
        return self

    @property
    def ends(self) -> list[Any]:
        """The choices, or the two ends of the range."""
        return self.choice or self.int_ or self.log or self.uniform or []

    @property
    def conditions(self) -> dict[str, list[Any]]:
        """``when`` with a list of allowed values at every path."""
        return {path: allowed if isinstance(allowed, list) else [allowed] for path, allowed in self.when.items()}

    def takes(self, value: Any) -> bool:
        """Whether a value is among the choices or in the range."""
        if self.choice is not None:
            return value in self.choice
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return False
        return bool(self.ends[0] <= value <= self.ends[1]) and (self.int_ is None or value == int(value))


COSTS = ("seconds", "gpu_hours")


class Objective(_Section):
    """The metric that a search improves, by its kind (``frechet`` or ``fid``) or its full name, and its direction.

    Of several objectives, some may be what a run costs: ``seconds`` of training, or those times the GPUs, in ``gpu_hours``.
    """

    metric: str = "frechet"
    goal: Literal["min", "max"] = "min"

    @property
    def is_cost(self) -> bool:
        """Whether it is what a run costs rather than what it measures."""
        return self.metric in COSTS


# A list in a file, a tuple here, so that what is read is fixed.
Objectives = Annotated[
    tuple[Objective, ...],
    BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value),
    Field(min_length=1),
]


class SearchConfig(_Section):
    """An Optuna search; a trial is one setting with all its seeds; ``trials`` is the total, pruned ones included.

    ``objective`` may be a list: the search then looks for the settings of which none is better in every objective.
    ``storage`` is the URL of a database for the study; null keeps it in a file in the sweep's folder.
    """

    space: Annotated[dict[str, Interval], Field(min_length=1)]
    objective: Objective | Objectives = Objective()
    trials: Positive = 20
    sampler: Literal["tpe", "random", "qmc", "cmaes"] = "tpe"
    prune: Literal["none", "median", "asha", "hyperband"] = "none"
    seed: int = 0
    storage: str | None = None

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """The objectives, be it one or several."""
        return self.objective if isinstance(self.objective, tuple) else (self.objective,)


class CompareConfig(_Section):
    """What the report compares: arms against the ``baseline`` (dotted path to value) on ``metric``; ``targets`` by metric."""

    baseline: dict[str, Any] = Field(default_factory=lambda: {"regularizer.type": "none"})
    metric: str = "frechet"
    goal: Literal["min", "max"] = "min"
    targets: dict[str, list[float]] = Field(default_factory=dict)
