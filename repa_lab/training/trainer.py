"""One run on this process's device, and one training step of it."""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator
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

from repa_lab.align import Prediction
from repa_lab.align.losses import mean_over_ranks
from repa_lab.files import write_json
from repa_lab.kernels import kernels
from repa_lab.models.families import FAMILIES
from repa_lab.models.family import BlockIndex, Family
from repa_lab.runs.files import Row
from repa_lab.spec import ResolvedOptions, RunOptions
from repa_lab.spec.identity import Run
from repa_lab.spec.train import LearningRateSettings
from repa_lab.training.aligner import Aligner, denoiser_times, open_targets
from repa_lab.training.batches import Batch, Steps, open_data
from repa_lab.training.checkpoint import EMA, INPUT_FILE, Progress, TrainState
from repa_lab.training.costs import costs_so_far
from repa_lab.training.device import (
    computing_in,
    is_on_cpu,
    measuring_precision,
    pick_device,
    require_equal_parts,
    resolved,
)
from repa_lab.training.diffusion import denoising_loss, over_pixels
from repa_lab.training.evaluate import Evaluator
from repa_lab.training.model import open_model
from repa_lab.training.resolve import aligned_block, choose_block, protocols_of


@dataclass(frozen=True)
class StepOutcome:
    """The result of one optimizer step; tensors stay on the device until :meth:`row` is called.

    Attributes:
        values: means over this process's part of the batch, by name in the metric row.
        numbers: the same in all processes: weights, a learning rate that changes, the gradient's norm before clipping.
    """

    values: dict[str, torch.Tensor]
    numbers: dict[str, float | torch.Tensor]

    def row(self) -> Row:
        """Return the means over all processes as numbers; every process must call this."""
        means = mean_over_ranks(torch.stack(list(self.values.values()))).tolist()
        return dict(zip(self.values, means, strict=True)) | {name: float(value) for name, value in self.numbers.items()}


