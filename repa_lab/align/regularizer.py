"""Regularizers: what was captured at a step goes in, a loss and its parts come out."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, overload

import torch
from torch import nn

from repa_lab.align.cutoff import SimilarityCutoff
from repa_lab.align.losses import alignment_loss, nt_xent_loss, token_cosine
from repa_lab.align.manifold import manifold_loss
from repa_lab.align.projector import Projector
from repa_lab.align.ranks import world_size
from repa_lab.align.schedule import Schedule
from repa_lab.align.settings import Needs, RegularizerSettings, REPASettings, ResampleSettings, UREPASettings
from repa_lab.align.tokens import Tokens, normalise_over_space


@dataclass(frozen=True)
class Shapes:
    """Widths of what a regularizer asked for.

    Attributes:
        taps: the denoiser's width D at each tap.
        encoders: the width D of each encoder's tokens.
        ema_taps: the width D at each tap of the averaged model.
    """

    taps: tuple[int, ...] = ()
    encoders: tuple[int, ...] = ()
    ema_taps: tuple[int, ...] = ()


class Prediction(NamedTuple):
    """What the denoiser predicts and what it should: velocity, noise or image, ``(B, C, H, W)`` each."""

    output: torch.Tensor
    target: torch.Tensor


@dataclass(frozen=True)
class Signals:
    """What was captured or computed for a regularizer at one step, in the order in which it asked.

    Attributes:
        taps: tokens ``(B, N, D)`` of the tapped blocks.
        encoders: patch tokens ``(B, M, E)`` of the encoders.
        ema_taps: tokens ``(B, N, D)`` of the averaged model's blocks, without gradient.
        latents: the clean latents ``(B, C, H, W)``, or pixels in [-1, 1] where there is no VAE.
        prediction: the denoiser's output and its target.
    """

    taps: tuple[Tokens, ...] = ()
    encoders: tuple[Tokens, ...] = ()
    ema_taps: tuple[Tokens, ...] = ()
    latents: torch.Tensor | None = None
    prediction: Prediction | None = None


@dataclass(frozen=True)
class Loss:
    """What a regularizer yields at one step.

    Attributes:
        value: a scalar; the trainer multiplies it by the scheduled weight and adds it to the denoising loss.
        parts: scalars to log by name, unscaled, so that they compare across weights. A similarity threshold watches the
            part called ``cosine``.
    """

    value: torch.Tensor
    parts: Mapping[str, torch.Tensor] = field(default_factory=dict)


class Regularizer(nn.Module):
    """The base of all regularizers.

    A subclass has ``forward(signals, step) -> Loss``, settings of its own in ``Settings``, and, where it asks for more
    than one tap and the encoders among its settings, ``needs(settings) -> Needs``. Its parameters train and are
    checkpointed; the exported model holds none of them.

    Args:
        settings: an instance of ``Settings``.
        shapes: the widths of what was asked for.

    Raises:
        ValueError: a decay has no end.
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
        """Return what a class lacks of a regularizer, None if it lacks nothing."""
        if cls.forward is Regularizer.forward:
            return "lacks the method forward(self, signals, step) -> Loss"
        if not (isinstance(cls.Settings, type) and issubclass(cls.Settings, RegularizerSettings)):
            return "must have a class Settings(RegularizerSettings)"
        if not inspect.ismethod(inspect.getattr_static(cls, "needs").__get__(None, cls)):
            return "must have needs(cls, settings) as a classmethod"
        return None

    def forward(self, signals: Signals, step: int) -> Loss:
        """Return the unweighted loss of one batch.

        Args:
            signals: what was asked for.
            step: optimizer steps already taken.
        """
        raise NotImplementedError

    def weight_at(self, step: int) -> float:
        """Return the weight at ``step``: the schedule's, or 0 while the similarity cutoff holds."""
        scheduled = self.schedule(step)
        return 0.0 if scheduled and self.cutoff and self.cutoff.is_cut(step) else scheduled

    def is_active(self, step: int) -> bool:
        """Return whether the regularizer has to be called at ``step``; where the weight is 0 nothing is computed for
        it.

        The one exception is a recoverable similarity cutoff, which at times looks whether it still holds.
        """
        if self.weight_at(step) > 0:
            return True
        return self.cutoff is not None and self.schedule(step) > 0 and self.cutoff.probes(step)

    def observe(self, step: int, loss: Loss) -> None:
        """Tell the similarity cutoff, if there is one, the loss of one micro-batch of ``step``.

        Raises:
            ValueError: the loss has no part ``cosine``.
        """
        if self.cutoff is None:
            return
        if "cosine" not in loss.parts:
            raise ValueError(
                "similarity_threshold watches the part 'cosine' of the loss, and this regularizer yields none"
            )
        self.cutoff.observe(step, loss.parts["cosine"])


