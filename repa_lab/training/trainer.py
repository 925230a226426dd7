"""One run on this process's device: its parts, put together, and one step of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch.utils.data import DataLoader

from repa_lab.align import Alignment
from repa_lab.align.ranks import mean_over_ranks
from repa_lab.encoders.targets import Targets
from repa_lab.models.facts import shape_of
from repa_lab.models.families import family_facts
from repa_lab.models.family import BUILDERS, Input
from repa_lab.runs import files
from repa_lab.runs.files import Row
from repa_lab.spec import EncoderConfig, RunConfig, RunOptions
from repa_lab.spec.identity import Run
from repa_lab.training.aligner import Aligner, choose_block, open_targets, tap_denoiser
from repa_lab.training.checkpoint import INPUT_FILE, Progress, Trained
from repa_lab.training.device import MIXED_PRECISION, DeviceError, pick_device
from repa_lab.training.ema import EMA
from repa_lab.training.evaluate import Evaluator, Match
from repa_lab.training.images import open_images
from repa_lab.training.objective import Batch, Steps, denoising_loss, interpolate
from repa_lab.training.streams import seeded


@dataclass(frozen=True)
class StepOutcome:
    """What one optimizer step yielded; tensors stay on the device until a row asks for them.

    Attributes:
        values: means over this process's part of the batch, by their names in a row.
        weight: the regularizer's weight; None without one.
        grad_norm: the norm of the gradient before clipping; None where nothing is clipped.
    """

    values: dict[str, torch.Tensor]
    weight: float | None
    grad_norm: torch.Tensor | None

    def row(self) -> Row:
        """As numbers, means over all processes; each of them must ask."""
        means = mean_over_ranks(torch.stack(list(self.values.values()))).tolist()
        row: Row = dict(zip(self.values, means, strict=True))
        if self.weight is not None:
            row["align/weight"] = self.weight
        if self.grad_norm is not None:
            row["grad_norm"] = self.grad_norm.item()
        return row


class Trainer:
    """The parts of one run on this process's device, and one step of it.

    Where several processes were started (torchrun, accelerate launch), each takes its part of every batch.

    Raises:
        DataError, EncoderError, TapError, DeviceError: a part cannot be had; nothing has been trained by then.
    """

    def __init__(self, run: Run, options: RunOptions, cache: Path) -> None:
        config, self.options, self.progress = run.config, options, Progress()
        self.config = config
        pick_device(options)  # refuses what would otherwise fall back in silence
        AcceleratorState._reset_state()  # accelerate keeps the precision of this process's run before
        self.accelerator = Accelerator(mixed_precision=MIXED_PRECISION[options.precision], cpu=options.device == "cpu")
        self.device: torch.device = self.accelerator.device
        part = (self.accelerator.process_index, self.accelerator.num_processes)
        require_equal_parts(config, part[1])
        images = open_images(config.data, cache, device=self.device)
        self.input = images.input
        denoiser = build_denoiser(config, images.input, run.seed)
        if options.gradient_checkpointing:
            checkpointing: Any = denoiser
            checkpointing.enable_gradient_checkpointing()

        def targets(encoder: EncoderConfig) -> Targets:
            return open_targets(encoder, images, options, cache, self.device)

        own = {encoder: targets(encoder) for encoder in config.regularizer.encoders}
        self.aligner = Aligner(run, denoiser, [own[e] for e in config.regularizer.encoders]) if own else None
        measuring = config.alignment_encoder
        measured = (own.get(measuring) or targets(measuring)) if measuring else None
        self.evaluator = Evaluator(config.evaluate, images, run.seed, measured, cache, self.device, part)
        readers = [own[encoder].reader for encoder in config.regularizer.encoders]
        weight = self.aligner.regularizer.schedule if self.aligner else None
        self._steps = Steps(config, run.seed, images, part, readers, weight)
        self._trained = self._prepare(denoiser)

    def batches(self) -> Iterator[Batch]:
        """The batches of the steps that are left."""
        left = range(self.progress.step, self.config.train.steps)
        pin, workers = self.device.type == "cuda", self.options.data_workers
        return iter(DataLoader(self._steps, batch_size=None, sampler=left, num_workers=workers, pin_memory=pin))

    def step(self, batch: Batch) -> StepOutcome:
        """One optimizer step on one batch, in as many micro-batches as the options say."""
        weight = self.aligner.regularizer.weight_at(self.progress.step) if self.aligner else None
        values: dict[str, torch.Tensor] = {}
        parts = batch.split(self.options.micro_batch)
        for number, part in enumerate(parts, start=1):
            share = len(part.t) / len(batch.t)
            with self._accumulating(until_next=number < len(parts)):
                found = self._pass(part.to(self.device), share)
            values = {name: value * share + values.get(name, 0) for name, value in found.items()}
        limit = self.config.train.grad_clip
        grad_norm = self.accelerator.clip_grad_norm_(self._parameters, limit) if limit else None
        self._trained.optimizer.step()
        self._trained.optimizer.zero_grad(set_to_none=True)
        self._trained.ema.update()
        self.progress.step += 1
        self.progress.images += self.config.train.batch_size
        return StepOutcome(values, weight, grad_norm)

    def measure(self) -> tuple[Row, torch.Tensor]:
        """Measurements of the averaged weights, and the first samples ``(n, C, H, W)`` as uint8 pixels."""
        denoiser, config = self._trained.denoiser, self.config
        own_block = choose_block(config, config.regularizer.block_index if self.aligner else None)
        block = choose_block(config, config.evaluate.block_index, own_block)
        denoiser.eval()
        with self._trained.ema.applied():
            row, samples = self.evaluator.quality(denoiser)
            tap = tap_denoiser(config, denoiser, block)
            row |= self.evaluator.alignment(denoiser, tap, self._match() if block == own_block else None)
            tap.remove()
        denoiser.train()
        if self.aligner:
            self.aligner.tap.clear()
        return row, samples

    def save(self, folder: Path) -> None:
        """Write all that is needed to go on, or to export the model, into an empty folder."""
        self._trained.save(folder, self.progress)
        files.write_json(folder / INPUT_FILE, asdict(self.input))

    def resume(self, folder: Path) -> None:
        """Take up what :meth:`save` wrote."""
        self._trained.load(folder, self.progress)

    def _pass(self, part: Batch, share: float) -> dict[str, torch.Tensor]:
        """Forward and backward through a micro-batch that is ``share`` of this process's batch."""
        x_t, target = interpolate(part.x, part.noise, part.t)
        total = denoise = denoising_loss(self._denoiser(x_t, part.t, part.y), target)
        alignment = self.aligner(part, self.progress.step, self.device) if self.aligner else None
        if alignment is not None and alignment.weight > 0:
            total = denoise + alignment.loss
        self.accelerator.backward(total * share)
        return {"loss/total": total.detach(), "loss/denoise": denoise.detach(), **_parts(alignment)}

    def _accumulating(self, until_next: bool) -> ExitStack:
        """Within this, gradients stay with each process if another micro-batch of the step is to come."""
        stack = ExitStack()
        if until_next:
            stack.enter_context(self.accelerator.no_sync(self._denoiser))
            if self.aligner:
                stack.enter_context(self.accelerator.no_sync(self.aligner.wrapped))
        return stack

    def _match(self) -> Match | None:
        """The training projector's view, which speaks only about the encoders that it was trained on."""
        encoders, measuring = self.config.regularizer.encoders, self.config.alignment_encoder
        if self.aligner is None or measuring not in encoders:
            return None
        regularizer, number = self.aligner.regularizer, encoders.index(measuring)
        return lambda student, teacher: regularizer.match(student, teacher, number)

    def _prepare(self, denoiser: nn.Module) -> Trained:
        train, accelerator = self.config.train, self.accelerator
        modules: dict[str, nn.Module] = {"denoiser": denoiser.to(self.device)}
        if self.aligner:
            modules["regularizer"] = self.aligner.regularizer
            self.aligner.prepare(accelerator)
        self._parameters = [p for module in modules.values() for p in module.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(self._parameters, lr=train.lr, weight_decay=train.weight_decay)
        self._denoiser, optimizer = accelerator.prepare(denoiser, optimizer)
        if self.options.compile:  # the tap is set by now; a hook set later would not be seen
            self._denoiser = torch.compile(self._denoiser)
        ema = EMA(modules, train.ema)
        return Trained(denoiser, modules.get("regularizer"), optimizer, ema, accelerator.scaler)


def build_denoiser(config: RunConfig, given: Input, seed: int) -> nn.Module:
    """A freshly initialised denoiser; the same for every arm with this model and seed, whatever its regularizer."""
    name, size = config.model.family, config.model.size
    shape = shape_of(family_facts(name), size)
    with seeded(seed, "init"):
        return BUILDERS[name].build(size or "", shape, given)


def require_equal_parts(config: RunConfig, processes: int) -> None:
    """Refuse a batch that the processes could not share equally, for their means would not be the batch's.

    Raises:
        DeviceError: ``train.batch_size`` is no multiple of the number of processes.
    """
    size = config.train.batch_size
    if size % processes:
        raise DeviceError("batch_size", f"train.batch_size {size} cannot be shared equally by {processes} processes")


def _parts(alignment: Alignment | None) -> dict[str, torch.Tensor]:
    if alignment is None:
        return {}
    parts = {"loss/aligned": alignment.loss, "align/cosine": alignment.cosine, "align/manifold": alignment.manifold}
    return {name: value.detach() for name, value in parts.items() if value is not None}
