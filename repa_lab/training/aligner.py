"""The alignment of a run: its tap, its targets and its regularizer, asked together once a step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from repa_lab.align import Loss, Needs, Prediction, Schedule, Shapes, Signals, Tokens
from repa_lab.align.settings import REGULARIZERS, EncoderSettings
from repa_lab.encoders.encoder import EncoderOptions, load_encoder
from repa_lab.encoders.targets import OnlineTargets, Targets, cached_targets
from repa_lab.models.tap import Tap
from repa_lab.registry import PluginError
from repa_lab.spec import RunOptions
from repa_lab.spec.identity import Run
from repa_lab.training.batches import Batch
from repa_lab.training.images import Announce, Images, pixels_for
from repa_lab.training.needs import resolved_regularizer
from repa_lab.training.streams import seeded

_STORAGE = {"fp16": torch.float16, "fp32": torch.float32}


class PrefetchWeight:
    """The weight of steps to come, as far as a data loader can know it: the schedule's, or 0 while a similarity cutoff
    holds.

    It is there to spare reading what nobody asks for. Where it is wrong, as at a look whether the cutoff still holds,
    the targets read for themselves. The loader's processes see what is noted here, for it lies in shared memory.
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
    """A run's regularizer, and what it asked for at a step.

    Args:
        run: a run whose regularizer is not ``none``.
        needs: what the regularizer asks for.
        taps: hooks on the blocks that it asks for, set before the denoiser is wrapped or compiled.
        ema_taps: hooks on the blocks that it asks for of the averaged model.
        shapes: the widths of all of these.
        targets: tokens of the run's images by each of the encoders that it asks for.
        prefetch: is told when a similarity cutoff sets in or ends.
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
    ) -> None:
        self.needs, self.taps, self.ema_taps, self.targets = needs, taps, ema_taps, targets
        self._prefetch = prefetch
        settings = resolved_regularizer(run.config)
        with seeded(run.seed, "init/projector"):
            self.regularizer = REGULARIZERS[settings.type].load()(settings, shapes)
        self.wrapped: nn.Module = self.regularizer

    def prepare(self, accelerator: Accelerator) -> None:
        """Let accelerate wrap the regularizer as it wraps the denoiser.

        The regularizer is wrapped by itself: DistributedDataParallel then waits for none of its gradients on steps of
        weight 0, at which it does not run.
        """
        self.wrapped = accelerator.prepare(self.regularizer.to(accelerator.device))

    def retract(self, step: int) -> None:
        """Forget what was seen of ``step``, which is taken again."""
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
        self, batch: Batch, step: int, device: torch.device, prediction: Prediction, averages: Sequence[Tokens] = ()
    ) -> Loss:
        """Return the unweighted loss of a batch; without gradient where the weight is 0 and a cutoff only looks.

        Args:
            batch: on the device.
            step: optimizer steps already taken.
            device: where encoder tokens are wanted.
            prediction: the denoiser's output and its target.
            averages: tokens of the averaged model, one for each of its taps.
        """
        for tap in self.ema_taps:
            tap.clear()  # of the trained model's pass, which went through the hooks of both
        loaded = batch.loaded or (None,) * len(self.targets)
        signals = Signals(
            taps=tuple(tap.take() for tap in self.taps),
            encoders=tuple(targets(batch.ids, device, one) for targets, one in zip(self.targets, loaded, strict=True)),
            ema_taps=tuple(averages),
            latents=batch.x if self.needs.latents else None,
            prediction=prediction if self.needs.prediction else None,
        )
        is_weighted = self.regularizer.weight_at(step) > 0
        with torch.set_grad_enabled(is_weighted):
            loss = (self.wrapped if is_weighted else self.regularizer)(signals, step)
        self._require_loss(loss)
        self.regularizer.observe(step, loss)
        return loss  # type: ignore[no-any-return]

    def _require_loss(self, loss: Any) -> None:
        if isinstance(loss, Loss) and loss.value.ndim == 0:
            return
        name = self.regularizer.settings.type
        origin = REGULARIZERS.origin(name)
        message = (
            f"forward of the regularizer '{name}' must return a Loss with a scalar value, got {type(loss).__name__}"
        )
        raise PluginError(origin.file, origin.line, message) if origin else TypeError(message)


def open_targets(
    encoder: EncoderSettings,
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
