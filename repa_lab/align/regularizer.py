"""REPA and U-REPA: tap + target + step in, weighted loss and its parts out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypedDict, Unpack

import torch
from torch import nn

from repa_lab.align.cutoff import SimilarityCutoff
from repa_lab.align.losses import alignment_loss, nt_xent_loss, token_cosine
from repa_lab.align.manifold import Manifold, manifold_loss
from repa_lab.align.projector import Projector
from repa_lab.align.ranks import world_size
from repa_lab.align.schedule import Schedule
from repa_lab.align.tokens import Tokens, normalise_over_space


@dataclass(frozen=True)
class Alignment:
    """What a regularizer yields at one step; the parts are unscaled so that they compare across weights.

    Attributes:
        loss: the scalar to add to the denoising loss: ``weight * (alignment + manifold_weight * manifold)``, where the
            alignment is ``-cosine`` unless NT-Xent was asked for.
        weight: the scheduled weight that was applied.
        cosine: the mean cosine of matching tokens, in [-1, 1].
        manifold: the manifold loss, in [0, 4] by default; ``None`` where the regularizer has no such term.
    """

    loss: torch.Tensor
    weight: float
    cosine: torch.Tensor
    manifold: torch.Tensor | None = None


class Pair(NamedTuple):
    """Projected student tokens and encoder tokens, matched one to one: ``(B, N, D)`` each."""

    student: torch.Tensor
    teacher: torch.Tensor


class _Term(NamedTuple):
    weight: float
    value: torch.Tensor


@dataclass(frozen=True)
class Resample:
    """How grids that differ are matched.

    By default the projected student is brought to the encoder's grid: U-REPA (2503.18414) finds that better than shrinking
    the teacher (Table 6: FID 5.72 against 5.99), and projecting first better than resampling first (Table 7: 5.72, 5.84).

    Args:
        side: which side is resampled to the other's grid, ``student`` or ``teacher``.
        when: whether the student is resampled ``after`` or ``before`` the projector.

    Raises:
        ValueError: another word.
    """

    side: str = "student"
    when: str = "after"

    def __post_init__(self) -> None:
        for name, allowed in (("side", ("student", "teacher")), ("when", ("after", "before"))):
            if (given := getattr(self, name)) not in allowed:
                raise ValueError(f"unknown resample {name} {given!r}; allowed: {', '.join(allowed)}")

    def __call__(self, projector: Projector, student: Tokens, teacher: Tokens) -> tuple[Tokens, Tokens]:
        """Projected student and teacher, ``(B, n, out_dim)`` each, on one grid."""
        if self.side == "teacher":
            return projector.project(student), teacher.resample(student.grid)
        if self.when == "before":
            return projector.project(student.resample(teacher.grid)), teacher
        return projector.project(student).resample(teacher.grid), teacher


LOSSES: dict[str, Callable[[Pair, float], torch.Tensor]] = {
    "cosine": lambda pair, temperature: alignment_loss(*pair),
    "nt_xent": lambda pair, temperature: nt_xent_loss(*pair, temperature),
}
_BY_THE_PAPER = Resample()
_PAPER_MANIFOLD = Manifold()


class Options(TypedDict, total=False):
    """The settings that REPA and U-REPA share, by keyword; see :class:`REPA`."""

    width: int
    projector: str
    kernel: int
    loss: str
    temperature: float
    spatial_align: bool
    spatial_norm: float | None
    resample: Resample
    cutoff: SimilarityCutoff | None


class REPA(nn.Module):
    """REPA (2410.06940): project the tap's tokens and raise their cosine with the encoder's patch tokens.

    Add it to the optimizer with its projectors' parameters and leave it out of the exported model: it is a module of its own.

    Args:
        in_dim: the denoiser's width at the tap.
        out_dim: the encoder's width, or one for each of several encoders; each then has a projector of its own, and the
            losses are averaged (the papers' code).
        weight: lambda: a number for every step, or a :class:`Schedule` over steps.
        width: the hidden width of the ``mlp`` projector.
        projector: ``mlp``, ``linear`` or ``conv``; see :class:`Projector`.
        kernel: the size of the ``conv`` projector.
        loss: ``cosine``, or ``nt_xent`` (:func:`nt_xent_loss`) with ``temperature``.
        temperature: see ``loss``.
        spatial_align: False compares the mean projected token with the mean encoder token instead of place with place.
        spatial_norm: how much of each encoder channel's mean over an image is taken out, before its deviation is made 1
            (iREPA; :func:`normalise_over_space`); None leaves the encoder's tokens as they are.
        resample: how grids that differ are matched.
        cutoff: switches the regularizer off by similarity.

    Raises:
        ValueError: an unknown name or a number out of range.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int | Sequence[int],
        weight: Schedule | float = 0.5,
        width: int = 2048,
        projector: str = "mlp",
        kernel: int = 3,
        loss: str = "cosine",
        temperature: float = 0.1,
        spatial_align: bool = True,
        spatial_norm: float | None = None,
        resample: Resample = _BY_THE_PAPER,
        cutoff: SimilarityCutoff | None = None,
    ) -> None:
        super().__init__()
        if spatial_norm is not None and not spatial_norm >= 0:
            raise ValueError(f"spatial_norm must not be negative, got {spatial_norm}")
        if loss not in LOSSES:
            raise ValueError(f"unknown loss {loss!r}; allowed: {', '.join(LOSSES)}")
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        out_dims = [out_dim] if isinstance(out_dim, int) else out_dim
        self.projectors = nn.ModuleList([Projector(in_dim, dim, width, projector, kernel) for dim in out_dims])
        self.schedule = weight if isinstance(weight, Schedule) else Schedule(weight=weight)
        self.loss, self.temperature = loss, temperature
        self.spatial_align, self.spatial_norm = spatial_align, spatial_norm
        self.resample, self.cutoff = resample, cutoff

    def weight_at(self, step: int) -> float:
        """The weight at ``step``: the schedule's, or 0 where the similarity cutoff holds."""
        scheduled = self.schedule(step)
        return 0.0 if scheduled and self.cutoff and self.cutoff.is_cut(step) else scheduled

    def needs_target(self, step: int) -> bool:
        """Whether the encoder has to run at ``step``: where the weight is 0 it need not, and this module need not be called.

        The one exception is a recoverable cutoff, which looks at times whether it should end.
        """
        if self.weight_at(step) > 0:
            return True
        return self.cutoff is not None and self.schedule(step) > 0 and self.cutoff.probes(step)

    def match(self, student: Tokens, teacher: Tokens, encoder: int = 0) -> Pair:
        """Projected student tokens and encoder tokens, matched one to one.

        Args:
            student: the tap's tokens, ``(B, N, in_dim)``.
            teacher: the encoder's tokens, ``(B, M, out_dim)``.
            encoder: its number among the regularizer's encoders, from 0.

        Raises:
            ValueError: ``spatial_norm`` is given a single token.
        """
        projector = self.projectors[encoder]
        assert isinstance(projector, Projector)
        if self.spatial_norm is not None:
            teacher = normalise_over_space(teacher, self.spatial_norm)
        if self.spatial_align:
            ours, theirs = self.resample(projector, student, teacher)
        else:
            ours, theirs = projector.project(student).mean(), teacher.mean()
        return Pair(ours.values, theirs.values)

    def forward(self, student: Tokens, teacher: Tokens | Sequence[Tokens], step: int = 0) -> Alignment:
        """The weighted loss at ``step``.

        Args:
            student: the tap's tokens, ``(B, N, in_dim)``.
            teacher: the encoder's tokens, ``(B, M, out_dim)``, or those of each encoder in turn.
            step: optimizer steps already taken.

        Raises:
            ValueError: what is given does not fit together.
        """
        pairs = self._pairs(student, teacher)
        weight = self.weight_at(step)
        losses = [LOSSES[self.loss](pair, self.temperature) for pair in pairs]
        total, cosine = torch.stack(losses).mean(), self._cosine(pairs, losses)
        manifold = self._manifold(pairs, step)
        if manifold is not None:
            total = total + manifold.weight * manifold.value
        if self.training and self.cutoff is not None:
            self.cutoff.observe(step, cosine)
        return Alignment(weight * total, weight, cosine, None if manifold is None else manifold.value.detach())

    def _manifold(self, pairs: Sequence[Pair], step: int) -> _Term | None:
        """What U-REPA adds."""
        return None

    def _pairs(self, student: Tokens, teacher: Tokens | Sequence[Tokens]) -> list[Pair]:
        teachers = [teacher] if isinstance(teacher, Tokens) else teacher
        if len(teachers) != len(self.projectors):
            raise ValueError(f"there are {len(self.projectors)} encoders, got the tokens of {len(teachers)}")
        return [self.match(student, tokens, number) for number, tokens in enumerate(teachers)]

    def _cosine(self, pairs: Sequence[Pair], losses: Sequence[torch.Tensor]) -> torch.Tensor:
        if self.loss == "cosine":
            return -torch.stack([loss.detach() for loss in losses]).mean()
        return torch.stack([token_cosine(*pair).detach().mean() for pair in pairs]).mean()


