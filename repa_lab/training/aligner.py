"""The regularizers of a run with their taps and encoders: collects the signals of a step and returns the losses."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import nn

from repa_lab.align import Loss, Needs, Prediction, Regularizer, Schedule, Shapes, Signals, Tokens
from repa_lab.align.settings import REGULARIZERS, EncoderSettings, RegularizerSettings
from repa_lab.encoders.encoder import EncoderOptions, load_encoder
from repa_lab.encoders.targets import OnlineTargets, Reader, Targets, cached_targets
from repa_lab.models.family import BlockIndex
from repa_lab.models.tap import AttentionTap, Tap
from repa_lab.registry import PluginError
from repa_lab.spec import ResolvedOptions
from repa_lab.training.batches import Batch, seeded
from repa_lab.training.data import Announce, Images, pixels_for
from repa_lab.training.teachers import TeacherPass, TeacherTokens, ema_pass

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


@dataclass
class Term:
    """One regularizer of a run: a term of the loss.

    Attributes:
        regularizer: the module.
        needs: the signals that it needs, with every block named.
        prefetch: is told when a similarity cutoff begins or ends; None without encoders.
        wrapped: the module as accelerate wraps it.
    """

    regularizer: Regularizer
    needs: Needs
    prefetch: PrefetchWeight | None = None
    wrapped: nn.Module = field(init=False)

    def __post_init__(self) -> None:
        self.wrapped = self.regularizer

    def is_active(self, step: int) -> bool:
        """Return whether the regularizer has to be called at ``step``."""
        if self.prefetch and self.regularizer.cutoff is not None:
            self.prefetch.note(self.regularizer.cutoff.is_cut(step))
        return self.regularizer.is_active(step)

    def __call__(self, signals: Signals, step: int) -> Loss:
        """Return the unweighted loss, without gradient if the weight is 0 and a cutoff is probed."""
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


def build_regularizer(settings: RegularizerSettings, shapes: Shapes, seed: int) -> Regularizer:
    """Return a regularizer with its first weights, which are the same whatever regularizers stand beside it.

    Args:
        settings: its settings, resolved.
        shapes: the widths of the signals that it needs.
    """
    with seeded(seed, "init/projector"):
        return REGULARIZERS[settings.type].load()(settings, shapes)


class Aligned(NamedTuple):
    """The losses of all active regularizers.

    Attributes:
        value: the sum of the weighted losses, a scalar.
        is_weighted: whether any weight is above 0.
        values: scalars to log, by name in the metric row.
    """

    value: torch.Tensor
    is_weighted: bool
    values: dict[str, torch.Tensor]


class Aligner:
    """The regularizers of a run with the taps and targets that they need, each of which is captured or loaded once.

    Args:
        terms: the regularizers, at least one.
        taps: hooks on the denoiser's blocks, set before the denoiser is wrapped or compiled.
        targets: encoder tokens of the run's images, by encoder.
        attention: hooks on the attention of blocks.
    """

    def __init__(
        self,
        terms: Sequence[Term],
        taps: Mapping[BlockIndex | None, Tap],
        targets: Mapping[EncoderSettings, Targets],
        attention: Mapping[BlockIndex | None, AttentionTap] | None = None,
        stopwatch: Stopwatch | None = None,
    ) -> None:
        self.terms, self.taps, self.attention, self.targets = terms, taps, attention or {}, targets
        self._stopwatch = stopwatch or Stopwatch(_CPU)

    @property
    def module(self) -> nn.Module:
        """The regularizer, or all of them as one module."""
        modules = [term.regularizer for term in self.terms]
        return modules[0] if len(modules) == 1 else nn.ModuleList(modules)

    def prepare(self, accelerator: Accelerator) -> None:
        """Let accelerate wrap the regularizers.

        Each is wrapped apart from the denoiser and from the others, so that DistributedDataParallel does not wait for
        its gradients in steps of weight 0.
        """
        for term in self.terms:
            module = term.regularizer.to(accelerator.device)
            trains = any(parameter.requires_grad for parameter in module.parameters())
            term.wrapped = accelerator.prepare(module) if trains else module  # nothing to exchange without parameters

    def retract(self, step: int) -> None:
        """Forget a failed attempt at ``step``, which will be repeated."""
        self.clear()
        for term in self.terms:
            if term.regularizer.cutoff is not None:
                term.regularizer.cutoff.retract(step)

    def clear(self) -> None:
        """Empty the taps."""
        for tap in self.taps.values():
            tap.clear()
        for attention in self.attention.values():
            attention.clear()

    def active(self, step: int) -> list[Term]:
        """Return the regularizers that have to be called at ``step``."""
        return [term for term in self.terms if term.is_active(step)]

    def weights(self, step: int) -> dict[str, float]:
        """Return the weights at ``step``, by name in the metric row."""
        return {f"{self._prefix(term)}/weight": term.regularizer.weight_at(step) for term in self.terms}

    def __call__(
        self,
        terms: Sequence[Term],
        batch: Batch,
        step: int,
        device: torch.device,
        prediction: Prediction,
        times: torch.Tensor | None = None,
        teachers: TeacherTokens | None = None,
    ) -> Aligned:
        """Return the losses of a batch.

        Args:
            batch: on the device.
            step: optimizer steps already taken.
            teachers: tokens of the averaged and of frozen models.
        """
        tokens = {block: self.taps[block].take() for block in {b for one in terms for b in one.needs.taps}}
        attention = {block: self.attention[block].take() for block in {b for one in terms for b in one.needs.attention}}
        self.clear()  # of what this step's regularizers do not need
        encoders = self._encoder_tokens(terms, batch, device)
        aligned, values, is_weighted = list[torch.Tensor](), dict[str, torch.Tensor](), False
        for term in terms:
            needs, captured = term.needs, teachers or {}
            signals = Signals(
                taps=tuple(tokens[block] for block in needs.taps),
                encoders=tuple(encoders[encoder] for encoder in needs.encoders),
                ema_taps=tuple(captured[ema_pass(needs), block] for block in needs.ema_taps),
                latents=batch.x if needs.latents else None,
                prediction=prediction if needs.prediction else None,
                attention=tuple(attention[block] for block in needs.attention),
                encoder_attention=tuple(
                    tuple(self.targets[encoder].attention(block) for block in needs.encoder_attention)
                    for encoder in needs.encoders
                ),
                frozen_taps=tuple(captured[TeacherPass(needs.frozen), block] for block in needs.frozen_taps),
                times=times,
            )
            loss, weight, prefix = term(signals, step), term.regularizer.weight_at(step), self._prefix(term)
            aligned.append(weight * loss.value)
            is_weighted |= weight > 0
            values |= {f"{prefix}/{name}": value for name, value in loss.parts.items()}
            if len(self.terms) > 1:
                values[f"{prefix}/loss"] = loss.value
        total = aligned[0] if len(aligned) == 1 else torch.stack(aligned).sum()
        return Aligned(total, is_weighted, {"loss/aligned": total, **values})

    def _encoder_tokens(
        self, terms: Sequence[Term], batch: Batch, device: torch.device
    ) -> dict[EncoderSettings, Tokens]:
        loaded = batch.loaded or (None,) * len(self.targets)
        wanted = {encoder for term in terms for encoder in term.needs.encoders}
        with self._stopwatch.running():
            return {
                encoder: targets(batch.ids, device, values)
                for (encoder, targets), values in zip(self.targets.items(), loaded, strict=True)
                if encoder in wanted
            }

    def _prefix(self, term: Term) -> str:
        """Return what the names of a regularizer's values begin with."""
        return "align" if len(self.terms) == 1 else f"align/{term.regularizer.settings.label}"


def open_targets(
    encoder: EncoderSettings,
    images: Images,
    options: ResolvedOptions,
    cache: Path,
    device: torch.device,
    announce: Announce | None = None,
    attention: tuple[int, ...] = (),
) -> Targets:
    """Return the encoder's tokens of the run's images, from the cache unless the settings say otherwise.

    Args:
        options: precision, compilation and storage.
        announce: tells people what is computed for the cache.
        attention: blocks whose queries and keys are kept; an encoder with a cache has none.

    Raises:
        EncoderError: the encoder cannot be loaded or does not return patch tokens.
        DataError: the pixels that the encoder should see are not available.
    """
    source = pixels_for(encoder, images, device)
    precision = EncoderOptions(
        options.encoder_precision, options.encoder_compile, options.encoder_batch_size, attention
    )
    if not encoder.cache:
        loaded = load_encoder(encoder.name, encoder.image_size, source.side, encoder.weights, precision)
        return OnlineTargets(loaded, encoder.name, source, device)
    progress = announce(f"features of {encoder.name}") if announce else None
    return cached_targets(source, encoder, cache, device, progress, options.encoder_storage, precision)
