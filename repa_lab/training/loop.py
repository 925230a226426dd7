"""Train one run, from its first step or from its last checkpoint, to its end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch.utils.data import DataLoader

from repa_lab.align import Alignment
from repa_lab.models.facts import family_facts, shape_of
from repa_lab.models.family import BUILDERS, Input
from repa_lab.runs import RunDirectory, RunWriter, State, checkpoints
from repa_lab.runs.files import Row
from repa_lab.runs.provenance import provenance
from repa_lab.spec import RunConfig, RunOptions
from repa_lab.spec.identity import Run
from repa_lab.tracking import Journal, Listener
from repa_lab.training.aligner import Aligner, choose_block, open_targets, tap_denoiser
from repa_lab.training.checkpoint import Progress, Trained
from repa_lab.training.device import MIXED_PRECISION, pick_device
from repa_lab.training.ema import EMA
from repa_lab.training.evaluate import DivergedError, Evaluator, write_grid
from repa_lab.training.images import open_images
from repa_lab.training.objective import Batch, Steps, denoising_loss, interpolate
from repa_lab.training.streams import seeded

ShouldStop = Callable[[], State | None]


def train(
    run: Run,
    directory: RunDirectory,
    options: RunOptions,
    cache: Path,
    listeners: Sequence[Listener] = (),
    should_stop: ShouldStop = lambda: None,
) -> State:
    """Train a run to its end and measure it on the way; what an earlier call left off is taken up at its last checkpoint.

    Args:
        run: what to train.
        directory: where it is recorded.
        options: device, precision, logging.
        cache: encoder features, latents and reference statistics, shared by all runs.
        listeners: hear the run's rows.
        should_stop: asked after every step; a state ends the run there, with a checkpoint.

    Returns:
        The state in which the run came to rest.

    Raises:
        RunBusyError: another process trains it.
        DivergedError: the loss became infinite or NaN.
    """
    with RunWriter(directory) as writer:
        if directory.state.state.is_finished:
            return directory.state.state
        writer.describe(run.to_json(), provenance())
        journal, progress = Journal(writer, listeners), Progress()
        try:
            trainer = Trainer(run, options, cache)
            progress = trainer.progress
            found = checkpoints.latest(directory.checkpoints)
            if found:
                trainer.resume(found[1])
                writer.event("resumed", step=progress.step)
            writer.rewind(progress.step)
            journal.state(State.RUNNING, progress.step)
            state = fit(trainer, directory, journal, should_stop)
        except Exception as error:
            journal.state(State.FAILED, progress.step, f"{type(error).__name__}: {error}".splitlines()[0])
            raise
        journal.state(state, progress.step)
        return state


def fit(trainer: Trainer, directory: RunDirectory, journal: Journal, should_stop: ShouldStop) -> State:
    """Run all steps that are left: step, log, measure, save.

    Rows are written before the checkpoint of their step. A kill in between repeats the work from the checkpoint before, whose
    later rows are dropped on resuming: nothing is lost and nothing appears twice.
    """
    progress, last = trainer.progress, trainer.config.train.steps
    measure_every = trainer.config.evaluate.every
    save_every = trainer.options.checkpoint_every or measure_every
    started = time.perf_counter()
    for batch in trainer.batches():
        outcome = trainer.step(batch)
        step = progress.step
        measure, stop = step % measure_every == 0 or step == last, should_stop()
        due = measure or step % save_every == 0 or step % trainer.options.log_every == 0
        if due or stop:
            row = outcome.row()  # waits for the device, so that the seconds are those of finished steps
            progress.seconds += time.perf_counter() - started
            if not torch.isfinite(outcome.total):
                raise DivergedError(f"the loss is {row['loss/total']} at step {step}")
            if due:  # not for the stop: a run's rows do not tell where it was interrupted
                journal.row({**progress.row(), **row})
            if measure:
                found, samples = trainer.measure()
                path = directory.samples / f"step-{step:08d}.png"
                write_grid(samples, path)
                journal.row({**progress.row(), **found})
                journal.image(step, path)
            if measure or stop or step % save_every == 0:
                checkpoints.commit(directory.checkpoints, step, trainer.save)
            started = time.perf_counter()
        if stop and step < last:
            return stop
    return State.DONE


@dataclass(frozen=True)
class StepOutcome:
    """What one optimizer step yielded; tensors stay on the device until a row asks for them."""

    total: torch.Tensor
    denoise: torch.Tensor
    alignment: Alignment | None
    grad_norm: torch.Tensor | None

    def row(self) -> Row:
        """As numbers."""
        row: Row = {"loss/total": self.total.item(), "loss/denoise": self.denoise.item()}
        if self.alignment is not None:
            row |= {"loss/aligned": self.alignment.loss.item(), "align/weight": self.alignment.weight}
            row |= {"align/cosine": self.alignment.cosine.item()}
            if self.alignment.manifold is not None:
                row["align/manifold"] = self.alignment.manifold.item()
        if self.grad_norm is not None:
            row["grad_norm"] = self.grad_norm.item()
        return row


class Trainer:
    """The parts of one run on this process's device, and one step of it.

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
        images = open_images(config.data, cache)
        source = images.source
        denoiser = build_denoiser(config, images.input, run.seed)
        own, measuring = config.regularizer, config.alignment_encoder
        targets = open_targets(own.encoder, source, cache, self.device) if own.type != "none" else None
        self.aligner = Aligner(run, denoiser, targets) if targets else None
        measured = targets
        if measuring and (targets is None or measuring != own.encoder):
            measured = open_targets(measuring, source, cache, self.device)
        self.evaluator = Evaluator(config.evaluate, images, run.seed, measured, cache, self.device)
        self._steps = Steps(config, run.seed, images.space, source.labels, source.num_classes, images.split.train)
        self._trained = self._prepare(denoiser)

    def batches(self) -> Iterator[Batch]:
        """The batches of the steps that are left."""
        left = range(self.progress.step, self.config.train.steps)
        pin, workers = self.device.type == "cuda", self.options.data_workers
        return iter(DataLoader(self._steps, batch_size=None, sampler=left, num_workers=workers, pin_memory=pin))

    def step(self, batch: Batch) -> StepOutcome:
        """One optimizer step on one batch."""
        x, noise, t, y = (part.to(self.device, non_blocking=True) for part in batch[1:])
        x_t, target = interpolate(x, noise, t)
        total = denoise = denoising_loss(self._denoiser(x_t, t, y), target)
        alignment = self.aligner(batch.ids, self.progress.step, self.device) if self.aligner else None
        if alignment is not None:
            total = denoise + alignment.loss
        self.accelerator.backward(total)
        limit = self.config.train.grad_clip
        grad_norm = self.accelerator.clip_grad_norm_(self._parameters, limit) if limit else None
        self._trained.optimizer.step()
        self._trained.optimizer.zero_grad(set_to_none=True)
        self._trained.ema.update()
        self.progress.step += 1
        self.progress.images += len(t)
        return StepOutcome(total.detach(), denoise.detach(), alignment, grad_norm)

    def measure(self) -> tuple[Row, torch.Tensor]:
        """Measurements of the averaged weights, and the first samples ``(n, C, H, W)`` as uint8 pixels."""
        denoiser, config = self._trained.denoiser, self.config
        own = self.aligner.regularizer if self.aligner else None
        own_block = choose_block(config, config.regularizer.block_index if own else None)
        block = choose_block(config, config.evaluate.block_index, own_block)
        # The training projector speaks only about the tap and the encoder that it was trained on.
        same = config.alignment_encoder == config.regularizer.encoder and block == own_block
        denoiser.eval()
        with self._trained.ema.applied():
            row, samples = self.evaluator.quality(denoiser)
            tap = tap_denoiser(config, denoiser, block)
            row |= self.evaluator.alignment(denoiser, tap, own if same else None)
            tap.remove()
        denoiser.train()
        if self.aligner:
            self.aligner.tap.clear()
        return row, samples

    def save(self, folder: Path) -> None:
        """Write all that is needed to go on into an empty folder."""
        self._trained.save(folder, self.progress)

    def resume(self, folder: Path) -> None:
        """Take up what :meth:`save` wrote."""
        self._trained.load(folder, self.progress)

    def _prepare(self, denoiser: nn.Module) -> Trained:
        train, accelerator = self.config.train, self.accelerator
        modules: dict[str, nn.Module] = {"denoiser": denoiser.to(self.device)}
        if self.aligner:
            modules["regularizer"] = self.aligner.regularizer
            self.aligner.prepare(accelerator)
        self._parameters = [p for module in modules.values() for p in module.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(self._parameters, lr=train.lr, weight_decay=train.weight_decay)
        self._denoiser, optimizer = accelerator.prepare(denoiser, optimizer)
        ema = EMA(modules, train.ema)
        return Trained(denoiser, modules.get("regularizer"), optimizer, ema, accelerator.scaler)


def build_denoiser(config: RunConfig, given: Input, seed: int) -> nn.Module:
    """A freshly initialised denoiser; the same for every arm with this model and seed, whatever its regularizer."""
    name, size = config.model.family, config.model.size
    shape = shape_of(family_facts(name), size)
    with seeded(seed, "init"):
        return BUILDERS[name].build(size or "", shape, given)
