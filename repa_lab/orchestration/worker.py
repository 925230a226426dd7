"""A worker: a process that fills the caches of a sweep, and trains one run after another.

A worker reads from standard input and writes messages to standard output, pickled as `multiprocessing` does it. First
come the worker's own environment variables and its folder, then jobs and requests to stop. When the input ends, because
the scheduler is gone for whatever reason, the run in hand is checkpointed and the process ends. Workers that share a
run have torchrun's environment variables, and each is given the job.
"""

from __future__ import annotations

import gc
import math
import os
import queue
import threading
import time
import traceback
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from repa_lab.align.settings import EncoderSettings
from repa_lab.data import DataError
from repa_lab.errors import InputError
from repa_lab.metrics.reference import StatisticsError
from repa_lab.models.families import FAMILIES
from repa_lab.models.pretrained import skeleton
from repa_lab.models.released import SCHEDULER, PretrainedError, read_json
from repa_lab.models.tap import TapError
from repa_lab.orchestration.scheduler import (
    HEARTBEAT,
    Job,
    MessageKind,
    PackedJob,
    PrepareJob,
    TrainJob,
    WorkerMessage,
)
from repa_lab.registry import PluginError, one_line
from repa_lab.runs import RunWriter, State
from repa_lab.runs.directory import RunBusyError
from repa_lab.runs.root import ComparisonRecord, TrackingRecord
from repa_lab.settings import BlockIndex
from repa_lab.spec import ResolvedOptions, RunConfig, RunOptions
from repa_lab.timm_models import EncoderError
from repa_lab.tracking import Listener
from repa_lab.tracking.server import resolve_mode
from repa_lab.tracking.tensorboard import TensorBoardListener
from repa_lab.tracking.wandb import WandbListener, WandbRun
from repa_lab.training.aligner import open_targets
from repa_lab.training.batches import Announce, Images, open_data, pretrained_folder
from repa_lab.training.device import DeviceError, pick_device, resolved
from repa_lab.training.diffusion import process_of
from repa_lab.training.evaluate import DivergedError, metrics_with, open_extractor, open_reference, real_images
from repa_lab.training.loop import ShouldStop, train
from repa_lab.training.model import encode_captions
from repa_lab.training.resolve import attended_blocks, encoders_of, metric_name, needs_of
from repa_lab.training.trainer import Trainer

_GRACE_S = 60.0
_GRACE_IDLE_S = 2.0
_BEAT_S = 1.0


# ---- the caches that all runs of a sweep share


class RefusedError(InputError):
    """Something that a run needs cannot be had.

    Attributes:
        config: the index of the first settings at fault.
        path: the dotted path of the setting at fault.
    """

    def __init__(self, config: int, path: str, message: str) -> None:
        self.config, self.path = config, path
        super().__init__(message)


def prepare(configs: Iterable[RunConfig], options: RunOptions, cache: Path, announce: Announce) -> None:
    """Fill the caches for these settings: latents, encoder features, reference statistics; each need once.

    This is also the preflight before any run starts: an encoder that gives no patch tokens, or data that cannot be
    read, is refused here.

    Args:
        configs: the settings of the runs.
        options: the device and the precision to compute with.
        announce: called with a name; returns what to call with the number of images done, and in all.

    Raises:
        RefusedError: naming the setting at fault.
    """
    with _refusing(0):
        preparation = _Preparation(resolved(options), cache, pick_device(options), announce)
    for index, config in enumerate(configs):
        with _refusing(index):
            preparation.meet(config, index)


@contextmanager
def _refusing(config: int, component: str = "") -> Iterator[None]:
    """Name the setting at fault, which may be one of the encoder or extractor at the path ``component``."""
    try:
        yield
    except StatisticsError as error:
        raise RefusedError(config, f"{component}.reference", str(error)) from error
    except TapError as error:
        raise RefusedError(config, "regularizer.block_index", str(error)) from error
    except PretrainedError as error:
        raise RefusedError(config, "model.pretrained", str(error)) from error
    except (DataError, DeviceError, EncoderError) as error:
        section = "run" if isinstance(error, DeviceError) else "data"
        if component and (isinstance(error, EncoderError) or error.field in EncoderSettings.model_fields):
            section = component
        elif component and error.field in RunOptions.model_fields:
            section = "run"
        raise RefusedError(config, f"{section}.{error.field}", str(error)) from error


