"""The regularizers of a run: the signals of a step, from taps, encoders and teachers, go in; the losses come out.

Teachers are the run's own model: forward passes of its averaged or of frozen weights, without gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn

from repa_lab.align import Loss, Needs, Prediction, Regularizer, Schedule, Shapes, Signals, Tokens
from repa_lab.align.needs import FrozenModel
from repa_lab.align.regularizer import EncoderTarget, Pair
from repa_lab.align.settings import REGULARIZERS, EncoderSettings, RegularizerSettings
from repa_lab.encoders.encoder import EncoderOptions, load_encoder
from repa_lab.encoders.targets import OnlineTargets, Targets, cached_targets
from repa_lab.models.family import BlockIndex
from repa_lab.models.released import PretrainedError
from repa_lab.models.tap import AttentionTap, Denoiser, Tap
from repa_lab.registry import PluginError
from repa_lab.spec import ResolvedOptions
from repa_lab.spec.identity import Run
from repa_lab.training.batches import Announce, Batch, Draw, Images, pixels_for, seeded
from repa_lab.training.checkpoint import EMA, PREFIX, trainable
from repa_lab.training.device import Stopwatch, computing_in
from repa_lab.training.diffusion import over_pixels
from repa_lab.training.model import Model
from repa_lab.training.resolve import attended_blocks, needs_of, resolved_regularizers

_LESS_NOISE, _SECOND_TIME, _TOKEN_MASK = "less_noise", "second_time", "token_mask"


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


@dataclass
class Term:
    """One regularizer of a run, a term of the loss; ``prefix`` begins the names of its values in the metric row."""

    regularizer: Regularizer
    needs: Needs
    prefix: str
    prefetch: PrefetchWeight = field(init=False)
    wrapped: nn.Module = field(init=False)  # by accelerate

    def __post_init__(self) -> None:
        self.wrapped, self.prefetch = self.regularizer, PrefetchWeight(self.regularizer.schedule)

    def is_active(self, step: int) -> bool:
        """Return whether the regularizer has to be called at ``step``."""
        if self.regularizer.cutoff is not None:
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
    """Return a regularizer of resolved settings with its first weights, the same whatever stands beside it."""
    with seeded(seed, "init/projector"):
        return REGULARIZERS[settings.type].load()(settings, shapes)


class TeacherPass(NamedTuple):
    """A forward pass without gradient.

    Attributes:
        frozen: the frozen model that runs; None is the averaged model.
        less_noise: the time is below the denoiser's by up to this much.
        is_cleaner: whether the time is the lower of the two times of an image's tokens.
    """

    frozen: FrozenModel | None = None
    less_noise: float = 0.0
    is_cleaner: bool = False

    @classmethod
    def averaged(cls, needs: Needs) -> TeacherPass:
        """Return the averaged model's pass that a regularizer needs."""
        return cls(None, needs.less_noise, needs.token_times > 0)

    def times(self, batch: Batch) -> torch.Tensor:
        """Return the averaged model's times ``(B,)``."""
        if self.is_cleaner:
            return torch.minimum(batch.t, batch.draws[_SECOND_TIME])
        if self.less_noise:
            return (batch.t - self.less_noise * batch.draws[_LESS_NOISE]).clamp_min(0)
        return batch.t


# What passes captured, by pass and block.
TeacherTokens = Mapping[tuple[TeacherPass, BlockIndex | None], Tokens]


def _uniform(size: int, draw: torch.Generator, shape: tuple[int, ...] = ()) -> torch.Tensor:
    return torch.rand((size, *shape), generator=draw, device=draw.device)


def denoiser_times(terms: Iterable[Term], batch: Batch) -> torch.Tensor:
    """Return the denoiser's times ``(B,)``, or ``(B, 1, h, w)`` if a regularizer needs token times."""
    share = max((term.needs.token_times for term in terms), default=0.0)
    if not share:
        return batch.t
    is_second = batch.draws[_TOKEN_MASK] < share
    return torch.where(is_second, batch.draws[_SECOND_TIME].view(-1, 1, 1, 1), batch.t.view(-1, 1, 1, 1))


