"""Regularizers: signals captured at a step go in, a loss comes out."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, overload

import torch
from torch import nn

from repa_lab.align.losses import (
    alignment_loss,
    manifold_loss,
    mean_over_ranks,
    nt_xent_loss,
    start_reading,
    token_cosine,
    world_size,
)
from repa_lab.align.needs import Needs
from repa_lab.align.settings import (
    CosineTargetSettings,
    EncoderTargetSettings,
    ManifoldSettings,
    RegularizerSettings,
    REPASettings,
    Schedule,
    ScheduleSettings,
    UREPASettings,
)
from repa_lab.align.tokens import Grid, Projector, Tokens, normalise_over_space, resample_tokens


@dataclass(frozen=True)
class Shapes:
    """The widths D of the signals that a regularizer needs, in the order of its needs.

    Attributes:
        strides: latent cells (or pixels) for a token along each side, at each tap of the denoiser.
        latents: channels of the latents, or of the pixels without a VAE.
    """

    taps: tuple[int, ...] = ()
    encoders: tuple[int, ...] = ()
    ema_taps: tuple[int, ...] = ()
    frozen_taps: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    latents: int = 0


class Prediction(NamedTuple):
    """The denoiser's output and its target: velocity, noise or image, ``(B, C, H, W)`` each."""

    output: torch.Tensor
    target: torch.Tensor


class Attention(NamedTuple):
    """Queries and keys ``(B, heads, N, D / heads)`` of one block's attention between image tokens, N = h * w.

    They are as they enter the product.
    """

    query: torch.Tensor
    key: torch.Tensor
    grid: Grid

    def logits(self) -> torch.Tensor:
        """Return the scaled products of all queries and keys before the softmax ``(B, heads, N, N)``, in float32."""
        query, key = self.query.float(), self.key.float()
        with torch.autocast(query.device.type, enabled=False):
            logits: torch.Tensor = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
        return logits

    def resample(self, to: Grid) -> Attention:
        """Return queries and keys on the grid ``to``; see :func:`resample_tokens`."""

        def resampled(heads: torch.Tensor) -> torch.Tensor:
            tokens = resample_tokens(heads.transpose(1, 2).flatten(2), self.grid, to)
            split: torch.Tensor = tokens.unflatten(2, (heads.shape[1], -1))
            return split.transpose(1, 2)

        return Attention(resampled(self.query), resampled(self.key), to)


@dataclass(frozen=True)
class Signals:
    """The signals of one step, in the order of the regularizer's needs.

    Attributes:
        taps: tokens ``(B, N, D)`` of the tapped blocks.
        encoders: patch tokens ``(B, M, E)`` of the encoders.
        ema_taps: tokens ``(B, N, D)`` of the averaged model's blocks, without gradient.
        latents: the clean latents ``(B, C, H, W)``, or pixels in [-1, 1] without a VAE.
        prediction: the denoiser's output and its target.
        attention: queries and keys ``(B, heads, N, D / heads)`` of the blocks.
        encoder_attention: queries and keys ``(B, heads, M, E / heads)`` of each encoder's blocks, without gradient.
        frozen_taps: tokens ``(B, N, D)`` of the frozen model's blocks, without gradient.
        times: the denoiser's times from 0 (data) to 1 (noise), ``(B,)``; ``(B, 1, h, w)`` on the grid of its input
            tokens if the run has token times. Always there in training.
    """

    taps: tuple[Tokens, ...] = ()
    encoders: tuple[Tokens, ...] = ()
    ema_taps: tuple[Tokens, ...] = ()
    latents: torch.Tensor | None = None
    prediction: Prediction | None = None
    attention: tuple[Attention, ...] = ()
    encoder_attention: tuple[tuple[Attention, ...], ...] = ()
    frozen_taps: tuple[Tokens, ...] = ()
    times: torch.Tensor | None = None


@dataclass(frozen=True)
class Loss:
    """The loss of a regularizer at one step.

    Attributes:
        value: a scalar; the trainer multiplies it by the scheduled weight and adds it to the denoising loss.
        parts: scalars to log by name, unweighted, so that arms of different weights compare. A similarity threshold
            watches the part ``cosine``.
    """

    value: torch.Tensor
    parts: Mapping[str, torch.Tensor] = field(default_factory=dict)


