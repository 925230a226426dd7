"""One run on this process's device, and one training step of it."""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs
from torch import nn

from repa_lab.align import Needs, Prediction, Schedule, Shapes
from repa_lab.align.losses import mean_over_ranks
from repa_lab.align.regularizer import CosineTarget
from repa_lab.encoders.targets import Targets
from repa_lab.files import write_json
from repa_lab.kernels import kernels
from repa_lab.models.families import FAMILIES
from repa_lab.models.family import BlockIndex, Family
from repa_lab.models.tap import AttentionTap, Tap
from repa_lab.runs.files import Row
from repa_lab.spec import EncoderSettings, ResolvedOptions, RunOptions
from repa_lab.spec.identity import Run
from repa_lab.spec.train import LearningRateSettings
from repa_lab.training.aligner import Aligner, PrefetchWeight, Stopwatch, Term, build_regularizer, open_targets
from repa_lab.training.batches import Batch, Steps
from repa_lab.training.checkpoint import EMA, INPUT_FILE, Progress, TrainState
from repa_lab.training.costs import costs_so_far
from repa_lab.training.data import open_data
from repa_lab.training.device import (
    computing_in,
    is_on_cpu,
    measuring_precision,
    pick_device,
    require_equal_parts,
    resolved,
)
from repa_lab.training.diffusion import denoising_loss, over_pixels
from repa_lab.training.evaluate import Evaluator, Match
from repa_lab.training.model import open_model
from repa_lab.training.resolve import (
    aligned_block,
    attended_blocks,
    choose_block,
    needs_of,
    protocols_of,
    resolved_regularizers,
    shape_of_model,
)
from repa_lab.training.teachers import Teachers, denoiser_times, draws_of


@dataclass(frozen=True)
class StepOutcome:
    """The result of one optimizer step; tensors stay on the device until :meth:`row` is called.

    Attributes:
        values: means over this process's part of the batch, by name in the metric row.
        weights: the regularizers' weights, by name in the metric row.
        learning_rate: the learning rate; None if it is constant.
        grad_norm: the norm of the gradient before clipping; None without clipping.
    """

    values: dict[str, torch.Tensor]
    weights: dict[str, float]
    learning_rate: float | None
    grad_norm: torch.Tensor | None

    def row(self) -> Row:
        """Return the means over all processes as numbers; every process must call this."""
        means = mean_over_ranks(torch.stack(list(self.values.values()))).tolist()
        row: Row = {**dict(zip(self.values, means, strict=True)), **self.weights}
        if self.learning_rate is not None:
            row["lr"] = self.learning_rate
        if self.grad_norm is not None:
            row["grad_norm"] = self.grad_norm.item()
        return row


