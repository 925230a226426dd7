"""One run on this process's device: its parts, put together, and one step of it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs
from torch import nn
from torch.utils.data import DataLoader

from repa_lab.align import REPA, Needs, Prediction, Schedule, Shapes, Tokens
from repa_lab.align.ranks import mean_over_ranks
from repa_lab.encoders.targets import Targets
from repa_lab.models.family import BlockIndex
from repa_lab.models.tap import Tap
from repa_lab.runs import files
from repa_lab.runs.files import Row
from repa_lab.spec import EncoderSettings, RunConfig, RunOptions
from repa_lab.spec.identity import Run
from repa_lab.spec.schema import LearningRateSettings
from repa_lab.training.aligner import Aligner, PrefetchWeight, open_targets
from repa_lab.training.batches import Batch, Steps, denoising_loss
from repa_lab.training.checkpoint import INPUT_FILE, PREFIX, Progress, Trained
from repa_lab.training.device import MIXED_PRECISION, DeviceError, computing_in, measuring_precision, pick_device
from repa_lab.training.ema import EMA
from repa_lab.training.evaluate import Evaluator, Match
from repa_lab.training.ledger import ledger
from repa_lab.training.micro_batch import MicroBatch
from repa_lab.training.model import open_data, open_model
from repa_lab.training.needs import choose_block, needs_of, shape_of_model
from repa_lab.training.protocol import tiers
from repa_lab.training.stopwatch import Stopwatch, TimedTargets


@dataclass(frozen=True)
class StepOutcome:
    """What one optimizer step yielded; tensors stay on the device until a row asks for them.

    Attributes:
        values: means over this process's part of the batch, by their names in a row.
        weight: the regularizer's weight; None without one.
        learning_rate: where it changes over steps; None where it is constant.
        grad_norm: the norm of the gradient before clipping; None where nothing is clipped.
    """

    values: dict[str, torch.Tensor]
    weight: float | None
    learning_rate: float | None
    grad_norm: torch.Tensor | None

    def row(self) -> Row:
        """As numbers, means over all processes; each of them must ask."""
        means = mean_over_ranks(torch.stack(list(self.values.values()))).tolist()
        row: Row = dict(zip(self.values, means, strict=True))
        if self.weight is not None:
            row["align/weight"] = self.weight
        if self.learning_rate is not None:
            row["lr"] = self.learning_rate
        if self.grad_norm is not None:
            row["grad_norm"] = self.grad_norm.item()
        return row


class Trainer:
    """The parts of one run on this process's device, and one step of it.

    Where several processes were started (torchrun, accelerate launch), each takes its part of every batch.

    Raises:
        DataError, EncoderError, PretrainedError, ProcessError, TapError, DeviceError: a part cannot be had; nothing has
            been trained by then.
    """

    def __init__(self, run: Run, options: RunOptions, cache: Path) -> None:
        config, self.options, self.progress = run.config, options, Progress()
        self.config, self._run = config, run
        pick_device(options)  # refuses what would otherwise fall back in silence
        self.accelerator = _accelerator(config, options)
        self.device: torch.device = self.accelerator.device
        part = (self.accelerator.process_index, self.accelerator.num_processes)
        require_equal_parts(config, part[1])
        self._micro_batch = MicroBatch(options.micro_batch, part[1])
        images = open_data(config, cache, self.device)
        self.notes = images.base.notes
        self._input = images.input if config.model.pretrained is None else None
        self.model = open_model(run, images, options, cache, self.device)
        if options.gradient_checkpointing:
            checkpointing: Any = self.model.denoiser
            checkpointing.enable_gradient_checkpointing()

        def targets(encoder: EncoderSettings) -> Targets:
            return open_targets(encoder, images, options, cache, self.device)

        needs = needs_of(config)
        own = {encoder: targets(encoder) for encoder in needs.encoders}
        measuring = config.alignment_encoder
        measured = (own.get(measuring) or targets(measuring)) if measuring else None
        self.evaluator = Evaluator(config, images, self.model, measured, cache, self.device, part)
        self._stopwatch, reads_here = Stopwatch(self.device), options.data_workers == 0
        timed = [TimedTargets(own[encoder], self._stopwatch, reads_here) for encoder in needs.encoders]
        readers = [one.reader for one in timed]
        self._prefetch = PrefetchWeight(Schedule.of(config.regularizer, config.train.steps)) if own else None
        parts = (self.model.process, self.model.conditioning, part, readers, self._prefetch)
        self._steps = Steps(config, run.seed, images, *parts)
        self.model.denoiser.to(self.device)
        self.aligner = self._align(run, needs, timed) if needs != Needs() else None
        self._trained = self._prepare(self.model.denoiser)
        self._stopwatch.take()  # of what was read to build the parts

    def batches(self) -> Iterator[Batch]:
        """The batches of the steps that are left."""
        left = range(self.progress.step, self.config.train.steps)
        pin, workers = self.device.type == "cuda", self.options.data_workers
        return iter(DataLoader(self._steps, batch_size=None, sampler=left, num_workers=workers, pin_memory=pin))

    def step(self, batch: Batch) -> StepOutcome:
        """Take one optimizer step on one batch, in as many micro-batches as the options say or memory asks for."""
        weight = self.aligner.regularizer.weight_at(self.progress.step) if self.aligner else None
        values = self._within_memory(batch)
        rate = self.config.train.learning_rate(self.progress.step)
        for group in self._trained.optimizer.param_groups:
            group["lr"] = rate
        limit = self.config.train.grad_clip
        grad_norm = self.accelerator.clip_grad_norm_(self._parameters, limit) if limit else None
        self._trained.optimizer.step()
        self._trained.optimizer.zero_grad(set_to_none=True)
        self._trained.ema.update(self.progress.step)
        self.progress.step += 1
        self.progress.images += self.config.train.batch_size
        is_scheduled = self.config.train.lr_schedule != LearningRateSettings()
        return StepOutcome(values, weight, rate if is_scheduled else None, grad_norm)

    def _forward_backward(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Add the gradients of a batch, micro-batch by micro-batch; return the means that its row shows."""
        aligner, step = self.aligner, self.progress.step
        is_aligned = aligner is not None and aligner.is_active(step)
        weight = aligner.regularizer.weight_at(step) if aligner else 0.0
        micro_batches, means = batch.split(self._micro_batch.size), dict[str, torch.Tensor]()
        for number, micro_batch in enumerate(micro_batches, start=1):
            share, part = len(micro_batch.t) / len(batch.t), micro_batch.to(self.device)
            with self._accumulating(until_next=number < len(micro_batches)):
                x_t, target = self.model.process.corrupt(part.x, part.noise, part.t)
                averages = self._averaged(x_t, part) if is_aligned else ()
                output = self._denoiser(x_t, part.t, **part.condition)
                total = denoise = denoising_loss(output, target, self._loss_weight(part.t))
                values = {"loss/denoise": denoise}
                if aligner is not None and is_aligned:
                    loss = aligner(part, step, self.device, Prediction(output, target), averages)
                    aligned = weight * loss.value
                    total = denoise + aligned if weight else denoise
                    values |= {
                        "loss/aligned": aligned,
                        **{f"align/{name}": value for name, value in loss.parts.items()},
                    }
                elif aligner is not None:
                    aligner.clear()
                self.accelerator.backward(total * share)
            values = {"loss/total": total, **values}
            means = {name: value.detach() * share + means.get(name, 0) for name, value in values.items()}
        return means

    def measure(self) -> tuple[list[Row], torch.Tensor]:
        """Measurements of the averaged weights, a row for each protocol that is due, and the first samples
        ``(n, C, H, W)`` as uint8 pixels. The first row has what the run has cost up to now, this measurement
        included."""
        denoiser, config, began = self._trained.denoiser, self.config, time.perf_counter()
        block, own_block = self._measured_block()
        denoiser.eval()
        with self._trained.ema.applied(), computing_in(denoiser, self._precision, self.device):
            (row, samples), *rare = (self.evaluator.quality(tier) for tier in tiers(config, self.progress.step))
            tap = self.model.denoiser.tap(block)
            row |= self.evaluator.alignment(tap, self._match() if block == own_block else None)
            tap.remove()
        denoiser.train()
        if self.aligner:
            self.aligner.clear()
        self.progress.evaluation_seconds += time.perf_counter() - began
        self.progress.encoder_seconds += self._stopwatch.take()
        rows = [{**row, **ledger(self.config, self.options, self.progress)}, *(found for found, _ in rare)]
        return [{**self.progress.row(), **found} for found in rows], samples

    def protocols(self) -> dict[str, dict[str, Any]]:
        """What each number that :meth:`measure` yields depends on, by its name."""
        found, precision = self.evaluator.protocols(self._run.seed, self._measured_block()[0]), self._precision
        # Float32 goes without saying.
        return found if precision == "fp32" else {name: {**one, "precision": precision} for name, one in found.items()}

    @property
    def _precision(self) -> str:
        """The precision in which the denoiser is measured."""
        return measuring_precision(self.config.evaluate, self.options.precision)

    def save(self, folder: Path) -> None:
        """Write all that is needed to go on, or to export the model, into an empty folder."""
        self.progress.encoder_seconds += self._stopwatch.take()
        self._trained.save(folder, self.progress)
        files.write_json(folder / INPUT_FILE, asdict(self._input) if self._input else None)

    def resume(self, folder: Path) -> None:
        """Take up what :meth:`save` wrote."""
        self._trained.load(folder, self.progress)

    def _measured_block(self) -> tuple[BlockIndex, BlockIndex]:
        """Where alignment is measured, and where the regularizer acts or would."""
        config = self.config
        own = choose_block(config, config.regularizer.block_index if self.aligner else None)
        return choose_block(config, config.evaluate.block_index, own), own

    def _within_memory(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Call :meth:`_forward_backward`; where memory runs out, again in smaller micro-batches."""
        while True:
            try:
                return self._forward_backward(batch)
            except torch.OutOfMemoryError as error:
                self._micro_batch.shrink(len(batch.t), error)
            # Outside the except block, for until its end the error's traceback holds the tensors of the failed pass.
            self._trained.optimizer.zero_grad(set_to_none=True)
            if self.aligner:
                self.aligner.retract(self.progress.step)
            torch.cuda.empty_cache()  # does nothing without a GPU

    def _loss_weight(self, t: torch.Tensor) -> torch.Tensor | None:
        chosen = self.config.train.loss_weight
        return self.model.process.min_snr(t, chosen.gamma) if chosen.type == "min_snr" else None

    @torch.no_grad()
    def _averaged(self, x_t: torch.Tensor, part: Batch) -> list[Tokens]:
        """Return the tokens that the averaged denoiser has at its taps for the same noisy images."""
        if self.aligner is None or not self.aligner.ema_taps:
            return []
        average = self._trained.ema.average.items()
        weights = {name.removeprefix(PREFIX): value for name, value in average if name.startswith(PREFIX)}
        with self.accelerator.autocast():
            torch.func.functional_call(self._trained.denoiser, weights, (x_t, part.t), dict(part.condition))
        return [tap.take() for tap in self.aligner.ema_taps]

    def _accumulating(self, until_next: bool) -> ExitStack:
        """Within this, gradients stay with each process if another micro-batch of the step is to come."""
        stack = ExitStack()
        if until_next:
            stack.enter_context(self.accelerator.no_sync(self._denoiser))
            if self.aligner:
                stack.enter_context(self.accelerator.no_sync(self.aligner.wrapped))
        return stack

    def _match(self) -> Match | None:
        """Return how the training projector matches tokens, for the encoders that it was trained on."""
        encoders, measuring = self.config.regularizer.encoders, self.config.alignment_encoder
        regularizer = self.aligner and self.aligner.regularizer
        if not isinstance(regularizer, REPA) or measuring not in encoders:
            return None
        number = encoders.index(measuring)
        return lambda student, teacher: regularizer.match(student, teacher, number)

    def _align(self, run: Run, needs: Needs, targets: Sequence[Targets]) -> Aligner:
        """Return the aligner, its taps set on the denoiser before anything is wrapped around that."""
        blocks = [choose_block(run.config, block) for block in (*needs.taps, *needs.ema_taps)]
        hooks = [self.model.denoiser.tap(block) for block in blocks]
        taps, ema_taps = hooks[: len(needs.taps)], hooks[len(needs.taps) :]
        widths = self._widths(hooks)
        shapes = Shapes(widths[: len(taps)], tuple(one.dim for one in targets), widths[len(taps) :])
        return Aligner(run, needs, taps, ema_taps, shapes, targets, self._prefetch)

    @torch.no_grad()
    def _widths(self, taps: Sequence[Tap]) -> tuple[int, ...]:
        """Return the widths of what comes out at the taps; for a pretrained folder, of a forward pass of one image."""
        if self.config.model.pretrained is None:
            return (shape_of_model(self.config).width,) * len(taps)
        (first, *_) = self._steps[0].split(1)
        one = first.to(self.device)
        self.model.denoiser.eval()
        with self.accelerator.autocast():
            self.model.denoiser(one.x, one.t, **one.condition)
        self.model.denoiser.train()
        return tuple(tap.take().dim for tap in taps)

    def _prepare(self, denoiser: nn.Module) -> Trained:
        train, accelerator = self.config.train, self.accelerator
        modules: dict[str, nn.Module] = {"denoiser": denoiser.to(self.device)}
        if self.aligner:
            modules["regularizer"] = self.aligner.regularizer
            self.aligner.prepare(accelerator)
        self._parameters = [p for module in modules.values() for p in module.parameters() if p.requires_grad]
        kind = getattr(torch.optim, train.optimizer.type)
        optimizer = kind(self._parameters, lr=train.lr, weight_decay=train.weight_decay, **train.optimizer.arguments)
        self._denoiser, optimizer = accelerator.prepare(denoiser, optimizer)
        if self.options.compile:  # the tap is set by now; a hook set later would not be seen
            self._denoiser = torch.compile(self._denoiser)
        ema = EMA(modules, train.averaging)
        return Trained(denoiser, modules.get("regularizer"), optimizer, ema, accelerator.scaler)


def _accelerator(config: RunConfig, options: RunOptions) -> Accelerator:
    AcceleratorState._reset_state()  # accelerate keeps the precision of this process's run before
    # In many pretrained models the last block's text leads nowhere, and DistributedDataParallel would wait for its
    # gradients.
    unused = DistributedDataParallelKwargs(find_unused_parameters=config.model.pretrained is not None)
    precision = MIXED_PRECISION[options.precision]
    return Accelerator(mixed_precision=precision, cpu=options.device == "cpu", kwargs_handlers=[unused])


def require_equal_parts(config: RunConfig, processes: int) -> None:
    """Refuse a batch that the processes could not share equally, for their means would not be the batch's.

    Raises:
        DeviceError: ``train.batch_size`` is no multiple of the number of processes.
    """
    size = config.train.batch_size
    if size % processes:
        raise DeviceError("batch_size", f"train.batch_size {size} cannot be shared equally by {processes} processes")
