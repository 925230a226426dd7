"""U-REPA's manifold loss: the similarities between tokens, rather than the tokens, are pulled toward the encoder's."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from repa_lab.align.losses import scaled_to_unit
from repa_lab.align.ranks import gather
from repa_lab.align.settings import ManifoldSettings

# Pairs are worked off in squares of this many tokens a side: the largest that matter for memory, large enough for
# speed.
_TILE = 512


class _Distance(NamedTuple):
    """How far two similarities are apart, by their difference and a margin, and the derivative of that."""

    value: Callable[[torch.Tensor, float], torch.Tensor]
    slope: Callable[[torch.Tensor, float], torch.Tensor]


DISTANCES: dict[str, _Distance] = {
    "l2": _Distance(lambda d, margin: d.square(), lambda d, margin: 2 * d),
    "l1_margin": _Distance(
        lambda d, margin: (d.abs() - margin).clamp_min(0), lambda d, margin: d.sign() * (d.abs() > margin)
    ),
}
# Number of pairs of n tokens that the sum of distances is divided by.
REDUCTIONS: dict[str, Callable[[int], int]] = {
    "mean": lambda n: n * n,
    "sum": lambda n: 1,
    "offdiag_mean": lambda n: max(n * (n - 1), 1),
}


def _intra(tokens: torch.Tensor, sample: int, step: int) -> torch.Tensor:
    return tokens


def _batch_pooled(tokens: torch.Tensor, sample: int, step: int) -> torch.Tensor:
    return gather(tokens.float().mean(dim=1)).unsqueeze(0)


def _batch_tokens(tokens: torch.Tensor, sample: int, step: int) -> torch.Tensor:
    everything = gather(tokens.flatten(0, 1))
    if len(everything) > sample:
        # The same tokens of student and teacher, on every process and in every arm.
        chosen = torch.randperm(len(everything), generator=torch.Generator().manual_seed(step))[:sample]
        everything = everything[chosen.to(everything.device)]
    return everything.unsqueeze(0)


# Each makes of tokens (B, N, D) sets (S, M, D), within which all pairs are compared.
SCOPES: dict[str, Callable[[torch.Tensor, int, int], torch.Tensor]] = {
    "intra": _intra,
    "batch_pooled": _batch_pooled,
    "batch_tokens": _batch_tokens,
}


_PAPER = ManifoldSettings()


def manifold_loss(
    student: torch.Tensor, teacher: torch.Tensor, manifold: ManifoldSettings = _PAPER, step: int = 0
) -> torch.Tensor:
    """How far similarities between student tokens are from those between teacher tokens: U-REPA (2503.18414), Eqs. 3-4.

    By default ``mean over b, i, j of (cos(s_bi, s_bj) - cos(t_bi, t_bj))**2``. The paper is ambiguous in three places,
    and this is why it is read so:

    - *Sign.* Eq. 3 prints a minus before the expectation; minimising that would push the similarities apart. Plus is
      meant.
    - *Pairs.* The indices i and j are those of Eq. 1, tokens of one image, while the text speaks of relations "between
      samples". The formula is followed; ``scope`` offers the other readings.
    - *Norm.* d is a squared Frobenius norm of a single similarity, a number; its expectation over i and j is the mean
      over the N*N pairs. That puts the loss in [0, 4], where the published weight 3 keeps it below the cosine term. The
      norm of the whole matrix (``reduction="sum"``) would be 65,536 times larger at 256 tokens.

    The N x N matrices are never held: squares of 512 tokens a side are compared one at a time, each pair of them once,
    and the gradient is gathered on the way. D x D matrices, ``||S'S||^2 - 2 ||S'T||^2 + ||T'T||^2``, would save them
    too, but take a small difference of large numbers: a student close to its teacher would be wrong in the third digit
    in float32.

    Args:
        student: projected hidden states, ``(B, N, D)``; gradients flow here.
        teacher: encoder patch tokens, ``(B, N, E)``; detached. The widths may differ.
        manifold: which pairs, and how they are compared.
        step: seeds the sample of ``batch_tokens``.

    Returns:
        A float32 scalar; 0 for a single token, or where one side is a rotation of the other.

    Raises:
        ValueError: batch size or token count differ.
    """
    if student.ndim != 3 or student.shape[:2] != teacher.shape[:2]:
        raise ValueError(f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must share (B, N)")
    choose = SCOPES[manifold.scope]
    ours, theirs = (choose(tokens, manifold.sample, step) for tokens in (student, teacher.detach()))
    # Autocast would run the products in half precision; similarities are float32 by contract.
    with torch.autocast(student.device.type, enabled=False):
        total: torch.Tensor = _Relations.apply(ours, theirs, manifold)
    sets, count = ours.shape[:2]
    return total / (sets * REDUCTIONS[manifold.reduction](count))


class _Relations(torch.autograd.Function):
    """Sum over sets and pairs of the distance between two similarities; tokens ``(S, M, D)`` and ``(S, M, E)`` in.

    The matrix of differences d is symmetric, so its squares above the diagonal count twice, and the gradient in the
    unit token u_i is ``2 * sum over j of slope(d_ij) u_j``. It is all that is kept until the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, student: torch.Tensor, teacher: torch.Tensor, manifold: ManifoldSettings) -> torch.Tensor:
        distance, margin = DISTANCES[manifold.distance], manifold.margin
        (ours, per_norm), (theirs, _) = scaled_to_unit(student), scaled_to_unit(teacher)
        total = ours.new_zeros(())
        gradient = torch.zeros_like(ours) if ctx.needs_input_grad[0] else None
        spans = _spans(ours.shape[1])
        for rows, columns in _squares(spans):
            difference = torch.bmm(ours[:, rows], ours[:, columns].transpose(1, 2))
            difference.baddbmm_(theirs[:, rows], theirs[:, columns].transpose(1, 2), alpha=-1)
            on_diagonal = rows == columns
            if on_diagonal and manifold.reduction == "offdiag_mean":
                difference.diagonal(dim1=1, dim2=2).zero_()
            total += distance.value(difference, margin).sum() * (1 if on_diagonal else 2)
            if gradient is not None:
                slope = distance.slope(difference, margin)
                gradient[:, rows] += 2 * torch.bmm(slope, ours[:, columns])
                if not on_diagonal:
                    gradient[:, columns] += 2 * torch.bmm(slope.transpose(1, 2), ours[:, rows])
        if gradient is not None:
            ctx.dtype = student.dtype
            ctx.save_for_backward(_before_scaling(gradient, ours, per_norm, spans))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return (outer * gradient).to(ctx.dtype), None, None


def _before_scaling(
    gradient: torch.Tensor, units: torch.Tensor, per_norm: torch.Tensor, spans: list[slice]
) -> torch.Tensor:
    """The gradient in the tokens from that in the unit tokens, in place: ``(g - (g . u) u) / |s|``."""
    for rows in spans:
        g, u = gradient[:, rows], units[:, rows]
        g.addcmul_(u, (g * u).sum(-1, keepdim=True), value=-1).mul_(per_norm[:, rows])
    return gradient


def _spans(count: int) -> list[slice]:
    """``count`` rows in nearly equal parts."""
    parts = -(-count // _TILE)
    edges = [count * part // parts for part in range(parts + 1)]
    return [slice(start, stop) for start, stop in itertools.pairwise(edges)]


def _squares(spans: list[slice]) -> list[tuple[slice, slice]]:
    """The squares on and above the diagonal of a matrix whose rows and columns are parted so."""
    return [(rows, columns) for first, rows in enumerate(spans) for columns in spans[first:]]
