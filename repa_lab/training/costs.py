"""What a run costs by its settings: FLOPs, memory and disk, from formulas and counts. Imports no torch.

Optimizer steps, data loading, the encoding of texts and the extractors of metrics are not counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from repa_lab.align.needs import Needs, Overhead, Sizes, TokenSize
from repa_lab.align.settings import EncoderSettings, RegularizerSettings
from repa_lab.data.settings import SourceSettings
from repa_lab.encoders.registry import encoder_flops, encoder_weights, facts_of, input_size
from repa_lab.models.families import FAMILIES
from repa_lab.models.flops import COUNTED, VAE_DECODER, VAE_ENCODER, Counted, Forward, forward_of
from repa_lab.runs.files import Row
from repa_lab.spec import EvaluateConfig, ResolvedOptions, RunConfig
from repa_lab.training.resolve import needs_of, resolved_regularizers, shape_of_model

if TYPE_CHECKING:
    from repa_lab.training.checkpoint import Progress

_VAE_STRIDE, _VAE_CHANNELS = 8, 4
_FLOAT, _HALF = 4, 2  # bytes
_CHECKPOINT_NUMBERS = 4  # for each trained weight: itself, its average and AdamW's two moments
_CHECKPOINTS_KEPT = 2


@dataclass(frozen=True)
class Memory:
    """Bytes on the device at the peak of a step; the activations are a rough estimate.

    Attributes:
        weights: denoiser and projector in float32; the weights that LoRA does not train in the run's precision.
        copies: the copies of the weights in the run's precision that autocast makes.
        training, gradients: AdamW's two moments and the averages; and the gradients, in float32.
        activations: of one micro-batch, kept for the backward pass.
        overlap: gradients that are there while all activations are: those of projectors, which the backward pass
            reaches first, or all in the second micro-batch of a step.
        encoders: weights of the encoders that run in every step.
        teachers: weights of a frozen earlier model.
    """

    weights: float
    copies: float
    training: float
    gradients: float
    activations: float
    overlap: float
    encoders: float
    teachers: float

    @property
    def total(self) -> float:
        """All of them at the peak; the backward pass frees activations as it makes gradients, so the larger counts."""
        step = max(self.gradients, self.activations + self.overlap)
        return self.weights + self.copies + self.training + step + self.encoders + self.teachers


@dataclass(frozen=True)
class RegularizerCost:
    """What a regularizer adds to a run; FLOPs are those of one image in a step at which its weight is above 0.

    Attributes:
        active: the share of steps at which its weight is above 0.
        encoder_flops: of its encoders that are not cached; an encoder that several regularizers ask is counted for the
            one that asks longest.
        overhead: its own parameters and what they take; nothing if that is not known.
        teacher_flops: of the passes of the averaged or a frozen model.
        second_time_flops: of the denoiser's layers that see the time, where an image has two.
        copied: weights of the frozen model.
    """

    active: float
    encoder_flops: float
    overhead: Overhead
    teacher_flops: float
    second_time_flops: float
    copied: int

    @property
    def projector_flops(self) -> float:
        """FLOPs of training its own parameters: a backward pass costs two forward passes."""
        return 6.0 * self.overhead.macs

    @property
    def flops(self) -> float:
        """All its FLOPs."""
        return self.encoder_flops + self.projector_flops + self.teacher_flops + self.second_time_flops


@dataclass(frozen=True)
class Cost:
    """What each run of an arm costs.

    Attributes:
        parameters: of the denoiser.
        trained: parameters that train, projectors included.
        denoiser_flops: of training the denoiser on one image.
        saved_flops: FLOPs that caches save for one image.
        evaluation_flops: of one measurement by the usual protocol.
        milestone_flops: of one measurement by the milestone protocol; 0 without one.
        checkpoint_bytes: of all checkpoints that a run keeps.
        rough: sentences on what is estimated or left out.
    """

    parameters: int
    trained: int
    denoiser_flops: float
    regularizers: tuple[RegularizerCost, ...]
    saved_flops: float
    evaluation_flops: float
    milestone_flops: float
    memory: Memory
    checkpoint_bytes: int
    rough: tuple[str, ...]

    @property
    def image_flops(self) -> float:
        """FLOPs of training on one image, with all that regularizers add: the mean over all steps."""
        return self.denoiser_flops + sum(one.active * one.flops for one in self.regularizers)

    def measuring(self, config: RunConfig, begin: int, end: int) -> float:
        """Return the FLOPs of all measurements after step ``begin`` up to ``end``."""
        usual, milestones = measurements(config, begin, end)
        return usual * self.evaluation_flops + milestones * self.milestone_flops


@dataclass(frozen=True)
class Cache:
    """Arrays that are computed once for every image and kept, with the costs for one image; equal ones are shared."""

    what: str
    data: SourceSettings
    image_flops: float
    image_bytes: float


def cost_of(config: RunConfig, options: ResolvedOptions) -> Cost:
    """Return what a run with these settings costs."""
    tokens, milestone = _tokens(config, shape_of_model(config).stride), config.evaluate.milestone
    classes = config.data.usual_classes
    forward = forward_of(FAMILIES[config.model.family], config.model.size, tokens, _channels(config), classes)
    is_lora = config.model.train == "lora"
    adapters = config.model.rank * forward.adapted if is_lora else 0
    # A backward pass costs two forward passes, or one if the weights have no gradient.
    passes = (2 if is_lora else 3) + int(options.gradient_checkpointing)
    regularizers = tuple(_regularizer_costs(config, forward, passes, adapters or forward.parameters))
    trained = sum(one.overhead.parameters for one in regularizers) + (adapters or forward.parameters)
    cached = sum(
        active * _encoder_flops(encoder, config) for encoder, active in _encoder_shares(config).items() if encoder.cache
    )
    return Cost(
        parameters=forward.parameters,
        trained=trained,
        denoiser_flops=passes * forward.flops + 6.0 * tokens * adapters,
        regularizers=regularizers,
        saved_flops=cached + _vae_flops(config, VAE_ENCODER),
        evaluation_flops=_evaluation_flops(config, config.evaluate, forward),
        milestone_flops=_evaluation_flops(config, milestone, forward) if milestone else 0.0,
        memory=_memory(config, options, forward, trained, regularizers),
        checkpoint_bytes=_CHECKPOINT_NUMBERS * _FLOAT * _CHECKPOINTS_KEPT * trained,
        rough=tuple(_rough(config)),
    )


def costs_so_far(config: RunConfig, options: ResolvedOptions, progress: Progress) -> Row:
    """Return the metric row of a run's costs: seconds and FLOPs of training, encoders and measurements.

    The seconds of training are in the row already and include those of encoders. All seconds are those of the first
    process. Arrays in caches are not counted, because all runs share them; reading them is part of the encoder seconds.
    """
    cost, batch = cost_of(config, options), config.train.batch_size
    images = [batch * active_steps(settings, progress.step) for settings in config.regularizers]
    added = list(zip(images, cost.regularizers, strict=True))
    trained = sum(count * (one.flops - one.encoder_flops) for count, one in added)
    return {
        "cost/evaluation_seconds": round(progress.evaluation_seconds, 3),
        "cost/encoder_seconds": round(progress.encoder_seconds, 3),
        "cost/train_flops": progress.images * cost.denoiser_flops + trained,
        "cost/encoder_flops": sum(count * one.encoder_flops for count, one in added),
        "cost/evaluation_flops": cost.measuring(config, 0, progress.step),
    }


def measurements(config: RunConfig, begin: int, end: int) -> tuple[int, int]:
    """Count the measurements after step ``begin`` up to ``end``, by the usual and by the milestone protocol."""
    every, last = config.evaluate.every, config.train.steps
    usual = end // every - begin // every + int(begin < last == end and last % every > 0)
    return usual, sum(begin < step <= end for step in config.milestones)


def active_steps(settings: RegularizerSettings, step: int) -> int:
    """Count the steps before ``step`` at which a regularizer's weight is above 0, warm-up included."""
    cutoff = settings.schedule.cutoff_step
    return 0 if settings.weight == 0 else min(step, cutoff or step)


