"""REPA and U-REPA: tap + target + step in, weighted loss and its parts out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from repa_lab.align.losses import alignment_loss, manifold_loss
from repa_lab.align.projector import Projector
from repa_lab.align.schedule import Schedule
from repa_lab.align.tokens import Tokens


@dataclass(frozen=True)
class Alignment:
    """What a regularizer yields at one step; the parts are unscaled so that they compare across weights.

    Attributes:
        loss: the scalar to add to the denoising loss: ``weight * (-cosine + manifold_weight * manifold)``.
        weight: the scheduled weight that was applied.
        cosine: the mean cosine of matching tokens, in [-1, 1].
        manifold: the manifold loss, in [0, 4]; ``None`` where the regularizer has no such term.
    """

    loss: torch.Tensor
    weight: float
    cosine: torch.Tensor
    manifold: torch.Tensor | None = None


class REPA(nn.Module):
    """REPA (2410.06940): project the tap's tokens and raise their cosine with the encoder's patch tokens.

    Where the grids differ, the projected student is resampled to the encoder's grid (U-REPA Tables 6-7: after the MLP, and
    the student rather than the teacher).

    Args:
        in_dim: the denoiser's width at the tap.
        out_dim: the encoder's width.
        weight: lambda: a number for every step, or a :class:`Schedule` over steps.
        width: the hidden width of the ``mlp`` projector.
        projector: ``mlp`` or ``linear``.
    """

    def __init__(
        self, in_dim: int, out_dim: int, weight: Schedule | float = 0.5, width: int = 2048, projector: str = "mlp"
    ) -> None:
        super().__init__()
        self.projector = Projector(in_dim, out_dim, width, projector)
        self.schedule = weight if isinstance(weight, Schedule) else Schedule(weight=weight)

    def weight_at(self, step: int) -> float:
        """The scheduled weight; where it is 0, the encoder need not run and this module need not be called."""
        return self.schedule(step)

    def align(self, student: Tokens, teacher: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
        """Projected student on the teacher's grid, and the teacher: two tensors ``(B, N, out_dim)``."""
        return self.projector.project(student).resample(teacher.grid).values, teacher.values

    def forward(self, student: Tokens, teacher: Tokens, step: int = 0) -> Alignment:
        """Weighted loss at ``step`` of the tap's tokens ``(B, N, in_dim)`` against the encoder's ``(B, M, out_dim)``."""
        weight = self.weight_at(step)
        alignment = alignment_loss(*self.align(student, teacher))
        return Alignment(loss=weight * alignment, weight=weight, cosine=-alignment.detach())


class UREPA(REPA):
    """U-REPA (2503.18414), Eq. 5: ``weight * (alignment + manifold_weight * manifold)`` at a UNet's mid block.

    Args as :class:`REPA`, and ``manifold_weight``, the paper's w (default 3); 0 means 0.

    Raises:
        ValueError: ``manifold_weight`` is negative, or the encoder's grid has a single token, for which the term is void.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        weight: Schedule | float = 0.5,
        manifold_weight: float = 3.0,
        width: int = 2048,
        projector: str = "mlp",
    ) -> None:
        super().__init__(in_dim, out_dim, weight, width, projector)
        if manifold_weight < 0:
            raise ValueError(f"manifold_weight must not be negative, got {manifold_weight}")
        self.manifold_weight = manifold_weight

    def forward(self, student: Tokens, teacher: Tokens, step: int = 0) -> Alignment:
        """As :meth:`REPA.forward`, with the manifold term."""
        if teacher.values.shape[1] < 2:
            raise ValueError("the manifold loss compares tokens of one image; the encoder gave a single token")
        weight = self.weight_at(step)
        pair = self.align(student, teacher)
        alignment, manifold = alignment_loss(*pair), manifold_loss(*pair)
        loss = weight * (alignment + self.manifold_weight * manifold)
        return Alignment(loss=loss, weight=weight, cosine=-alignment.detach(), manifold=manifold.detach())