class Trainer:
    """The components of one run on this process's device, and its training step.

    With several processes (torchrun, accelerate launch) each trains on its part of every batch.

    Raises:
        DataError, EncoderError, PretrainedError, TapError, DeviceError: a component is not available;
            nothing has been trained by then.
    """

    def __init__(self, run: Run, options: RunOptions, cache: Path) -> None:
        config = run.config
        pick_device(options)  # refuses what accelerate would silently replace
        self.options = options = resolved(options)
        self.config, self.progress, self._run = config, Progress(), run
        self._precision = measuring_precision(config.evaluate, options.precision)  # of the denoiser
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
        denoiser: Any = self.model.denoiser
        if options.gradient_checkpointing:
            denoiser.enable_gradient_checkpointing()
        denoiser.to(self.device)
        if self._is_unet and self.device.type == "cuda":
            denoiser.to(memory_format=torch.channels_last)  # the layout of cuDNN's tensor core kernels
        self.aligner = aligner = Aligner(run, images, self.model, options, cache, self.device)
        targets, measured = None, config.alignment_encoder
        if measured:
            targets = aligner.targets.get(measured) or open_targets(measured, images, options, cache, self.device)
        self.evaluator = Evaluator(config, images, self.model, targets, cache, self.device, part)
        readers = [one.reader for one in aligner.targets.values()]
        if options.data_workers == 0:  # reading within this process takes its steps time
            readers = [reader and aligner.stopwatch.running()(reader) for reader in readers]
        times = partial(self.model.process.times, config.train.times)
        weights = [term.prefetch for term in aligner.terms if term.needs.encoders]
        conditioning = self.model.conditioning
        self._steps = Steps(config, run.seed, images, times, conditioning, part, readers, weights, aligner.draws)
        self.state = self._prepare(denoiser)

    def batches(self) -> Iterator[Batch]:
        """Return the batches of the remaining steps."""
        remaining = range(self.progress.step, self.config.train.steps)
        return self._steps.load(remaining, self.device, self.options.data_workers)

    def step(self, batch: Batch) -> StepOutcome:
        """Take one optimizer step: noise, forward, tap, regularizer, backward, clip, optimise, EMA."""
        train, step, state = self.config.train, self.progress.step, self.state
        numbers: dict[str, float | torch.Tensor] = {**self.aligner.weights(step)}
        with kernels(self.options.precision != "fp32", self._is_unet):
            values = self._within_memory(batch)  # calls _forward_backward
        rate = train.learning_rate(step)
        for group in state.optimizer.param_groups:
            group["lr"] = rate
        if train.lr_schedule != LearningRateSettings():
            numbers["lr"] = rate
        if train.grad_clip:
            self.accelerator.unscale_gradients()
            numbers["grad_norm"] = nn.utils.clip_grad_norm_(state.ema.live.values(), train.grad_clip)
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        state.ema.update(step)
        self.progress.step += 1
        self.progress.images += train.batch_size
        return StepOutcome(values, numbers)

    def _forward_backward(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Add the gradients of a batch, micro-batch by micro-batch, and return the means for its metric row."""
        aligner, process, step, weight = (
            self.aligner,
            self.model.process,
            self.progress.step,
            self.config.train.loss_weight,
        )
        active = aligner.active(step)
        micro_batches, means = batch.split(self._micro_batch), dict[str, torch.Tensor]()
        for part in micro_batches:
            share = len(part.t) / len(batch.t)
            with ExitStack() as stack:
                if part is not micro_batches[-1]:  # processes exchange gradients only after the last one
                    for module in (self._denoiser, *(term.wrapped for term in aligner.terms)):
                        stack.enter_context(self.accelerator.no_sync(module))
                t = denoiser_times(active, part)
                pixel_t = over_pixels(t, part.x)
                x_t, target = process.corrupt(part.x, part.noise, pixel_t)
                teachers = aligner.teach(active, part, self.state.ema, self.accelerator.autocast())
                output = self._denoiser(x_t, t, **part.condition)
                loss_weight = process.min_snr(pixel_t, weight.gamma) if weight.type == "min_snr" else None
                denoise = denoising_loss(output, target, loss_weight)
                aligned, values = aligner(active, part, step, Prediction(output, target), t, teachers)
                total = denoise if aligned is None else denoise + aligned
                self.accelerator.backward(total * share)
            values = {"loss/total": total, "loss/denoise": denoise, **values}
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
            self.aligner.retract(self.progress.step)
            torch.cuda.empty_cache()  # does nothing without a GPU

    def note_encoder_seconds(self) -> None:
        """Add the seconds of encoders since the last call to the progress; waits for the device."""
        self.progress.encoder_seconds += self.aligner.stopwatch.take()

    def measure(self) -> tuple[list[Row], torch.Tensor]:
        """Measure the averaged weights.

        Returns:
            A row for each protocol that is due, the first one with the run's costs so far, this measurement included;
            and the first samples as uint8 pixels ``(n, C, H, W)``.
        """
        config, denoiser, began = self.config, self.state.denoiser, time.perf_counter()
        block, tapped = self._measured_block()
        denoiser.eval()
        with self.state.ema.applied(), computing_in(denoiser, self._precision, self.device):
            due = protocols_of(config, self.progress.step)
            (row, samples), *others = (self.evaluator.quality(protocol) for protocol in due)
            tap = self.model.denoiser.tap(block)
            match = self.aligner.match(config.alignment_encoder) if block == tapped else None
            # Compiled code does not see a tap that is set later.
            with torch.compiler.set_stance("force_eager") if self.options.compile else nullcontext():
                row |= self.evaluator.alignment(tap, match)
            tap.remove()
        denoiser.train()
        self.aligner.clear()
        self.progress.evaluation_seconds += time.perf_counter() - began
        self.note_encoder_seconds()
        row |= costs_so_far(config, self.options, self.progress)
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

    def _measured_block(self) -> tuple[BlockIndex, BlockIndex]:
        """Return the block at which alignment is measured, and the block at which the regularizer acts or would act."""
        tapped = aligned_block(self.config)
        return choose_block(self.config, self.config.evaluate.block_index, tapped), tapped

    def _prepare(self, denoiser: nn.Module) -> TrainState:
        """Build the optimizer and the averages, and let accelerate wrap what trains."""
        train, accelerator, regularizer = self.config.train, self.accelerator, self.aligner.module
        modules: dict[str, nn.Module] = {"denoiser": denoiser}
        if regularizer is not None:
            modules["regularizer"] = regularizer
            self.aligner.prepare(accelerator)
        ema = EMA(modules, train.averaging)
        kind, arguments = getattr(torch.optim, train.optimizer.type), train.optimizer.arguments
        if self.device.type == "cuda" and "fused" in inspect.signature(kind).parameters:
            arguments = {**arguments, "fused": True}
        optimizer = kind(ema.live.values(), lr=train.lr, weight_decay=train.weight_decay, **arguments)
        self._denoiser, scaled_optimizer = accelerator.prepare(denoiser, optimizer)
        if accelerator.scaler is not None:  # else accelerate's wrapper only adds a millisecond to every step
            optimizer = scaled_optimizer
        if self.options.compile:  # after the taps are set: torch.compile does not see later hooks
            denoiser.compile()
        return TrainState(denoiser, regularizer, optimizer, ema, accelerator.scaler)


def _accelerator(family: Family, options: ResolvedOptions) -> Accelerator:
    AcceleratorState._reset_state()  # accelerate keeps the precision of the process's previous run
    is_partly_unused = family.network is not None and family.network.unused
    unused = DistributedDataParallelKwargs(find_unused_parameters=is_partly_unused)
    precision = "no" if options.precision == "fp32" else options.precision
    return Accelerator(mixed_precision=precision, cpu=is_on_cpu(options), kwargs_handlers=[unused])