def caches_of(config: RunConfig, options: ResolvedOptions) -> Iterator[Cache]:
    """Yield the caches that a run's settings require."""
    family, data = FAMILIES[config.model.family], config.data
    shared = data.model_copy(update={"holdout": 1})  # the split does not change what is cached
    frames = family.latent_frames(data.clip_frames)
    if (encoding := _vae_flops(config, VAE_ENCODER)) and not data.is_prepared:
        stride = family.latent_stride if family.network else _VAE_STRIDE
        channels = family.network.channels if family.network else _VAE_CHANNELS
        bytes_ = 2 * channels * (data.side // stride) ** 2 * frames * _FLOAT
        yield Cache(f"latents at {data.side} px", shared, encoding, bytes_)
    for encoder in dict.fromkeys(encoder for _, encoder in config.encoder_paths):
        facts, tokens = facts_of(encoder.name), _encoder_tokens(encoder, data)
        if encoder.cache and facts is not None and tokens is not None:
            what = f"features of {encoder.name} at {_encoder_side(encoder, data)} px"
            token = {"fp32": _FLOAT * facts.dim, "fp16": _HALF * facts.dim}.get(options.encoder_storage)
            bytes_ = tokens * frames * (token or facts.dim + _FLOAT)  # a byte for each value, and a scale
            yield Cache(what, shared, _encoder_flops(encoder, config), bytes_)


def _channels(config: RunConfig) -> int:
    """Return the channels of the latents, or of the images without a VAE."""
    if network := FAMILIES[config.model.family].network:
        return network.channels
    return _VAE_CHANNELS if config.data.vae else config.data.channels


def _tokens(config: RunConfig, stride: int) -> float:
    """Return the tokens of an image, or of a clip, with one token every ``stride`` latent cells."""
    family = FAMILIES[config.model.family]
    latent = _VAE_STRIDE if family.from_scratch and config.data.vae else family.latent_stride
    of_frame = max(1, config.data.side // (latent * stride)) ** 2
    return of_frame * family.latent_frames(config.data.clip_frames)


def _vae_flops(config: RunConfig, half: Counted) -> float:
    """Return the FLOPs of an image, or of all frames of a clip, through half of a VAE; 0 without one.

    Stable Diffusion's autoencoder is counted for every VAE.
    """
    if config.data.vae is None and FAMILIES[config.model.family].from_scratch:
        return 0.0
    return half.at((config.data.side / _VAE_STRIDE) ** 2, 0).flops * max(config.data.clip_frames, 1)


def _encoder_shares(config: RunConfig) -> dict[EncoderSettings, float]:
    """Return the share of steps at which an encoder is asked by any regularizer, by encoder."""
    shares: dict[EncoderSettings, float] = {}
    for settings in config.regularizers:
        for encoder in settings.encoders:
            active = active_steps(settings, config.train.steps) / config.train.steps
            shares[encoder] = max(active, shares.get(encoder, 0.0))
    return shares


def _regularizer_costs(config: RunConfig, forward: Forward, passes: int, trained: int) -> Iterator[RegularizerCost]:
    counted: set[EncoderSettings] = set()
    shares, second_time = _encoder_shares(config), passes * forward.second_time_flops
    for settings, needs in zip(resolved_regularizers(config), needs_of(config), strict=True):
        active = active_steps(settings, config.train.steps) / config.train.steps
        own = {one for one in settings.encoders if not one.cache and shares[one] == active} - counted
        counted |= own
        yield RegularizerCost(
            active=active,
            encoder_flops=sum(_encoder_flops(encoder, config) for encoder in own),
            overhead=_overhead(config, settings, needs) or Overhead(0, 0.0),
            teacher_flops=needs.extra_passes * forward.flops,
            second_time_flops=second_time if needs.token_times else 0.0,
            copied=trained if needs.frozen_taps else 0,
        )
        if needs.token_times:  # an image has two times at most
            second_time = 0.0


def _overhead(config: RunConfig, settings: RegularizerSettings, needs: Needs) -> Overhead | None:
    """Return what a resolved regularizer adds beside its needs; None if that is not known."""
    shape, frames = shape_of_model(config), FAMILIES[config.model.family].latent_frames(config.data.clip_frames)
    taps = tuple(TokenSize(shape.width, _tokens(config, shape.stride_at(block))) for block in needs.taps)
    encoders = []
    for encoder in settings.encoders:
        facts, of_frame = facts_of(encoder.name), _encoder_tokens(encoder, config.data)
        count = of_frame * frames if of_frame else taps[0].number
        encoders.append(TokenSize((facts.dim if facts else 0) or shape.width, count))
    latents = TokenSize(_channels(config), _tokens(config, 1))
    return settings.overhead(Sizes(taps, tuple(encoders), latents, shape.heads))


def _encoder_side(encoder: EncoderSettings, data: SourceSettings) -> int:
    """Return the side in pixels at which an encoder sees an image; 0 if the encoder is unknown."""
    facts = facts_of(encoder.name)
    return input_size(facts.stride, (data.side, data.side), encoder.image_size)[0] if facts else 0


def _encoder_tokens(encoder: EncoderSettings, data: SourceSettings) -> int | None:
    """Return the tokens that an encoder makes of an image; None if its stride is unknown."""
    facts = facts_of(encoder.name)
    return (_encoder_side(encoder, data) // facts.stride) ** 2 if facts is not None and facts.stride else None


def _encoder_flops(encoder: EncoderSettings, config: RunConfig) -> float:
    """Return the FLOPs of an encoder for an image or all latent frames of a clip, decoding by the VAE included."""
    decoding = _vae_flops(config, VAE_DECODER) if encoder.pixels == "vae" else 0
    seen = FAMILIES[config.model.family].latent_frames(config.data.clip_frames)
    return seen * (encoder_flops(encoder.name, _encoder_side(encoder, config.data)) or 0) + decoding


def _evaluation_flops(config: RunConfig, protocol: EvaluateConfig, forward: Forward) -> float:
    """Return the FLOPs of drawing and decoding the samples; the held-out images are few beside them."""
    calls = protocol.sampler.steps
    if (protocol.sampler.type, protocol.sampler.solver) == ("ode", "heun"):
        calls = 2 * calls - 1
    guided = protocol.guidance.high - protocol.guidance.low if protocol.guidance.scale > 1 else 0.0
    return protocol.samples * (calls * (1 + guided) * forward.flops + _vae_flops(config, VAE_DECODER))


def _memory(
    config: RunConfig,
    options: ResolvedOptions,
    forward: Forward,
    trained: int,
    regularizers: Sequence[RegularizerCost],
) -> Memory:
    is_lora, number = config.model.train == "lora", _FLOAT if options.precision == "fp32" else _HALF
    overheads = [one.overhead for one in regularizers]
    projectors = sum(one.parameters for one in overheads)
    kept = forward.kept + forward.second_time_kept * any(one.second_time_flops for one in regularizers)
    if options.gradient_checkpointing:
        kept *= forward.kept_checkpointed
    elif is_lora:
        kept *= forward.kept_frozen
    kept += sum(one.hidden for one in overheads)
    maps = _FLOAT * sum(one.maps for one in overheads)
    share = max(1, config.train.batch_size // options.gpus_per_run)  # `auto` begins with it
    images = min(share, options.micro_batch) if isinstance(options.micro_batch, int) else share
    online = [encoder for encoder in _encoder_shares(config) if not encoder.cache]
    return Memory(
        weights=(forward.parameters * number if is_lora else 0) + trained * _FLOAT,
        copies=0 if is_lora or number == _FLOAT else _HALF * (trained - projectors),
        training=3 * _FLOAT * trained,
        gradients=_FLOAT * trained,
        activations=(kept * number + maps) * images,
        overlap=_FLOAT * (projectors if images == share else trained),
        encoders=_FLOAT * sum(encoder_weights(encoder.name) or 0 for encoder in online),
        teachers=_FLOAT * max((one.copied for one in regularizers), default=0),
    )


def _rough(config: RunConfig) -> Iterator[str]:
    """Yield sentences on what is estimated or left out."""
    pipeline, pretrained = FAMILIES[config.model.family].pipeline, config.model.pretrained
    counted = pipeline.released if pipeline else pretrained
    if pipeline and config.model.family not in COUNTED:
        yield f"FLOPs and memory of family '{config.model.family}' are estimated from its size, not counted"
    elif pretrained not in (None, counted):
        yield f"parameters, FLOPs and memory are counted for {counted}; those of {pretrained} may differ"
    for name in dict.fromkeys(encoder.name for _, encoder in config.encoder_paths):
        if encoder_flops(name, 224) is None:
            yield f"the cost of encoder '{name}' is not known and not counted"
    for settings, needs in zip(resolved_regularizers(config), needs_of(config), strict=True):
        if _overhead(config, settings, needs) is None:
            yield f"the cost of the regularizer '{settings.type}' is not known and not counted"