class SimilarityCutoff(nn.Module):
    """Sets the weight to 0 once the mean token cosine, smoothed over steps, has reached a threshold.

    The moving average is bias-corrected, so that it is a true mean from the first step on, and it is not compared with
    the threshold before ``similarity_min_count`` steps: an early spike switches nothing off. A step counts once, as the
    mean over its micro-batches and processes, so all processes decide alike. A step is decided by the steps before it:
    its own mean is not known before its last micro-batch, and reading it would wait for the device. The state is part
    of the regularizer's ``state_dict``.

    """

    def __init__(self, settings: ScheduleSettings) -> None:
        super().__init__()
        if settings.similarity_threshold is None:
            raise ValueError("a similarity cutoff needs a similarity_threshold")
        self.settings, self.threshold = settings, settings.similarity_threshold
        self._sum, self._count, self._is_off_for_good = 0.0, 0, False
        self._step, self._pending = -1, list[Callable[[], float]]()

    @property
    def similarity(self) -> float | None:
        """The smoothed cosine of the steps counted so far; None before the first."""
        return self._sum / (1 - self.settings.similarity_ema_decay**self._count) if self._count else None

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # the state is Python's
    def observe(self, step: int, cosine: torch.Tensor) -> None:
        """Note the mean cosine of one micro-batch of ``step``; every process must call this equally often."""
        if step != self._step:
            self._count_pending()
        self._step = step
        self._pending.append(start_reading(mean_over_ranks(cosine)))

    def retract(self, step: int) -> None:
        """Forget the micro-batches of ``step``, which is about to be taken again."""
        if step == self._step:
            self._pending = []

    def is_cut(self, step: int) -> bool:
        """Return whether the weight is 0 at ``step``, decided by the steps before it."""
        if step > self._step:
            self._count_pending()
        return self._is_off_for_good or self._is_above()

    def probes(self, step: int) -> bool:
        """Return whether the cosine is measured at ``step`` although the weight is 0."""
        return self.settings.threshold_mode == "recoverable" and step % self.settings.probe_every == 0

    def get_extra_state(self) -> torch.Tensor:
        """Return the state for a checkpoint, ``(3,)``: running sum, count, and whether the weight is 0 for good."""
        self._count_pending()
        return torch.tensor([self._sum, self._count, self._is_off_for_good], dtype=torch.float64)

    def set_extra_state(self, state: Any) -> None:
        """Restore the state that :meth:`get_extra_state` returned."""
        self._sum, count, off = state.tolist()
        self._count, self._is_off_for_good = int(count), bool(off)
        self._step, self._pending = -1, []

    def _count_pending(self) -> None:
        """Add the last observed step to the average."""
        if not self._pending:
            return
        # One step late, when the device has long copied the values and works on what came after them.
        mean = torch.tensor([read() for read in self._pending], dtype=torch.float64).mean().item()
        self._pending = []
        if not math.isfinite(mean):  # a step that the gradient scaler of fp16 is about to skip
            return
        decay = self.settings.similarity_ema_decay
        self._sum = decay * self._sum + (1 - decay) * mean
        self._count += 1
        self._is_off_for_good |= self.settings.threshold_mode == "permanent" and self._is_above()

    def _is_above(self) -> bool:
        similarity = self.similarity
        is_due = self._count >= self.settings.similarity_min_count
        return is_due and similarity is not None and similarity >= self.threshold


