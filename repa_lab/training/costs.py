"""What a run costs by its settings: FLOPs, memory and disk, from formulas and counts; no torch.

What is not counted: optimizer steps, data loading, the encoding of texts, and the extractor of the Frechet distance.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from repa_lab.align.settings import EncoderSettings, NoSettings, ProjectorSettings, REPASettings
from repa_lab.data.settings import SourceSettings
from repa_lab.encoders.flops import encoder_flops, encoder_weights
from repa_lab.encoders.registry import facts_of, input_size
from repa_lab.models.families import FAMILIES
from repa_lab.models.family import Family, Shape, shape_of
from repa_lab.models.flops import VAE_DECODER, VAE_ENCODER, Forward, forward_of
from repa_lab.spec import EvaluateConfig, RunConfig, RunOptions

_VAE_STRIDE, _VAE_CHANNELS = 8, 4
_FLOAT, _HALF = 4, 2  # bytes
# A weight that trains is kept with its average and AdamW's two moments.
_CHECKPOINT_NUMBERS = 4
_CHECKPOINTS_KEPT = 2


@dataclass(frozen=True)
class Memory:
    """Bytes on the device at the peak of a step; the activations are a rough estimate.

    Attributes:
        weights: of the denoiser and the projector, in float32; those that LoRA leaves alone in the run's precision.
        copies: the weights once more in the run's precision, as autocast makes them.
        training: gradients, AdamW's two moments and the averages, all in float32.
        activations: of one micro-batch, kept for the backward pass.
        encoders: weights of encoders that run in every step.
    """

    weights: float
    copies: float
    training: float
    activations: float
    encoders: float

    @property
    def total(self) -> float:
        """All of it, in bytes."""
        return self.weights + self.copies + self.training + self.activations + self.encoders


@dataclass(frozen=True)
class Cost:
    """What the runs of an arm cost, each.

    Attributes:
        parameters: of the denoiser.
        trained: parameters that train, the projector's included.
        denoiser_flops: to train the denoiser on one image.
        encoder_flops: for the encoders' view of one image in a step that asks them, where their features are not
            cached.
        projector_flops: to train the projectors on one image in such a step.
        active: the share of the steps that ask the encoders.
        saved_flops: what caches save for one image.
        evaluation_flops: of one measurement by the usual protocol.
        milestone_flops: of one by the protocol of milestones; 0 without one.
        memory: see :class:`Memory`.
        checkpoint_bytes: of all checkpoints that a run keeps.
        rough: what is guessed rather than counted.
    """

    parameters: int
    trained: int
    denoiser_flops: float
    encoder_flops: float
    projector_flops: float
    active: float
    saved_flops: float
    evaluation_flops: float
    milestone_flops: float
    memory: Memory
    checkpoint_bytes: int
    rough: tuple[str, ...] = ()

    @property
    def image_flops(self) -> float:
        """To train on one image, online encoders and projectors included: the mean over all steps."""
        return self.denoiser_flops + self.active * (self.encoder_flops + self.projector_flops)

    def measuring(self, config: RunConfig, begun: int, end: int) -> float:
        """FLOPs of all measurements after step ``begun`` up to ``end``."""
        usual, rare = measurements(config, begun, end)
        return usual * self.evaluation_flops + rare * self.milestone_flops


@dataclass(frozen=True)
class Cache:
    """What is computed once for every image and kept; equal ones are one.

    Attributes:
        what: for people.
        data: the images.
        image_flops: to compute it, an image.
        image_bytes: to keep it, an image.
    """

    what: str
    data: SourceSettings
    image_flops: float
    image_bytes: float


def cost_of(config: RunConfig, options: RunOptions) -> Cost:
    """What a run with these settings costs."""
    family = FAMILIES[config.model.family]
    shape = shape_of(family, config.model.size)
    tokens, channels = _tokens(config, family, shape.stride), _channels(config)
    forward = forward_of(family, config.model.size, tokens, channels, config.data.usual_classes)
    projectors = _projectors(config, shape)
    weights = sum(parameters for parameters, _ in projectors)
    adapters = config.model.rank * forward.adapted if config.model.train == "lora" else 0
    trained = weights + (adapters or forward.parameters)
    active = active_steps(config, config.train.steps) / config.train.steps
    cached = active * _encoders(config, are_cached=True)
    return Cost(
        parameters=forward.parameters,
        trained=trained,
        denoiser_flops=_passes(config, options) * forward.flops + 6.0 * tokens * adapters,
        encoder_flops=_encoders(config, are_cached=False),
        projector_flops=_projecting(config, [macs for _, macs in projectors], _tapped(config, family, shape)),
        active=active,
        saved_flops=cached + (_vae_flops(config, encode=True) if _has_vae(config, family) else 0),
        evaluation_flops=_evaluation(config, config.evaluate, family, forward),
        milestone_flops=_evaluation(config, rare, family, forward) if (rare := config.evaluate.milestone) else 0.0,
        memory=_memory(config, options, forward, shape, tokens, (trained, weights)),
        checkpoint_bytes=_CHECKPOINT_NUMBERS * _FLOAT * _CHECKPOINTS_KEPT * trained,
        rough=_rough(config),
    )


def measurements(config: RunConfig, begun: int, end: int) -> tuple[int, int]:
    """How often a run is measured after step ``begun`` up to ``end``, by the usual protocol and by that of milestones."""
    every, last = config.evaluate.every, config.train.steps
    usual = end // every - begun // every + int(begun < last == end and last % every > 0)
    return usual, sum(begun < step <= end for step in config.milestones)


def active_steps(config: RunConfig, step: int) -> int:
    """The first ``step`` steps but for those of which the schedule says beforehand that no encoder is asked."""
    cutoff = config.regularizer.schedule.cutoff_step
    return 0 if config.regularizer.weight == 0 else min(step, cutoff or step)


def caches_of(config: RunConfig, options: RunOptions) -> Iterator[Cache]:
    """What a run's settings have computed once for all images."""
    family, data = FAMILIES[config.model.family], config.data
    seen = data.model_copy(update={"holdout": 1})  # which decides nothing of it
    if _has_vae(config, family) and not data.is_prepared:
        stride = family.latent_stride if family.network else _VAE_STRIDE
        channels = family.network.channels if family.network else _VAE_CHANNELS
        kept = 2 * channels * (data.side // stride) ** 2 * _FLOAT
        yield Cache(f"latents at {data.side} px", seen, _vae_flops(config, encode=True), kept)
    for encoder in dict.fromkeys(encoder for _, encoder in config.encoder_paths):
        facts = facts_of(encoder.name)
        tokens = _encoded(encoder, data)
        if encoder.cache and facts is not None and tokens is not None:
            size = _seen(encoder, data)
            bytes_ = tokens * facts.dim * (_HALF if options.encoder_storage == "fp16" else _FLOAT)
            yield Cache(f"features of {encoder.name} at {size} px", seen, _encoder_image(encoder, config), bytes_)


def micro_batch(config: RunConfig, options: RunOptions) -> int:
    """Images of one forward pass on one device; for ``auto``, the number it starts with."""
    share = max(1, config.train.batch_size // options.gpus_per_run)
    return min(share, options.micro_batch) if isinstance(options.micro_batch, int) else share


def projector_size(projector: ProjectorSettings, in_dim: int, out_dim: int) -> tuple[int, int]:
    """Parameters of a projector, and its multiply-adds a token."""
    width = projector.width
    if projector.type == "linear":
        return in_dim * out_dim + out_dim + 2 * in_dim, in_dim * out_dim
    if projector.type == "conv":
        macs = projector.kernel**2 * in_dim * out_dim
        return macs + out_dim, macs
    macs = in_dim * width + width**2 + width * out_dim
    return macs + 2 * width + out_dim, macs


def _tokens(config: RunConfig, family: Family, stride: int) -> float:
    """Tokens of an image where they stand so many cells apart."""
    latent = _VAE_STRIDE if family.from_scratch and config.data.vae else family.latent_stride
    return max(1, config.data.side // (latent * stride)) ** 2


def _channels(config: RunConfig) -> int:
    return _VAE_CHANNELS if config.data.vae else config.data.channels


def _has_vae(config: RunConfig, family: Family) -> bool:
    return config.data.vae is not None or not family.from_scratch


def _passes(config: RunConfig, options: RunOptions) -> int:
    """Forward passes that a step is worth: backward is two, or one where the weights have no gradient."""
    return (2 if config.model.train == "lora" else 3) + int(options.gradient_checkpointing)


def _projectors(config: RunConfig, shape: Shape) -> list[tuple[int, int]]:
    """Parameters of the projector of each of a run's encoders, and its multiply-adds a token."""
    regularizer = config.regularizer
    if not isinstance(regularizer, REPASettings):
        return []
    dims = [facts.dim if (facts := facts_of(encoder.name)) else shape.width for encoder in regularizer.encoders]
    return [projector_size(regularizer.projector, shape.width, dim or shape.width) for dim in dims]


def _projecting(config: RunConfig, macs: list[int], tapped: float) -> float:
    """FLOPs an image of the projectors, forward and backward, on as many tokens as each takes."""
    regularizer = config.regularizer
    if not isinstance(regularizer, REPASettings):
        return 0.0
    is_first = (regularizer.resample.side, regularizer.resample.when) == ("student", "before")
    taken = [(_encoded(encoder, config.data) if is_first else None) or tapped for encoder in regularizer.encoders]
    return 6.0 * sum(tokens * each for tokens, each in zip(taken, macs, strict=True))


def _tapped(config: RunConfig, family: Family, shape: Shape) -> float:
    """Tokens of an image at the tap."""
    return _tokens(config, family, shape.stride_at(config.regularizer.block_index))


def _encoded(encoder: EncoderSettings, data: SourceSettings) -> int | None:
    """Tokens of an image by an encoder; None where its stride is not known."""
    facts = facts_of(encoder.name)
    return (_seen(encoder, data) // facts.stride) ** 2 if facts is not None and facts.stride else None


def _seen(encoder: EncoderSettings, data: SourceSettings) -> int:
    """Pixels along each side at which an encoder sees an image."""
    facts = facts_of(encoder.name)
    return input_size(facts.stride, (data.side, data.side), encoder.image_size)[0] if facts else 0


def _encoder_image(encoder: EncoderSettings, config: RunConfig) -> float:
    """FLOPs of an encoder's view of one image, the decoding included where it looks at a reconstruction by the VAE."""
    decoded = _vae_flops(config, encode=False) if encoder.pixels == "vae" else 0
    return (encoder_flops(encoder.name, _seen(encoder, config.data)) or 0) + decoded


def _encoders(config: RunConfig, are_cached: bool) -> float:
    """FLOPs an image of the regularizer's encoders: of those that caches spare, or of those that run in the steps."""
    wanted = (encoder for encoder in config.regularizer.encoders if encoder.cache is are_cached)
    return sum(_encoder_image(encoder, config) for encoder in wanted)


def _vae_flops(config: RunConfig, encode: bool) -> float:
    """Of one image through Stable Diffusion's autoencoder, which stands for all."""
    counted = VAE_ENCODER if encode else VAE_DECODER
    return counted.at((config.data.side / _VAE_STRIDE) ** 2, 0).flops


def _evaluation(config: RunConfig, evaluate: EvaluateConfig, family: Family, forward: Forward) -> float:
    """Sampling and decoding; held-out images are few beside the samples' many steps."""
    calls = evaluate.sampler.steps
    if (evaluate.sampler.type, evaluate.sampler.solver) == ("ode", "heun"):
        calls = 2 * calls - 1
    guided = evaluate.guidance.high - evaluate.guidance.low if evaluate.guidance.scale > 1 else 0.0
    decoded = _vae_flops(config, encode=False) if _has_vae(config, family) else 0
    return evaluate.samples * (calls * (1 + guided) * forward.flops + decoded)


def _memory(
    config: RunConfig, options: RunOptions, forward: Forward, shape: Shape, tokens: float, trained: tuple[int, int]
) -> Memory:
    trains, projector = trained
    is_lora, number = config.model.train == "lora", _FLOAT if options.precision == "fp32" else _HALF
    own = forward.parameters * number + trains * _FLOAT if is_lora else trains * _FLOAT
    kept = forward.kept * (forward.kept_frozen if is_lora else 1)
    if options.gradient_checkpointing:  # the blocks' inputs, and one block at a time
        kept = kept / shape.depth + shape.depth * shape.width * tokens if shape.depth > 1 else kept / 2
    online = [encoder for encoder in config.regularizer.encoders if not encoder.cache]
    return Memory(
        weights=own,
        copies=0 if is_lora or number == _FLOAT else _HALF * (trains - projector),
        training=4 * _FLOAT * trains,
        activations=kept * number * micro_batch(config, options),
        encoders=_FLOAT * sum(encoder_weights(encoder.name) or 0 for encoder in online),
    )


def _rough(config: RunConfig) -> tuple[str, ...]:
    unknown = [encoder.name for _, encoder in config.encoder_paths if encoder_flops(encoder.name, 224) is None]
    encoders = [f"the cost of encoder '{name}' is not known and not counted" for name in dict.fromkeys(unknown)]
    pipeline, named = FAMILIES[config.model.family].pipeline, config.model.pretrained
    released = pipeline.released if pipeline else named
    counted = f"parameters, FLOPs and memory are counted for {released}; those of {named} may differ"
    if not isinstance(config.regularizer, REPASettings | NoSettings):
        encoders.append(f"what the regularizer '{config.regularizer.type}' computes is not known and not counted")
    return (*([counted] if named not in (None, released) else []), *encoders)


def images_of(data: SourceSettings, files: int | None) -> int | None:
    """Images of a data set, mirrored ones included; ``files`` is how many there are, None where that is not known."""
    return None if files is None else files * (1 + int(data.flip))
