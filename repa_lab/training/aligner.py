"""The alignment of a run: its tap, its targets and its regularizer, asked together once a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from repa_lab.align import REPA, UREPA, Alignment, Schedule
from repa_lab.data.sources import ImageSource
from repa_lab.encoders.encoder import load_encoder
from repa_lab.encoders.targets import OnlineTargets, Targets, cached_targets
from repa_lab.models.facts import BlockIndex, family_facts, shape_of
from repa_lab.models.family import BUILDERS
from repa_lab.models.tap import Tap
from repa_lab.spec import EncoderConfig, RunConfig
from repa_lab.spec.identity import Run
from repa_lab.training.images import Announce
from repa_lab.training.streams import seeded


class Aligner:
    """Turns what the tap captured in the latest forward pass into the regularizer's loss.

    Args:
        run: a run whose regularizer is not ``none``.
        denoiser: the denoiser, not yet wrapped or compiled.
        targets: encoder tokens of the run's images.

    Raises:
        TapError: the denoiser has no such block.
    """

    def __init__(self, run: Run, denoiser: nn.Module, targets: Targets) -> None:
        self.targets = targets
        self.tap = tap_denoiser(run.config, denoiser, choose_block(run.config, run.config.regularizer.block_index))
        self.regularizer = build_regularizer(run, targets.dim)
        self._call: nn.Module = self.regularizer

    def prepare(self, accelerator: Accelerator) -> None:
        """Let accelerate wrap the regularizer as it wraps the denoiser."""
        self._call = accelerator.prepare(self.regularizer.to(accelerator.device))

    def __call__(self, index: torch.Tensor, step: int, device: torch.device) -> Alignment | None:
        """The alignment of the images ``index`` ``(B,)``, or None where the weight is 0: then no encoder is asked."""
        if self.regularizer.weight_at(step) == 0:
            self.tap.clear()
            return None
        teacher = self.targets(index, device)
        alignment: Alignment = self._call(self.tap.take(), teacher, step)
        return alignment


def open_targets(
    encoder: EncoderConfig, source: ImageSource, cache: Path, device: torch.device, announce: Announce | None = None
) -> Targets:
    """The encoder's tokens of the source's images, from the cache unless the settings say otherwise.

    Raises:
        EncoderError: the encoder cannot be loaded or does not give patch tokens.
    """
    if not encoder.cache:
        loaded = load_encoder(encoder.name, encoder.image_size, source.side, encoder.weights)
        return OnlineTargets(loaded, encoder.name, source, device)
    progress = announce(f"features of {encoder.name}") if announce else None
    options = (encoder.name, encoder.image_size, encoder.weights, encoder.standardize)
    return cached_targets(source, *options, cache, device, progress)


def choose_block(config: RunConfig, *wishes: BlockIndex | None) -> BlockIndex:
    """The first block index of ``wishes`` that is not None, or else the family's suggestion."""
    suggested = shape_of(family_facts(config.model.family), config.model.size).block
    return next((wish for wish in wishes if wish is not None), suggested)


def tap_denoiser(config: RunConfig, denoiser: nn.Module, block: BlockIndex) -> Tap:
    """Hook a block of a run's denoiser.

    Raises:
        TapError: the denoiser has no such block.
    """
    return BUILDERS[config.model.family].tap(denoiser, block)


def build_regularizer(run: Run, out_dim: int) -> REPA:
    """The regularizer of a run, from the tap's width to the encoder's, initialised from its own stream."""
    settings = run.config.regularizer
    in_dim = shape_of(family_facts(run.config.model.family), run.config.model.size).width
    schedule = Schedule(weight=settings.weight, total_steps=run.config.train.steps, **settings.schedule.model_dump())
    projector: dict[str, Any] = {"width": settings.projector.width, "projector": settings.projector.type}
    with seeded(run.seed, "init/projector"):
        if settings.type == "urepa":
            return UREPA(in_dim, out_dim, schedule, settings.manifold_weight, **projector)
        return REPA(in_dim, out_dim, schedule, **projector)