class Trainer:
    """The components of one run on this process's device, and its training step.

    With several processes (torchrun, accelerate launch) each trains on its part of every batch.

    Raises:
        DataError, EncoderError, PretrainedError, ProcessError, TapError, DeviceError: a component is not available;
            nothing has been trained by then.
    """

    def __init__(self, run: Run, options: RunOptions, cache: Path) -> None:
        config = run.config
        pick_device(options)  # refuses what accelerate would silently replace
        self.options = options = resolved(options)
        self.config, self.progress, self._run = config, Progress(), run
        family = FAMILIES[config.model.family]
        self._is_unet = family.kind == "unet"
        self.accelerator = _accelerator(family, options)
        self.device: torch.device = self.accelerator.device
        part = (self.accelerator.process_index, self.accelerator.num_processes)
        require_equal_parts(config.train.batch_size, part[1])
        self._micro_batch = None if options.micro_batch == "auto" else options.micro_batch
        images = open_data(config, cache, self.device)
        self.notes = images.base.notes
        self._input = images.input if config.model.pretrained is None else None
        self.model = open_model(run, images, options, cache, self.device)
        if options.gradient_checkpointing:
            denoiser: Any = self.model.denoiser
            denoiser.enable_gradient_checkpointing()

        def targets_of(encoder: EncoderSettings) -> Targets:
            attention = attended_blocks(config, encoder)
            return open_targets(encoder, images, options, cache, self.device, attention=attention)

        needs = needs_of(config)
        asked = dict.fromkeys(encoder for one in needs for encoder in one.encoders)
        targets = {encoder: targets_of(encoder) for encoder in asked}
        measuring = config.alignment_encoder
        measured = (targets.get(measuring) or targets_of(measuring)) if measuring else None
        self.evaluator = Evaluator(config, images, self.model, measured, cache, self.device, part)
        self._stopwatch = Stopwatch(self.device)
        readers = [one.reader for one in targets.values()]
        if options.data_workers == 0:  # reading within this process takes its steps time
            readers = [reader and self._stopwatch.timed(reader) for reader in readers]
        prefetch = [
            PrefetchWeight(Schedule.of(settings, config.train.steps)) if one.encoders else None
            for settings, one in zip(config.regularizers, needs, strict=True)
        ]
        process, conditioning = self.model.process, self.model.conditioning
        weights = [one for one in prefetch if one is not None]
        draws = draws_of(needs, config.train, process, self.model.denoiser.input_grid)
        self._steps = Steps(config, run.seed, images, process, conditioning, part, readers, weights, draws)
        self.model.denoiser.to(self.device)
        if self._is_unet and self.device.type == "cuda":
            self.model.denoiser.to(memory_format=torch.channels_last)  # the layout of cuDNN's tensor core kernels
        self._taps: dict[BlockIndex | None, Tap] = {}
        channels = images.space.channels
        self.aligner = self._align(needs, targets, prefetch, channels) if needs else None
        frozen = (one.frozen for one in needs if one.frozen_taps)
        self._teachers = Teachers(self.model.denoiser, process, conditioning, frozen, self._taps)
        self.state = self._prepare(self.model.denoiser)
        self._stopwatch.take()  # forget what was read to build the components

    def batches(self) -> Iterator[Batch]:
        """Return the batches of the remaining steps."""
        remaining = range(self.progress.step, self.config.train.steps)
        return self._steps.load(remaining, self.device, self.options.data_workers)

    def step(self, batch: Batch) -> StepOutcome:
        """Take one optimizer step: noise, forward, tap, regularizer, backward, clip, optimise, EMA."""
        train, step = self.config.train, self.progress.step
        weights = self.aligner.weights(step) if self.aligner else {}
        with kernels(self.options.precision != "fp32", self._is_unet):
            values = self._within_memory(batch)  # calls _forward_backward
        rate = train.learning_rate(step)
        for group in self.state.optimizer.param_groups:
            group["lr"] = rate
        limit = train.grad_clip
        grad_norm = self._clip(limit) if limit else None
        self.state.optimizer.step()
        self.state.optimizer.zero_grad(set_to_none=True)
        self.state.ema.update(step)
        self.progress.step += 1
        self.progress.images += train.batch_size
        is_scheduled = train.lr_schedule != LearningRateSettings()
        return StepOutcome(values, weights, rate if is_scheduled else None, grad_norm)

    def _forward_backward(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Add the gradients of a batch, micro-batch by micro-batch, and return the means for its metric row."""
        aligner, process, step = self.aligner, self.model.process, self.progress.step
        active = aligner.active(step) if aligner else []
        needs = [term.needs for term in active]
        micro_batches, means = batch.split(self._micro_batch), dict[str, torch.Tensor]()
        for number, part in enumerate(micro_batches, start=1):
            share = len(part.t) / len(batch.t)
            with self._accumulating(is_last=number == len(micro_batches)):
                t = denoiser_times(needs, part)
                pixel_t = over_pixels(t, part.x)
                x_t, target = process.corrupt(part.x, part.noise, pixel_t)
                teachers = self._teachers(needs, part, self.state.ema, self.accelerator.autocast())
                output = self._denoiser(x_t, t, **part.condition)
                total = denoise = denoising_loss(output, target, self._loss_weight(pixel_t))
                values = {"loss/denoise": denoise}
                if aligner is not None and active:
                    prediction = Prediction(output, target)
                    aligned = aligner(active, part, step, self.device, prediction, t, teachers)
                    total = denoise + aligned.value if aligned.is_weighted else denoise
                    values |= aligned.values
                elif aligner is not None:
                    aligner.clear()
                self.accelerator.backward(total * share)
            values = {"loss/total": total, **values}
            means = {name: value.detach() * share + means.get(name, 0) for name, value in values.items()}
        return means

    def _within_memory(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Call :meth:`_forward_backward`; with `micro_batch: auto`, halve the micro-batch while memory runs out.

        Raises:
            OutOfMemoryError: the size was given, or a single image does not fit.
        """
        while True:
            try:
                return self._forward_backward(batch)
            except torch.OutOfMemoryError:
                tried = min(self._micro_batch or len(batch.t), len(batch.t))
                if self.options.micro_batch != "auto" or tried == 1:
                    raise
            # Outside the except block, because the error's traceback holds the tensors of the failed pass.
            self._micro_batch = tried // 2
            self.state.optimizer.zero_grad(set_to_none=True)
            if self.aligner:
                self.aligner.retract(self.progress.step)
            torch.cuda.empty_cache()  # does nothing without a GPU

    def _clip(self, limit: float) -> torch.Tensor:
        """Clip the gradients, unscaled if a scaler has scaled them, and return their norm before."""
        self.accelerator.unscale_gradients()
        return nn.utils.clip_grad_norm_(self._parameters, limit)

    def note_encoder_seconds(self) -> None:
        """Add the seconds of encoders since the last call to the progress; waits for the device."""
        self.progress.encoder_seconds += self._stopwatch.take()

    def measure(self) -> tuple[list[Row], torch.Tensor]:
        """Measure the averaged weights.

        Returns:
            A row for each protocol that is due, the first one with the run's costs so far, this measurement included;
            and the first samples as uint8 pixels ``(n, C, H, W)``.
        """
        denoiser, began = self.state.denoiser, time.perf_counter()
        block, tapped = self._measured_block()
        denoiser.eval()
        with self.state.ema.applied(), computing_in(denoiser, self._precision, self.device):
            due = protocols_of(self.config, self.progress.step)
            (row, samples), *others = (self.evaluator.quality(protocol) for protocol in due)
            tap = self.model.denoiser.tap(block)
            # Compiled code does not see a tap that is set later.
            with torch.compiler.set_stance("force_eager") if self.options.compile else nullcontext():
                row |= self.evaluator.alignment(tap, self._match() if block == tapped else None)
            tap.remove()
        denoiser.train()
        if self.aligner:
            self.aligner.clear()
        self.progress.evaluation_seconds += time.perf_counter() - began
        self.note_encoder_seconds()
        row |= costs_so_far(self.config, self.options, self.progress)
        return [{**self.progress.row(), **values} for values in (row, *(other for other, _ in others))], samples

    def protocols(self) -> dict[str, dict[str, Any]]:
        """Return everything that each number of :meth:`measure` depends on, by its name."""
        protocols, precision = self.evaluator.protocols(self._run.seed, self._measured_block()[0]), self._precision
        if precision == "fp32":  # the default is left out
            return protocols
        return {name: {**protocol, "precision": precision} for name, protocol in protocols.items()}

    def save(self, folder: Path) -> None:
        """Write everything that is needed to resume, or to export the model, into an empty folder."""
        self.note_encoder_seconds()
        self.state.save(folder, self.progress)
        write_json(folder / INPUT_FILE, asdict(self._input) if self._input else None)

    def resume(self, folder: Path) -> None:
        """Load what :meth:`save` wrote."""
        self.state.load(folder, self.progress)

    @property
    def _precision(self) -> str:
        """The precision in which the denoiser is measured."""
        return measuring_precision(self.config.evaluate, self.options.precision)

    def _measured_block(self) -> tuple[BlockIndex, BlockIndex]:
        """Return the block at which alignment is measured, and the block at which the regularizer acts or would act."""
        config = self.config
        tapped = aligned_block(config)
        return choose_block(config, config.evaluate.block_index, tapped), tapped

    def _match(self) -> Match | None:
        """Return how the projector matches tokens with the measuring encoder; None if it is trained for other ones."""
        measuring = self.config.alignment_encoder
        for term in self.aligner.terms if self.aligner else ():
            regularizer, encoders = term.regularizer, term.needs.encoders
            if isinstance(regularizer, CosineTarget) and measuring in encoders:
                return partial(regularizer.match, encoder=encoders.index(measuring))
        return None

    def _loss_weight(self, t: torch.Tensor) -> torch.Tensor | None:
        settings = self.config.train.loss_weight
        return self.model.process.min_snr(t, settings.gamma) if settings.type == "min_snr" else None

    def _accumulating(self, is_last: bool) -> ExitStack:
        """Return a context in which processes exchange gradients only after the last micro-batch."""
        stack = ExitStack()
        if not is_last:
            stack.enter_context(self.accelerator.no_sync(self._denoiser))
            for term in self.aligner.terms if self.aligner else ():
                stack.enter_context(self.accelerator.no_sync(term.wrapped))
        return stack

    def _align(
        self,
        needs: Sequence[Needs],
        targets: Mapping[EncoderSettings, Targets],
        prefetch: Sequence[PrefetchWeight | None],
        channels: int,
    ) -> Aligner:
        """Return the aligner; its taps are set before the denoiser is wrapped."""
        denoiser = self.model.denoiser
        blocks = dict.fromkeys(block for one in needs for block in one.blocks if block is not None)
        self._taps |= {block: denoiser.tap(block) for block in blocks}
        attended = dict.fromkeys(block for one in needs for block in one.attention if block is not None)
        attention: dict[BlockIndex | None, AttentionTap] = {block: denoiser.tap_attention(block) for block in attended}
        places = self._measure_taps()
        terms = []
        for settings, one, weight in zip(resolved_regularizers(self.config), needs, prefetch, strict=True):
            shapes = Shapes(
                taps=tuple(places[block][0] for block in one.taps),
                encoders=tuple(targets[encoder].dim for encoder in one.encoders),
                ema_taps=tuple(places[block][0] for block in one.ema_taps),
                frozen_taps=tuple(places[block][0] for block in one.frozen_taps),
                strides=tuple(places[block][1] for block in one.taps),
                latents=channels,
            )
            terms.append(Term(build_regularizer(settings, shapes, self._run.seed), one, weight))
        return Aligner(terms, self._taps, targets, attention, self._stopwatch)

    @torch.no_grad()
    def _measure_taps(self) -> dict[BlockIndex | None, tuple[int, int]]:
        """Return the token width and the stride in latent cells at each tap.

        A pretrained denoiser runs on one image to find them.
        """
        if self.config.model.pretrained is None:
            shape = shape_of_model(self.config)
            return {block: (shape.width, shape.stride_at(block)) for block in self._taps}
        first = self._steps.draw(self._steps[0].to(self.device)).split(1)[0]
        self.model.denoiser.eval()
        with self.accelerator.autocast():
            self.model.denoiser(first.x, first.t, **first.condition)
        self.model.denoiser.train()
        tokens = {block: tap.take() for block, tap in self._taps.items()}
        return {block: (one.dim, first.x.shape[-2] // one.grid[0]) for block, one in tokens.items()}

    def _prepare(self, denoiser: nn.Module) -> TrainState:
        """Build the optimizer and the averages, and let accelerate wrap what trains."""
        train, accelerator = self.config.train, self.accelerator
        modules: dict[str, nn.Module] = {"denoiser": denoiser}
        if self.aligner:
            modules["regularizer"] = self.aligner.module
            self.aligner.prepare(accelerator)
        self._parameters = [p for module in modules.values() for p in module.parameters() if p.requires_grad]
        kind, arguments = getattr(torch.optim, train.optimizer.type), train.optimizer.arguments
        if self.device.type == "cuda" and "fused" in inspect.signature(kind).parameters:
            arguments = {**arguments, "fused": True}
        optimizer = kind(self._parameters, lr=train.lr, weight_decay=train.weight_decay, **arguments)
        self._denoiser, scaled_optimizer = accelerator.prepare(denoiser, optimizer)
        if accelerator.scaler is not None:  # else accelerate's wrapper only adds a millisecond to every step
            optimizer = scaled_optimizer
        if self.options.compile:  # after the taps are set: torch.compile does not see later hooks
            denoiser.compile()
        ema = EMA(modules, train.averaging)
        return TrainState(denoiser, modules.get("regularizer"), optimizer, ema, accelerator.scaler)


def _accelerator(family: Family, options: ResolvedOptions) -> Accelerator:
    AcceleratorState._reset_state()  # accelerate keeps the precision of the process's previous run
    is_partly_unused = family.network is not None and family.network.unused
    unused = DistributedDataParallelKwargs(find_unused_parameters=is_partly_unused)
    precision = "no" if options.precision == "fp32" else options.precision
    return Accelerator(mixed_precision=precision, cpu=is_on_cpu(options), kwargs_handlers=[unused])
