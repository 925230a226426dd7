"""The run's own model as a teacher: forward passes of its average and of frozen weights, and their times."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file

from repa_lab.align import Needs, Tokens
from repa_lab.align.needs import FrozenModel
from repa_lab.align.tokens import Grid
from repa_lab.models.family import BlockIndex
from repa_lab.models.released import PretrainedError
from repa_lab.models.tap import Denoiser, Tap
from repa_lab.spec.train import TrainConfig
from repa_lab.training.batches import Batch, Draw
from repa_lab.training.checkpoint import EMA, PREFIX, trainable
from repa_lab.training.data import Conditioning
from repa_lab.training.diffusion import Process, over_pixels

_LESS_NOISE, _SECOND_TIME, _TOKEN_MASK = "less_noise", "second_time", "token_mask"


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


# What passes captured, by pass and block.
TeacherTokens = Mapping[tuple[TeacherPass, BlockIndex | None], Tokens]


def ema_pass(needs: Needs) -> TeacherPass:
    """Return the averaged model's pass that a regularizer needs."""
    return TeacherPass(None, needs.less_noise, needs.token_times > 0)


def draws_of(needs: Iterable[Needs], train: TrainConfig, process: Process, grid: Grid | None) -> dict[str, Draw]:
    """Return the random numbers that regularizers need beside those of every run, by the name of their stream.

    Args:
        needs: of each regularizer.
        train: the distribution of times.
        grid: of the denoiser's input tokens; None if it takes no token times.
    """
    draws: dict[str, Draw] = {}
    for one in needs:
        if one.less_noise:
            draws[_LESS_NOISE] = _uniform
        if one.token_times:
            assert grid is not None
            draws[_SECOND_TIME] = partial(process.times, train.times)
            draws[_TOKEN_MASK] = partial(_uniform, shape=(1, *grid))
    return draws


def _uniform(size: int, draw: torch.Generator, shape: tuple[int, ...] = ()) -> torch.Tensor:
    return torch.rand((size, *shape), generator=draw, device=draw.device)


def denoiser_times(needs: Iterable[Needs], batch: Batch) -> torch.Tensor:
    """Return the denoiser's times ``(B,)``, or ``(B, 1, h, w)`` if a regularizer needs token times."""
    share = max((one.token_times for one in needs), default=0.0)
    if not share:
        return batch.t
    is_second = batch.draws[_TOKEN_MASK] < share
    return torch.where(is_second, batch.draws[_SECOND_TIME].view(-1, 1, 1, 1), batch.t.view(-1, 1, 1, 1))


class Teachers:
    """The averaged model and frozen earlier models of a run, which run without gradient.

    Args:
        denoiser: the denoiser before its first step; its frozen weights are copied.
        conditioning: gives the null conditioning.
        frozen: the frozen models that regularizers need.
        taps: hooks on the denoiser, by block.

    Raises:
        PretrainedError: a file of weights cannot be read, or holds another model's.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        process: Process,
        conditioning: Conditioning,
        frozen: Iterable[FrozenModel],
        taps: Mapping[BlockIndex | None, Tap],
    ) -> None:
        self._denoiser, self._process, self._conditioning, self._taps = denoiser, process, conditioning, taps
        self._frozen = {weights: _weights(denoiser, weights) for weights in {model.weights for model in frozen}}

    @torch.no_grad()
    def __call__(
        self,
        needs: Sequence[Needs],
        batch: Batch,
        ema: EMA,
        autocast: AbstractContextManager[None],
    ) -> TeacherTokens:
        """Run every pass that regularizers need, each once.

        Args:
            needs: of the regularizers that are active.
            batch: on the device.
        """
        wanted: dict[TeacherPass, dict[BlockIndex | None, None]] = {}
        for one in needs:
            for teacher_pass, asked in ((ema_pass(one), one.ema_taps), (TeacherPass(one.frozen), one.frozen_taps)):
                if asked:
                    wanted.setdefault(teacher_pass, {}).update(dict.fromkeys(asked))
        captured: dict[tuple[TeacherPass, BlockIndex | None], Tokens] = {}
        with autocast if wanted else nullcontext():
            for teacher_pass, blocks in wanted.items():
                frozen = teacher_pass.frozen
                t = denoiser_times(needs, batch) if frozen else _averaged_times(teacher_pass, batch)
                weights = self._frozen[frozen.weights] if frozen else ema.of(PREFIX)
                tokens = self._run(weights, batch, t, batch.condition, blocks)
                if frozen and frozen.guidance != 1:
                    dropped = self._conditioning(batch.ids, torch.ones(len(batch.ids), dtype=torch.bool))
                    null = {name: value.to(batch.x.device) for name, value in dropped.items()}
                    unguided = self._run(weights, batch, t, null, blocks)
                    tokens = [_guide(*pair, frozen.guidance) for pair in zip(tokens, unguided, strict=True)]
                captured |= {(teacher_pass, block): one for block, one in zip(blocks, tokens, strict=True)}
        return captured

    def _run(
        self,
        weights: Mapping[str, torch.Tensor],
        batch: Batch,
        t: torch.Tensor,
        condition: Mapping[str, torch.Tensor],
        blocks: Iterable[BlockIndex | None],
    ) -> list[Tokens]:
        x_t, _ = self._process.corrupt(batch.x, batch.noise, over_pixels(t, batch.x))
        torch.func.functional_call(self._denoiser, dict(weights), (x_t, t), dict(condition))
        return [self._taps[block].take() for block in blocks]


def _averaged_times(teacher_pass: TeacherPass, batch: Batch) -> torch.Tensor:
    """Return the averaged model's times ``(B,)``."""
    if teacher_pass.is_cleaner:
        return torch.minimum(batch.t, batch.draws[_SECOND_TIME])
    if teacher_pass.less_noise:
        return (batch.t - teacher_pass.less_noise * batch.draws[_LESS_NOISE]).clamp_min(0)
    return batch.t


def _guide(conditional: Tokens, null: Tokens, scale: float) -> Tokens:
    """Return ``null + scale * (conditional - null)``, in float32."""
    start = null.values.float()
    guided = start + scale * (conditional.values.float() - start)
    return Tokens(guided, conditional.grid, conditional.frames)


def _weights(denoiser: Denoiser, file: str | None) -> dict[str, torch.Tensor]:
    """Return the weights of a frozen model by name, on the denoiser's device."""
    own = dict(trainable(denoiser))
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