class Pair(NamedTuple):
    """Projected student tokens and encoder tokens, matched one to one: ``(B, N, D)`` each."""

    student: torch.Tensor
    teacher: torch.Tensor


LOSSES: dict[str, Callable[[Pair, float], torch.Tensor]] = {
    "cosine": lambda pair, temperature: alignment_loss(*pair),
    "nt_xent": lambda pair, temperature: nt_xent_loss(*pair, temperature),
}


class REPA(Regularizer):
    """REPA (2410.06940): project the tap's tokens and raise their cosine with the encoder's patch tokens.

    The trainer builds it from settings and shapes. In a loop of your own name the widths, and any field of
    :class:`REPASettings` by keyword: ``REPA(1152, 768, weight=0.5, projector={"type": "linear"})``.

    Args:
        in_dim: the denoiser's width at the tap, or the settings.
        out_dim: the encoder's width, or one for each of several encoders, or the shapes.
        settings: fields of the settings.

    Raises:
        ValidationError: a field is unknown or out of range.
    """

    Settings: ClassVar[type[RegularizerSettings]] = REPASettings
    settings: REPASettings

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
            teacher: the encoder's tokens, ``(B, M, out_dim)``.
            encoder: its number among the regularizer's encoders, from 0.

        Raises:
            ValueError: ``spatial_norm`` is given a single token.
        """
        projector = self.projectors[encoder]
        assert isinstance(projector, Projector)
        if self.settings.spatial_norm is not None:
            teacher = normalise_over_space(teacher, self.settings.spatial_norm)
        if self.settings.spatial_align:
            ours, theirs = _on_one_grid(self.settings.resample, projector, student, teacher)
        else:
            ours, theirs = projector.project(student).mean(), teacher.mean()
        return Pair(ours.values, theirs.values)

    def forward(self, signals: Signals, step: int = 0) -> Loss:
        """Return minus the mean cosine, or the NT-Xent loss, and the mean cosine as a part.

        Args:
            signals: one tap ``(B, N, in_dim)`` and the tokens ``(B, M, out_dim)`` of every encoder.
            step: optimizer steps already taken.

        Raises:
            ValueError: the signals do not fit together.
        """
        value, cosine, _ = self._align(signals)
        return Loss(value, {"cosine": cosine})

    def _align(self, signals: Signals) -> tuple[torch.Tensor, torch.Tensor, list[Pair]]:
        """Return the alignment loss, the mean cosine, and the matched tokens."""
        (student,) = signals.taps
        if len(signals.encoders) != len(self.projectors):
            raise ValueError(f"there are {len(self.projectors)} encoders, got the tokens of {len(signals.encoders)}")
        pairs = [self.match(student, tokens, number) for number, tokens in enumerate(signals.encoders)]
        value = torch.stack([LOSSES[self.settings.loss](pair, self.settings.temperature) for pair in pairs]).mean()
        if self.settings.loss == "cosine":
            return value, -value.detach(), pairs
        return value, torch.stack([token_cosine(*pair).detach().mean() for pair in pairs]).mean(), pairs


class UREPA(REPA):
    """U-REPA (2503.18414), Eq. 5: ``alignment + manifold_weight * manifold`` at the middle of a U-shaped denoiser.

    Args as :class:`REPA`, by the fields of :class:`UREPASettings`.
    """

    Settings: ClassVar[type[RegularizerSettings]] = UREPASettings
    settings: UREPASettings

    def forward(self, signals: Signals, step: int = 0) -> Loss:
        """Return the alignment and the weighted manifold loss; parts are the mean cosine and the manifold loss.

        Raises:
            ValueError: the signals do not fit together, or there is a single token or image, for which no pair exists.
        """
        alignment, cosine, pairs = self._align(signals)
        scope, (images, tokens) = self.settings.manifold.scope, pairs[0].teacher.shape[:2]
        has_weight = self.settings.manifold_weight > 0
        if has_weight and scope == "intra" and tokens < 2:
            raise ValueError("the manifold loss compares tokens of one image; there is a single token")
        if has_weight and scope == "batch_pooled" and images * world_size() < 2:
            raise ValueError("the manifold loss with scope batch_pooled compares images; there is a single one")
        manifold = torch.stack([manifold_loss(*pair, self.settings.manifold, step) for pair in pairs]).mean()
        value = alignment + self.settings.manifold_weight * manifold
        return Loss(value, {"cosine": cosine, "manifold": manifold.detach()})


def _on_one_grid(
    resample: ResampleSettings, projector: Projector, student: Tokens, teacher: Tokens
) -> tuple[Tokens, Tokens]:
    """Return the projected student and the teacher, ``(B, n, out_dim)`` each, on one grid."""
    if resample.side == "teacher":
        return projector.project(student), teacher.resample(student.grid)
    if resample.when == "before":
        return projector.project(student.resample(teacher.grid)), teacher
    return projector.project(student).resample(teacher.grid), teacher