@dataclass
class _Preparation:
    """Meets the needs of settings, each need once; a need is keyed by all settings that it depends on."""

    options: ResolvedOptions
    cache: Path
    device: torch.device
    announce: Announce
    _images: dict[Hashable, Images] = field(default_factory=dict)
    _met: set[Hashable] = field(default_factory=set)

    def meet(self, config: RunConfig, index: int) -> None:
        """Meet all needs of a run with these settings; ``index`` is the settings' own in a refusal."""
        sources = (config.data, config.model)
        if sources not in self._images:
            self._images[sources] = open_data(config, self.cache, self.device, self.announce)
        images = self._images[sources]
        blocks = (*(block for needs in needs_of(config) for block in needs.blocks), config.evaluate.block_index)
        if config.model.pretrained and self._is_new(sources, blocks, config.evaluate.prompts):
            self._meet_pretrained(config, images, blocks)
        for path, encoder in encoders_of(config):
            attention = attended_blocks(config, encoder)
            if self._is_new(sources, encoder, attention):
                with _refusing(index, path):
                    open_targets(encoder, images, self.options, self.cache, self.device, self.announce, attention)
        for path, extractor in config.extractor_paths:
            if self._is_new(sources, extractor, metrics_with(config, extractor)):
                with _refusing(index, path):
                    network = open_extractor(config, extractor, self.device)
                    open_reference(extractor, network, real_images(images), self.cache)

    def _is_new(self, *need: Hashable) -> bool:
        is_new = need not in self._met
        self._met.add(need)
        return is_new

    def _meet_pretrained(self, config: RunConfig, images: Images, blocks: Iterable[BlockIndex | None]) -> None:
        """Encode captions, and look for the blocks in this folder's denoiser: sizes of a family differ in depth."""
        family, folder = FAMILIES[config.model.family], pretrained_folder(config.model)
        process_of(read_json(folder / SCHEDULER / "scheduler_config.json") or {})
        denoiser = skeleton(folder, family)
        if self.options.gradient_checkpointing and (message := denoiser.uncheckpointed):
            raise DeviceError("gradient_checkpointing", f"{family.name} cannot be checkpointed: {message}")
        for block in blocks:
            if block is not None:
                denoiser.tap(block).remove()
        progress = self.announce(f"captions for {family.name}")
        prompts = config.evaluate.prompts
        encode_captions(config.model, images, prompts, self.options, self.cache, self.device, progress)


# ---- one run


def open_trackers(job: TrainJob) -> list[Listener]:
    """Return the trackers that a run's options ask for; a tracker that fails later is dropped.

    Without a connection to W&B there is nothing to do: the run directory has all that W&B is told later.
    """
    listeners: list[Listener] = []
    if resolve_mode(job.options.wandb.mode) == "online":
        from repa_lab.report.statistics import headline  # imports SciPy

        sweep, measured = job.root.sweep(job.sweep), ComparisonRecord(metric=metric_name(job.task.run.config))
        compare = sweep.manifest.compare if sweep.is_recorded else measured
        record = TrackingRecord(**dict(job.options.wandb))
        described = WandbRun(record, job.task.name, job.sweep, partial(headline, compare))
        listeners.append(WandbListener(job.directory, described))
    if job.options.tensorboard:
        listeners.append(TensorBoardListener(job.directory, job.task.run.to_json()))
    return listeners


