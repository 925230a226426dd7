"""The regularizer of a run with its taps and encoders: collects the signals of a step and returns the loss."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from repa_lab.align import Loss, Needs, Prediction, Schedule, Shapes, Signals, Tokens
from repa_lab.align.settings import REGULARIZERS, EncoderSettings
from repa_lab.encoders.encoder import EncoderOptions, load_encoder
from repa_lab.encoders.targets import OnlineTargets, Reader, Targets, cached_targets
from repa_lab.models.tap import Tap
from repa_lab.registry import PluginError
from repa_lab.spec import ResolvedOptions
from repa_lab.spec.identity import Run
from repa_lab.training.batches import Batch, seeded
from repa_lab.training.data import Announce, Images, pixels_for
from repa_lab.training.resolve import resolved_regularizer

_CPU = torch.device("cpu")


class PrefetchWeight:
    """The regularizer's weight as data loaders know it: the schedule's weight, or 0 while a similarity cutoff holds.

    Loaders read ahead only for steps with a weight above 0. If they guess wrong, for instance when a recoverable cutoff
    is probed, the targets are read within the step. The flag is in shared memory, where loader processes see it.
    """

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self._is_cut = torch.zeros((), dtype=torch.bool).share_memory_()

    def __call__(self, step: int) -> float:
        """Return the expected weight at a step."""
        return 0.0 if self._is_cut else self._schedule(step)

    def note(self, is_cut: bool) -> None:
        """Record whether the cutoff holds now."""
        self._is_cut.fill_(is_cut)


class Stopwatch:
    """Sums the seconds of code blocks: wall-clock time on a CPU, time between CUDA events on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._intervals: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._seconds = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Time a with-statement. Never synchronises: adds only the intervals whose CUDA events have completed."""
        if not self._is_cuda:
            began = time.perf_counter()
            try:
                yield
            finally:
                self._seconds += time.perf_counter() - began
            return
        while self._intervals and self._intervals[0][1].query():
            self._add_first()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        try:
            yield
        finally:
            end.record()
            self._intervals.append((begin, end))

    def timed(self, read: Reader) -> Reader:
        """Return a reader whose calls are timed."""

        def timed(index: torch.Tensor) -> torch.Tensor:
            with self.running():
                return read(index)

        return timed

    def take(self) -> float:
        """Return the seconds since the last call, after waiting for the device to complete the last interval."""
        while self._intervals:
            self._intervals[0][1].synchronize()
            self._add_first()
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _add_first(self) -> None:
        begin, end = self._intervals.popleft()
        self._seconds += begin.elapsed_time(end) / 1000


class Aligner:
    """The regularizer of a run with the taps and targets that it needs.

    Args:
        run: a run whose regularizer is not ``none``.
        needs: the signals that the regularizer needs.
        taps: hooks on the denoiser's blocks, set before the denoiser is wrapped or compiled.
        ema_taps: hooks on the blocks that are also read from the averaged model.
        shapes: widths of taps and encoders.
        targets: encoder tokens of the run's images, one for each encoder.
        prefetch: is told when a similarity cutoff begins or ends.
        stopwatch: times the encoders.

    Attributes:
        regularizer: the module.
        wrapped: the module as accelerate wraps it.
    """

    def __init__(
        self,
        run: Run,
        needs: Needs,
        taps: Sequence[Tap],
        ema_taps: Sequence[Tap],
        shapes: Shapes,
        targets: Sequence[Targets],
        prefetch: PrefetchWeight | None = None,
        stopwatch: Stopwatch | None = None,
    ) -> None:
        self.needs, self.taps, self.ema_taps, self.targets = needs, taps, ema_taps, targets
        self._prefetch, self._stopwatch = prefetch, stopwatch or Stopwatch(_CPU)
        settings = resolved_regularizer(run.config)
        with seeded(run.seed, "init/projector"):
            self.regularizer = REGULARIZERS[settings.type].load()(settings, shapes)
        self.wrapped: nn.Module = self.regularizer

    def prepare(self, accelerator: Accelerator) -> None:
        """Let accelerate wrap the regularizer.

        It is wrapped apart from the denoiser, so that DistributedDataParallel does not wait for its gradients in steps
        of weight 0.
        """
        self.wrapped = accelerator.prepare(self.regularizer.to(accelerator.device))

    def retract(self, step: int) -> None:
        """Forget a failed attempt at ``step``, which will be repeated."""
        self.clear()
        if self.regularizer.cutoff is not None:
            self.regularizer.cutoff.retract(step)

    def clear(self) -> None:
        """Empty the taps."""
        for tap in (*self.taps, *self.ema_taps):
            tap.clear()

    def is_active(self, step: int) -> bool:
        """Return whether the regularizer has to be called at ``step``."""
        if self._prefetch and self.regularizer.cutoff is not None:
            self._prefetch.note(self.regularizer.cutoff.is_cut(step))
        return self.regularizer.is_active(step)

    def __call__(
        self, batch: Batch, step: int, device: torch.device, prediction: Prediction, ema_tokens: Sequence[Tokens] = ()
    ) -> Loss:
        """Return the unweighted loss of a batch, without gradient if the weight is 0 and a cutoff is probed.

        Args:
            batch: on the device.
            step: optimizer steps already taken.
            device: where encoder tokens are needed.
            prediction: the denoiser's output and its target.
            ema_tokens: tokens of the averaged model, one for each of its taps.
        """
        for tap in self.ema_taps:
            tap.clear()  # the trained model's pass went through these hooks too
        loaded = batch.loaded or (None,) * len(self.targets)
        with self._stopwatch.running():
            pairs = zip(self.targets, loaded, strict=True)
            encoders = tuple(targets(batch.ids, device, values) for targets, values in pairs)
        signals = Signals(
            taps=tuple(tap.take() for tap in self.taps),
            encoders=encoders,
            ema_taps=tuple(ema_tokens),
            latents=batch.x if self.needs.latents else None,
            prediction=prediction if self.needs.prediction else None,
        )
        is_weighted = self.regularizer.weight_at(step) > 0
        with torch.set_grad_enabled(is_weighted):
            loss: Any = (self.wrapped if is_weighted else self.regularizer)(signals, step)
        if not isinstance(loss, Loss) or loss.value.ndim:
            name = self.regularizer.settings.type
            origin = REGULARIZERS.origin(name)
            message = f"forward of the regularizer '{name}' must return a Loss with a scalar value"
            message += f", got {type(loss).__name__}"
            raise PluginError(origin.file, origin.line, message) if origin else TypeError(message)
        self.regularizer.observe(step, loss)
        return loss


def open_targets(
    encoder: EncoderSettings,
    images: Images,
    options: ResolvedOptions,
    cache: Path,
    device: torch.device,
    announce: Announce | None = None,
) -> Targets:
    """Return the encoder's tokens of the run's images, from the cache unless the settings say otherwise.

    Raises:
        EncoderError: the encoder cannot be loaded or does not return patch tokens.
        DataError: the pixels that the encoder should see are not available.
    """
    source = pixels_for(encoder, images, device)
    precision = EncoderOptions(options.encoder_precision, options.encoder_compile, options.encoder_batch_size)
    if not encoder.cache:
        loaded = load_encoder(encoder.name, encoder.image_size, source.side, encoder.weights, precision)
        return OnlineTargets(loaded, encoder.name, source, device)
    return cached_targets(
        source,
        encoder.name,
        encoder.image_size,
        encoder.weights,
        encoder.standardize,
        cache,
        device,
        announce(f"features of {encoder.name}") if announce else None,
        storage=options.encoder_storage,
        options=precision,
    )
