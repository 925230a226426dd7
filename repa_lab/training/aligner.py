"""The alignment of a run: its tap, its targets and its regularizer, asked together once a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from repa_lab.align import REPA, UREPA, Alignment, Manifold, Resample, Schedule, SimilarityCutoff
from repa_lab.align.regularizer import Options
from repa_lab.encoders.encoder import EncoderOptions, load_encoder
from repa_lab.encoders.targets import OnlineTargets, Targets, cached_targets
from repa_lab.models.facts import BlockIndex, Shape, shape_of
from repa_lab.models.families import family_facts
from repa_lab.models.tap import Tap
from repa_lab.spec import EncoderConfig, RunConfig, RunOptions, ScheduleConfig
from repa_lab.spec.identity import Run
from repa_lab.training.images import Announce, Images, pixels_for
from repa_lab.training.objective import Batch
from repa_lab.training.streams import seeded

_STORAGE = {"fp16": torch.float16, "fp32": torch.float32}


class Foreseen:
    """The weight of steps to come, as far as a data loader can know it: the schedule's, or 0 while a similarity cutoff holds.

    It is there to spare reading what nobody asks for. Where it is wrong, as at a look whether the cutoff still holds, the
    targets read for themselves. The loader's processes see what is noted here, for it lies in shared memory.
    """

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self._is_cut = torch.zeros((), dtype=torch.bool).share_memory_()

    def __call__(self, step: int) -> float:
        """The weight at ``step``."""
        return 0.0 if self._is_cut else self._schedule(step)

    def note(self, is_cut: bool) -> None:
        """Whether the cutoff holds at present."""
        self._is_cut.fill_(is_cut)


class Aligner:
    """Turns what the tap captured in the latest forward pass into the regularizer's loss.

    Args:
        run: a run whose regularizer is not ``none``.
        tap: set on the denoiser before it is wrapped or compiled.
        width: the denoiser's width at the tap.
        targets: tokens of the run's images by each of its encoders.
        foreseen: is told when a similarity cutoff sets in or ends.
    """

    def __init__(self, run: Run, tap: Tap, width: int, targets: Sequence[Targets], foreseen: Foreseen | None = None) -> None:
        self.targets, self.tap, self._foreseen = targets, tap, foreseen
        self.regularizer = build_regularizer(run, width, [one.dim for one in targets])
        self.wrapped: nn.Module = self.regularizer

    def prepare(self, accelerator: Accelerator) -> None:
        """Let accelerate wrap the regularizer as it wraps the denoiser.

        It is wrapped by itself: on steps of weight 0 it does not run, and DistributedDataParallel then waits for no gradient
        of it.
        """
        self.wrapped = accelerator.prepare(self.regularizer.to(accelerator.device))

    def retract(self, step: int) -> None:
        """Forget what was seen of ``step``, which is taken again."""
        self.tap.clear()
        if self.regularizer.cutoff is not None:
            self.regularizer.cutoff.retract(step)

    def __call__(self, batch: Batch, step: int, device: torch.device) -> Alignment | None:
        """The alignment of a batch's images, or None where no encoder has to be asked, as at weight 0."""
        if self._foreseen and self.regularizer.cutoff is not None:
            self._foreseen.note(self.regularizer.cutoff.is_cut(step))
        if not self.regularizer.needs_target(step):
            self.tap.clear()
            return None
        loaded = batch.loaded or (None,) * len(self.targets)
        teachers = [targets(batch.ids, device, one) for targets, one in zip(self.targets, loaded, strict=True)]
        student = self.tap.take()
        if self.regularizer.weight_at(step) == 0:  # a cutoff looks whether it should end
            with torch.no_grad():
                return self.regularizer(student, teachers, step)  # type: ignore[no-any-return]
        alignment: Alignment = self.wrapped(student, teachers, step)
        return alignment


def open_targets(
    encoder: EncoderConfig,
    images: Images,
    options: RunOptions,
    cache: Path,
    device: torch.device,
    announce: Announce | None = None,
) -> Targets:
    """The encoder's tokens of the run's images, from the cache unless the settings say otherwise.

    Raises:
        EncoderError: the encoder cannot be loaded or does not give patch tokens.
        DataError: what it is to look at cannot be had.
    """
    source = pixels_for(encoder, images, device)
    how = EncoderOptions(options.encoder_precision, options.encoder_compile, options.encoder_batch_size)
    if not encoder.cache:
        loaded = load_encoder(encoder.name, encoder.image_size, source.side, encoder.weights, how)
        return OnlineTargets(loaded, encoder.name, source, device)
    progress = announce(f"features of {encoder.name}") if announce else None
    return cached_targets(
        source,
        encoder.name,
        encoder.image_size,
        encoder.weights,
        encoder.standardize,
        cache,
        device,
        progress,
        storage=_STORAGE[options.encoder_storage],
        options=how,
    )


def choose_block(config: RunConfig, *wishes: BlockIndex | None) -> BlockIndex:
    """The first block index of ``wishes`` that is not None, or else the family's suggestion."""
    return next((wish for wish in wishes if wish is not None), shape_of_model(config).block)


def shape_of_model(config: RunConfig) -> Shape:
    """What is known of a run's denoiser without building it; of a pretrained one, of the released model."""
    return shape_of(family_facts(config.model.family), config.model.size)


def build_regularizer(run: Run, in_dim: int, out_dims: Sequence[int]) -> REPA:
    """The regularizer of a run, from the tap's width to its encoders', initialised from its own stream."""
    settings = run.config.regularizer
    options: Options = {
        "projector": settings.projector.type,
        "width": settings.projector.width,
        "kernel": settings.projector.kernel,
        "loss": settings.loss,
        "temperature": settings.temperature,
        "spatial_align": settings.spatial_align,
        "spatial_norm": settings.spatial_norm,
        "resample": Resample(**settings.resample.model_dump()),
        "cutoff": _cutoff(settings.schedule),
    }
    schedule = schedule_of(run.config)
    with seeded(run.seed, "init/projector"):
        if settings.type == "urepa":
            manifold = Manifold(**settings.manifold.model_dump())
            return UREPA(in_dim, out_dims, schedule, settings.manifold_weight, manifold, **options)
        return REPA(in_dim, out_dims, schedule, **options)


def schedule_of(config: RunConfig) -> Schedule:
    """The regularizer's weight over a run's steps."""
    named = {field.name for field in fields(Schedule)}
    shape = config.regularizer.schedule.model_dump(include=named)
    return Schedule(weight=config.regularizer.weight, total_steps=config.train.steps, **shape)


def _cutoff(schedule: ScheduleConfig) -> SimilarityCutoff | None:
    if schedule.similarity_threshold is None:
        return None
    return SimilarityCutoff(
        schedule.similarity_threshold,
        schedule.similarity_ema_decay,
        schedule.threshold_mode,
        schedule.similarity_min_count,
        schedule.probe_every,
    )