class Aligner:
    """The regularizers of a run, none or several, with the taps, targets and teachers that they need, each had once.

    Args:
        model: its denoiser is on the device, and has not been wrapped, compiled or trained.

    Attributes:
        draws: random numbers that regularizers need beside those of every run, by the name of their stream.
        stopwatch: measures the encoders.

    Raises:
        DataError, EncoderError, TapError, PretrainedError: a signal is not available.
    """

    def __init__(
        self, run: Run, images: Images, model: Model, options: ResolvedOptions, cache: Path, device: torch.device
    ) -> None:
        config, denoiser, needs = run.config, model.denoiser, needs_of(run.config)
        self._model, self.stopwatch = model, Stopwatch(device)
        self.targets = {
            encoder: open_targets(encoder, images, options, cache, device, attention=attended_blocks(config, encoder))
            for encoder in dict.fromkeys(encoder for one in needs for encoder in one.encoders)
        }
        blocks = dict.fromkeys(block for one in needs for block in one.blocks if block is not None)
        self.taps: dict[BlockIndex | None, Tap] = {block: denoiser.tap(block) for block in blocks}
        attended = dict.fromkeys(block for one in needs for block in one.attention if block is not None)
        self._attention: dict[BlockIndex | None, AttentionTap] = {
            block: denoiser.tap_attention(block) for block in attended
        }
        self.draws: dict[str, Draw] = {}
        if any(one.less_noise for one in needs):
            self.draws[_LESS_NOISE] = _uniform
        if any(one.token_times for one in needs):
            assert denoiser.input_grid is not None
            self.draws[_SECOND_TIME] = partial(model.process.times, config.train.times)
            self.draws[_TOKEN_MASK] = partial(_uniform, shape=(1, *denoiser.input_grid))
        files = {one.frozen.weights for one in needs if one.frozen_taps}
        self._frozen = {file: _weights(denoiser, file) for file in files}
        sizes = self._measure_taps(images, options, device)
        self.terms = []
        for settings, one in zip(resolved_regularizers(config), needs, strict=True):
            taps, ema_taps, frozen_taps = (
                tuple(sizes[block][0] for block in blocks) for blocks in (one.taps, one.ema_taps, one.frozen_taps)
            )
            encoders = tuple(self.targets[encoder].dim for encoder in one.encoders)
            strides = tuple(sizes[block][1] for block in one.taps)
            shapes = Shapes(taps, encoders, ema_taps, frozen_taps, strides, images.space.channels)
            prefix = "align" if len(needs) == 1 else f"align/{settings.label}"
            self.terms.append(Term(build_regularizer(settings, shapes, run.seed), one, prefix))

    @torch.no_grad()
    def _measure_taps(
        self, images: Images, options: ResolvedOptions, device: torch.device
    ) -> dict[BlockIndex | None, tuple[int, int]]:
        """Return the token width and the stride in latent cells at each tap, from a pass of one image."""
        if not self.taps:
            return {}
        denoiser, first = self._model.denoiser, images.split.train[:1]
        denoiser.eval()
        with computing_in(denoiser, options.precision, device):
            self._model.show(images, first, 0.5, device)
        denoiser.train()
        height = images.space.shape(first)[-2]
        tokens = {block: tap.take() for block, tap in self.taps.items()}
        return {block: (one.dim, height // one.grid[0]) for block, one in tokens.items()}

    @property
    def module(self) -> nn.Module | None:
        """The regularizer, or all of them as one module; None without any."""
        modules = [term.regularizer for term in self.terms]
        return nn.ModuleList(modules) if len(modules) > 1 else next(iter(modules), None)

    def prepare(self, accelerator: Accelerator) -> None:
        """Let accelerate wrap each regularizer by itself.

        DistributedDataParallel then does not wait for its gradients in steps of weight 0.
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
        for taps in (self.taps, self._attention):
            for tap in taps.values():
                tap.clear()

    def active(self, step: int) -> list[Term]:
        """Return the regularizers that have to be called at ``step``."""
        return [term for term in self.terms if term.is_active(step)]

    def weights(self, step: int) -> dict[str, float]:
        """Return the weights at ``step``, by name in the metric row."""
        return {f"{term.prefix}/weight": term.regularizer.weight_at(step) for term in self.terms}

    def match(self, encoder: EncoderSettings | None) -> Callable[[Tokens, Tokens], Pair] | None:
        """Return how a projector matches a block's tokens with an encoder's; None if no projector is trained for it."""
        for term in self.terms:
            regularizer, encoders = term.regularizer, term.needs.encoders
            if isinstance(regularizer, EncoderTarget) and regularizer.settings.has_cosine and encoder in encoders:
                return partial(regularizer.match, encoder=encoders.index(encoder))
        return None

    @torch.no_grad()
    def teach(
        self, terms: Sequence[Term], batch: Batch, ema: EMA, autocast: AbstractContextManager[None]
    ) -> TeacherTokens:
        """Run every pass of teachers that active regularizers need, each once, before the denoiser's own."""
        passes: dict[TeacherPass, dict[BlockIndex | None, None]] = {}
        for needs in (term.needs for term in terms):
            for one, blocks in (
                (TeacherPass.averaged(needs), needs.ema_taps),
                (TeacherPass(needs.frozen), needs.frozen_taps),
            ):
                if blocks:
                    passes.setdefault(one, {}).update(dict.fromkeys(blocks))
        captured: dict[tuple[TeacherPass, BlockIndex | None], Tokens] = {}
        with autocast if passes else nullcontext():
            for one, wanted in passes.items():
                frozen = one.frozen
                t = denoiser_times(terms, batch) if frozen else one.times(batch)
                weights = self._frozen[frozen.weights] if frozen else ema.of(PREFIX)
                tokens = self._run(weights, batch, t, batch.condition, wanted)
                if frozen and frozen.guidance != 1:
                    dropped = self._model.conditioning(batch.ids, torch.ones(len(batch.ids), dtype=torch.bool))
                    null = {name: value.to(batch.x.device) for name, value in dropped.items()}
                    unguided = self._run(weights, batch, t, null, wanted)
                    tokens = [_guide(*pair, frozen.guidance) for pair in zip(tokens, unguided, strict=True)]
                captured |= {(one, block): values for block, values in zip(wanted, tokens, strict=True)}
        return captured

    def _run(
        self,
        weights: Mapping[str, torch.Tensor],
        batch: Batch,
        t: torch.Tensor,
        condition: Mapping[str, torch.Tensor],
        blocks: Iterable[BlockIndex | None],
    ) -> list[Tokens]:
        x_t, _ = self._model.process.corrupt(batch.x, batch.noise, over_pixels(t, batch.x))
        torch.func.functional_call(self._model.denoiser, dict(weights), (x_t, t), dict(condition))
        return [self.taps[block].take() for block in blocks]

    def __call__(
        self,
        terms: Sequence[Term],
        batch: Batch,
        step: int,
        prediction: Prediction,
        times: torch.Tensor,
        teachers: TeacherTokens,
    ) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
        """Return the losses of a batch by the active ``terms``, after the denoiser's pass and :meth:`teach`.

        Returns:
            The sum of the weighted losses, a scalar, or None if all weights are 0; and scalars to log, by name in the
            metric row.
        """
        tokens = {block: self.taps[block].take() for block in {b for one in terms for b in one.needs.taps}}
        attention = {
            block: self._attention[block].take() for block in {b for one in terms for b in one.needs.attention}
        }
        self.clear()  # of what this step's regularizers do not need
        if not terms:
            return None, {}
        encoders = self._encoder_tokens(terms, batch)
        weighted, values, is_weighted = list[torch.Tensor](), dict[str, torch.Tensor](), False
        for term in terms:
            needs = term.needs
            signals = Signals(
                taps=tuple(tokens[block] for block in needs.taps),
                encoders=tuple(encoders[encoder] for encoder in needs.encoders),
                ema_taps=tuple(teachers[TeacherPass.averaged(needs), block] for block in needs.ema_taps),
                latents=batch.x if needs.latents else None,
                prediction=prediction if needs.prediction else None,
                attention=tuple(attention[block] for block in needs.attention),
                encoder_attention=tuple(
                    tuple(self.targets[encoder].attention(block) for block in needs.encoder_attention)
                    for encoder in needs.encoders
                ),
                frozen_taps=tuple(teachers[TeacherPass(needs.frozen), block] for block in needs.frozen_taps),
                times=times,
            )
            loss, weight = term(signals, step), term.regularizer.weight_at(step)
            weighted.append(weight * loss.value)
            is_weighted |= weight > 0
            values |= {f"{term.prefix}/{name}": value for name, value in loss.parts.items()}
            if len(self.terms) > 1:
                values[f"{term.prefix}/loss"] = loss.value
        total = weighted[0] if len(weighted) == 1 else torch.stack(weighted).sum()
        return total if is_weighted else None, {"loss/aligned": total, **values}

    def _encoder_tokens(self, terms: Sequence[Term], batch: Batch) -> dict[EncoderSettings, Tokens]:
        loaded = zip(self.targets.items(), batch.loaded or (None,) * len(self.targets), strict=True)
        asked = {encoder for term in terms for encoder in term.needs.encoders}
        with self.stopwatch.running():
            return {
                encoder: targets(batch.ids, batch.x.device, values)
                for (encoder, targets), values in loaded
                if encoder in asked
            }


def _guide(conditional: Tokens, null: Tokens, scale: float) -> Tokens:
    """Return ``null + scale * (conditional - null)``, in float32."""
    start = null.values.float()
    guided = start + scale * (conditional.values.float() - start)
    return Tokens(guided, conditional.grid, conditional.frames)


def _weights(denoiser: Denoiser, file: str | None) -> dict[str, torch.Tensor]:
    """Return the weights of a frozen model by name, on the denoiser's device: a file's, or the present ones."""
    own = trainable(denoiser)
    if file is None:
        return {name: parameter.detach().clone() for name, parameter in own.items()}
    try:
        loaded = load_file(Path(file))
    except (OSError, ValueError, RuntimeError) as error:
        raise PretrainedError(f"cannot read the weights of '{file}': {error}") from None
    fitting = {name for name, parameter in own.items() if name in loaded and loaded[name].shape == parameter.shape}
    if missing := sorted(own.keys() - fitting):
        raise PretrainedError(f"'{file}' has the weights of another model: {missing[0]} is missing or differs in shape")
    return {name: loaded[name].to(parameter.device, parameter.dtype) for name, parameter in own.items()}


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