class UREPA(REPA):
    """U-REPA (2503.18414), Eq. 5: ``weight * (alignment + manifold_weight * manifold)`` at a UNet's mid block.

    Args as :class:`REPA`, those after ``weight`` by keyword, and ``manifold_weight``, the paper's w (default 3; 0 means 0), and
    ``manifold``, which pairs are compared and how.

    Raises:
        ValueError: ``manifold_weight`` is negative, or there is a single token or image, for which the term is void.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int | Sequence[int],
        weight: Schedule | float = 0.5,
        manifold_weight: float = 3.0,
        manifold: Manifold = _PAPER_MANIFOLD,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(in_dim, out_dim, weight, **options)
        if not manifold_weight >= 0:
            raise ValueError(f"manifold_weight must not be negative, got {manifold_weight}")
        self.manifold_weight, self.manifold = manifold_weight, manifold

    def _manifold(self, pairs: Sequence[Pair], step: int) -> _Term:
        images, tokens = pairs[0].teacher.shape[:2]
        if self.manifold.scope == "intra" and tokens < 2:
            raise ValueError("the manifold loss compares tokens of one image; there is a single token")
        if self.manifold.scope == "batch_pooled" and images * world_size() < 2:
            raise ValueError("the manifold loss with scope batch_pooled compares images; there is a single one")
        values = [manifold_loss(*pair, self.manifold, step) for pair in pairs]
        return _Term(self.manifold_weight, torch.stack(values).mean())