class Regularizer(nn.Module):
    """The base class of all regularizers.

    A subclass implements ``forward(signals, step) -> Loss``, declares its settings in an inner class ``Settings``, and
    overrides ``needs(settings) -> Needs`` if it needs more than one tap and the encoders among its settings. Its
    parameters are trained and checkpointed, but are not part of the exported model. ``step`` is always the number of
    optimizer steps already taken.
    """

    Settings: ClassVar[type[RegularizerSettings]] = RegularizerSettings

    def __init__(self, settings: RegularizerSettings, shapes: Shapes) -> None:
        super().__init__()
        self.settings, self.shapes = settings, shapes
        self.schedule = Schedule.of(settings)
        watches = settings.schedule.similarity_threshold is not None
        self.cutoff = SimilarityCutoff(settings.schedule) if watches else None

    @classmethod
    def needs(cls, settings: Any) -> Needs:
        """Return what must be captured or computed for these settings."""
        needs: Needs = settings.needs()
        return needs

    @classmethod
    def defect(cls) -> str | None:
        """Return what makes a class unusable as a regularizer; None if nothing does."""
        if cls.forward is Regularizer.forward:
            return "lacks the method forward(self, signals, step) -> Loss"
        if not (isinstance(cls.Settings, type) and issubclass(cls.Settings, RegularizerSettings)):
            return "must have a class Settings(RegularizerSettings)"
        if not inspect.ismethod(inspect.getattr_static(cls, "needs").__get__(None, cls)):
            return "must have needs(cls, settings) as a classmethod"
        return None

    def forward(self, signals: Signals, step: int) -> Loss:
        """Return the unweighted loss of one batch."""
        raise NotImplementedError

    def weight_at(self, step: int) -> float:
        """Return the weight at ``step``: the schedule's, or 0 after the similarity cutoff."""
        scheduled = self.schedule(step)
        return 0.0 if scheduled and self.cutoff and self.cutoff.is_cut(step) else scheduled

    def is_active(self, step: int) -> bool:
        """Return whether the weight is above 0, or a recoverable similarity cutoff measures whether it still holds."""
        probes = self.cutoff is not None and self.schedule(step) > 0 and self.cutoff.probes(step)
        return self.weight_at(step) > 0 or probes

    def observe(self, step: int, loss: Loss) -> None:
        """Pass the loss of one micro-batch to the similarity cutoff, if there is one.

        The trainer does so. In a loop of your own, call it after every micro-batch if a similarity threshold is set.
        It watches the part ``cosine``; a loss without one is a ValueError.
        """
        if self.cutoff is None:
            return
        if "cosine" not in loss.parts:
            reason = "and this regularizer yields none"
            raise ValueError(f"similarity_threshold watches the part 'cosine' of the loss, {reason}")
        self.cutoff.observe(step, loss.parts["cosine"])


class Pair(NamedTuple):
    """Projected student tokens and encoder tokens, matched one to one: ``(B, N, D)`` each."""

    student: torch.Tensor
    teacher: torch.Tensor