def train_run(job: TrainJob, should_stop: ShouldStop) -> State:
    """Train a run to its end, or until it should stop.

    If a step's memory runs out, training goes on from the last checkpoint with micro-batches half as large. The batch
    and its randomness stay the same, and the results but for rounding. A measurement that does not fit ends the run,
    for a smaller micro-batch would not help; so does memory that runs out on one of several processes.

    Raises:
        OutOfMemoryError: not even one image fits.
        RunBusyError: another process trains the run.
        Exception: whatever else ends the run.
    """
    task, options, kept = job.task, job.options, frozenset(job.task.kept_steps)
    while True:
        try:
            trackers = open_trackers(job)
            return train(
                task.run, job.directory, options, job.root.cache, trackers, should_stop, task.fork, kept, task.is_enough
            )
        except torch.OutOfMemoryError as error:
            batch = task.run.config.train.batch_size
            # The trainer has halved an automatic micro-batch as often as it could.
            size = 0 if options.micro_batch == "auto" else min(options.micro_batch or batch, batch) // 2
            is_of_step = any(
                frame.f_code is Trainer.step.__code__ for frame, _ in traceback.walk_tb(error.__traceback__)
            )
            if not size or not is_of_step or os.environ.get("WORLD_SIZE", "1") != "1":
                raise
            reason = one_line(error)
        gc.collect()
        torch.cuda.empty_cache()  # does nothing where there is no GPU
        with RunWriter(job.directory) as writer:
            writer.event("out-of-memory", error=reason, micro_batch=options.micro_batch, retried_with=size)
        options = options.model_copy(update={"micro_batch": size})


def do(
    job: Job, should_stop: ShouldStop, send: Callable[[WorkerMessage], None] = lambda message: None
) -> WorkerMessage:
    """Do a job; return its last message.

    Args:
        should_stop: asked by a run after every step.
        send: called with messages about progress.
    """

    def announce(activity: str) -> Callable[[int, int], None]:
        message = WorkerMessage(MessageKind.PROGRESS, job.name, activity=activity)
        return lambda done, total: send(replace(message, done=done, total=total))

    try:
        if isinstance(job, PrepareJob):
            prepare(job.configs, job.options, job.root.cache, announce)
            return WorkerMessage(MessageKind.PREPARED, job.name)
        if job.options.hang_minutes:
            should_stop = _with_heartbeat(job.directory.path / HEARTBEAT, should_stop)
        if job.is_rehearsal:  # interrupted after its first step, so that the run is resumed from a checkpoint
            train_run(job, lambda: should_stop() or State.INTERRUPTED)
        return WorkerMessage(MessageKind.FINISHED, job.name, state=train_run(job, should_stop))
    except RefusedError as error:
        return WorkerMessage(MessageKind.REFUSED, job.name, str(error), config=error.config, path=error.path)
    except RunBusyError:
        return WorkerMessage(MessageKind.BUSY, job.name)
    except Exception as error:
        traceback.print_exc()
        return WorkerMessage(MessageKind.FAILED, job.name, one_line(error), isinstance(error, DivergedError))


def _with_heartbeat(file: Path, should_stop: ShouldStop) -> ShouldStop:
    """Touch a file of the run, which schedulers on other machines see, whenever ``should_stop`` is asked."""
    beat_at = -math.inf

    def beat() -> State | None:
        nonlocal beat_at
        if time.monotonic() - beat_at > _BEAT_S:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
            beat_at = time.monotonic()
        return should_stop()

    return beat


# ---- the process


class Worker:
    """Serves jobs until its input ends."""

    def __init__(self, jobs: Connection, messages: Connection) -> None:
        self._input, self._messages = jobs, messages
        self._jobs: queue.Queue[PackedJob | None] = queue.Queue()
        self._stop: State | None = None
        self._is_training = False

    def serve(self) -> None:
        """Do every job in turn."""
        threading.Thread(target=self._read, daemon=True).start()
        while (packed := self._jobs.get()) is not None:
            try:
                job = packed.unpacked()
                self._is_training = isinstance(job, TrainJob)
                message = do(job, lambda: self._stop, self._messages.send)
            except PluginError as error:
                message = WorkerMessage(MessageKind.FAILED, packed.name, str(error))
            self._messages.send(message)
            self._is_training = False

    def _read(self) -> None:
        with suppress(EOFError, OSError):  # the latter if the scheduler was killed while it wrote
            while True:
                message = self._input.recv()
                if isinstance(message, State):
                    self._stop = message
                else:
                    self._stop = None  # here, in the order of the input: the job may be taken up later
                    self._jobs.put(message)
        self._stop = State.INTERRUPTED
        self._jobs.put(None)
        # Training ends with a checkpoint; caches are filled file by file, and filled files are found again.
        threading.Timer(_GRACE_S if self._is_training else _GRACE_IDLE_S, os._exit, [75]).start()