class EncoderTarget(Regularizer):
    """The base of regularizers that match a block's tokens with encoders' patch tokens.

    The trainer builds it from settings and shapes. In a loop of your own, give the widths, and any field of the
    settings by keyword: ``REPA(1152, 768, weight=0.5, projector={"type": "linear"})``. Their forward takes one tap
    ``(B, N, in_dim)`` and the tokens ``(B, M, out_dim)`` of every encoder; it raises a ValueError if they do not fit
    together.

    Args:
        in_dim: the denoiser's width at the tap, or the settings.
        out_dim: the encoder's width, or a sequence with the width of each encoder, or the shapes.
        settings: fields of the settings.

    Raises:
        ValidationError: a field is unknown or out of range.
    """

    Settings: ClassVar[type[RegularizerSettings]] = EncoderTargetSettings
    settings: EncoderTargetSettings

    @overload
    def __init__(self, in_dim: RegularizerSettings, out_dim: Shapes) -> None: ...

    @overload
    def __init__(self, in_dim: int, out_dim: int | Sequence[int], **settings: Any) -> None: ...

    def __init__(self, in_dim: Any, out_dim: Any, **settings: Any) -> None:
        if isinstance(in_dim, int):
            dims = (out_dim,) if isinstance(out_dim, int) else tuple(out_dim)
            in_dim, out_dim = self.Settings.model_validate(settings), Shapes((in_dim,), dims)
        super().__init__(in_dim, out_dim)
        (width,) = self.shapes.taps
        projector = self.settings.projector
        self.projectors = nn.ModuleList([Projector(width, dim, projector) for dim in self.shapes.encoders])

    def match(self, student: Tokens, teacher: Tokens, encoder: int = 0) -> Pair:
        """Return projected student tokens and encoder tokens, matched one to one.

        Args:
            student: the tap's tokens, ``(B, N, in_dim)``.
            teacher: the encoder's tokens, ``(B, M, out_dim)``, with as many frames.
            encoder: its number among the regularizer's encoders, from 0.
        """
        if student.frames != teacher.frames:
            raise ValueError(f"the block has {student.frames} frames and the encoder {teacher.frames}")
        project, resample = self.projectors[encoder], self.settings.resample
        if self.settings.spatial_norm is not None:
            teacher = normalise_over_space(teacher, self.settings.spatial_norm)
        if isinstance(self.settings, CosineTargetSettings) and not self.settings.spatial_align:
            return Pair(project(student).mean().values, teacher.mean().values)
        if resample.side == "teacher":
            return Pair(project(student).values, teacher.resample(student.grid).values)
        if resample.when == "before":
            return Pair(project(student.resample(teacher.grid)).values, teacher.values)
        return Pair(project(student).resample(teacher.grid).values, teacher.values)

    def pairs(self, signals: Signals) -> list[Pair]:
        """Return the matched tokens of every encoder; signals that do not fit together are a ValueError."""
        (student,) = signals.taps
        if len(signals.encoders) != len(self.projectors):
            raise ValueError(f"there are {len(self.projectors)} encoders, got the tokens of {len(signals.encoders)}")
        return [self.match(student, tokens, number) for number, tokens in enumerate(signals.encoders)]

    def require_relations(self, pair: Pair, manifold: ManifoldSettings) -> None:
        """Raise a ValueError if a single token or image leaves no two to compare by :func:`manifold_loss`."""
        images, tokens = pair.teacher.shape[:2]
        if manifold.scope == "intra" and tokens < 2:
            raise ValueError(f"{self.settings.type} compares tokens of one image; there is a single token")
        if manifold.scope == "batch_pooled" and images * world_size() < 2:
            raise ValueError(f"{self.settings.type} with scope batch_pooled compares images; there is a single one")


class REPA(EncoderTarget):
    """REPA (2410.06940): raises the cosine of the tap's projected tokens with the encoder's patch tokens.

    Args as for :class:`EncoderTarget`, with the fields of :class:`REPASettings`.
    """

    Settings: ClassVar[type[RegularizerSettings]] = REPASettings
    settings: REPASettings

    def forward(self, signals: Signals, step: int = 0) -> Loss:
        """Return minus the mean cosine, or the NT-Xent loss; the mean cosine is a part."""
        value, cosine = self.align(self.pairs(signals))
        return Loss(value, {"cosine": cosine})

    def align(self, pairs: Sequence[Pair]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the mean alignment loss over the encoders, and the mean cosine."""
        if self.settings.loss == "cosine":
            value = torch.stack([alignment_loss(*pair) for pair in pairs]).mean()
            return value, -value.detach()
        value = torch.stack([nt_xent_loss(*pair, self.settings.temperature) for pair in pairs]).mean()
        return value, torch.stack([token_cosine(*pair).detach().mean() for pair in pairs]).mean()


class UREPA(REPA):
    """U-REPA (2503.18414), Eq. 5: ``alignment + manifold_weight * manifold`` at the middle of a U-shaped denoiser.

    Args as for :class:`EncoderTarget`, with the fields of :class:`UREPASettings`.
    """

    Settings = UREPASettings
    settings: UREPASettings

    def forward(self, signals: Signals, step: int = 0) -> Loss:
        """Return the alignment loss plus the weighted manifold loss; the latter and the mean cosine are parts."""
        pairs = self.pairs(signals)
        alignment, cosine = self.align(pairs)
        if self.settings.manifold_weight:
            self.require_relations(pairs[0], self.settings.manifold)
        manifold = torch.stack([manifold_loss(*pair, self.settings.manifold, step) for pair in pairs]).mean()
        value = alignment + self.settings.manifold_weight * manifold
        return Loss(value, {"cosine": cosine, "manifold": manifold.detach()})
