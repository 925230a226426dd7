"""The losses, in float32 for inputs of any dtype: REPA's cosine and NT-Xent, and U-REPA's manifold loss.

The first part is what the processes of one training exchange.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import distributed
from torch.autograd.function import once_differentiable
from torch.nn import functional

from repa_lab.align.settings import ManifoldSettings

# On a CPU, tokens are processed in pieces that fit into a core's cache; on a GPU one piece is fastest.
_CACHED_BYTES = 1 << 20
# The manifold loss compares squares of this many tokens a side: small enough for memory, large enough for speed.
_TILE = 512
_PAPER = ManifoldSettings()


def world_size() -> int:
    """Return the number of processes that train together; 1 without torch.distributed."""
    in_use = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if in_use else 1


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Return the sum of a tensor over all processes, detached, the same in each of them."""
    total = values.detach()
    if world_size() > 1:
        total = total.clone()
        distributed.all_reduce(total)
    return total


def mean_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Return the mean of a tensor over all processes, detached, the same in each of them."""
    return sum_over_ranks(values) / world_size()


def gather(values: torch.Tensor) -> torch.Tensor:
    """Return the rows ``(n, ...)`` of all processes as ``(n * world size, ...)``, in the order of their ranks.

    Gradients reach this process's own rows, multiplied by the world size: DistributedDataParallel averages the
    gradients of the processes, but a loss over all rows needs their sum.
    """
    world = world_size()
    if world == 1:
        return values
    detached = values.detach().contiguous()
    rows = [torch.empty_like(detached) for _ in range(world)]
    distributed.all_gather(rows, detached)
    rows[distributed.get_rank()] = detached + world * (values - detached)
    return torch.cat(rows)


def start_reading(value: torch.Tensor) -> Callable[[], float]:
    """Start copying a scalar from its device, and return a function that waits for this copy and returns the number.

    The function waits for nothing that the device was given after the copy, while ``item()`` would wait for all of it.
    """
    host = value.detach().to("cpu", non_blocking=True)
    copied = torch.cuda.Event() if value.is_cuda else None
    if copied:
        copied.record()

    def read() -> float:
        if copied:
            copied.synchronize()
        return host.item()

    return read


def token_cosine(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Return the cosines ``(B, N)`` of matching tokens, in float32.

    Args:
        student: projected hidden states, ``(B, N, D)``; gradients flow here.
        teacher: encoder patch tokens, ``(B, N, D)``; detached.

    Raises:
        ValueError: the shapes differ.
    """
    _require_same_shape(student, teacher)
    cosine: torch.Tensor = _Cosine.apply(student, teacher.detach())
    return cosine


def alignment_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Return minus the mean cosine of matching tokens: REPA (2410.06940), section 3.2; U-REPA, Eq. 1.

    Args and errors as for :func:`token_cosine`. A float32 scalar in [-1, 1]; -1 is perfect alignment.
    """
    return -token_cosine(student, teacher).mean()


def nt_xent_loss(student: torch.Tensor, teacher: torch.Tensor, temperature: float = 0.1) -> torch.Tensor:
    """Return the cross-entropy of picking each token's own teacher token among those of its image.

    REPA (2410.06940), Tables 2 and 6, names NT-Xent as an alternative to the cosine but publishes neither its negatives
    nor its temperature, and the released code lacks it. Here the negatives are the other tokens of the same image, so
    that the loss depends neither on the micro-batch nor on the number of processes.

    Args and errors as for :func:`token_cosine`; the cosines are divided by ``temperature``. A float32 scalar of at
    least 0; ln N if the tokens cannot be told apart.
    """
    _require_same_shape(student, teacher)
    # Autocast would run the product in half precision; similarities must be float32.
    with torch.autocast(student.device.type, enabled=False):
        ours, theirs = scale_to_unit(student)[0], scale_to_unit(teacher.detach())[0]
        logits = ours @ theirs.transpose(1, 2) / temperature
    matching = torch.arange(logits.shape[1], device=logits.device).expand(logits.shape[:2])
    return functional.cross_entropy(logits.flatten(0, 1), matching.flatten())


def manifold_loss(
    student: torch.Tensor, teacher: torch.Tensor, manifold: ManifoldSettings = _PAPER, step: int = 0
) -> torch.Tensor:
    """Return how far similarities between student tokens are from those between teacher tokens: U-REPA (2503.18414).

    By default ``mean over b, i, j of (cos(s_bi, s_bj) - cos(t_bi, t_bj))**2``, Eqs. 3-4. The paper is ambiguous in
    three places:

    - *Sign.* Eq. 3 prints a minus before the expectation; minimising that would push the similarities apart. Plus is
      meant.
    - *Pairs.* The indices i and j are those of Eq. 1, tokens of one image, while the text speaks of relations "between
      samples". The default follows the formula; ``scope`` offers the other readings.
    - *Norm.* d is a squared Frobenius norm of a single similarity, a number; its expectation over i and j is the mean
      over the N*N pairs. That puts the loss in [0, 4], where the published weight 3 keeps it below the cosine term. The
      norm of the whole matrix (``reduction="sum"``) would be 65,536 times larger at 256 tokens.

    The N x N matrices are never stored: squares of 512 tokens a side are compared one at a time, each pair of squares
    once, and the gradient is accumulated on the way. The D x D form ``||S'S||^2 - 2 ||S'T||^2 + ||T'T||^2`` would need
    no N x N matrices either, but it subtracts large numbers: for a student close to its teacher, float32 would be wrong
    in the third digit.

    Args as for :func:`token_cosine`, but the widths may differ; ``step`` seeds the sample of ``batch_tokens``. A
    float32 scalar; 0 for a single token, or if one side is a rotation of the other.

    Raises:
        ValueError: batch size or token count differ.
    """
    if student.ndim != 3 or student.shape[:2] != teacher.shape[:2]:
        raise ValueError(f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must share (B, N)")
    ours, theirs = (_in_scope(tokens, manifold, step) for tokens in (student, teacher.detach()))
    # Autocast would run the products in half precision; similarities must be float32.
    with torch.autocast(student.device.type, enabled=False):
        total: torch.Tensor = _SumOfDistances.apply(ours, theirs, manifold)
    sets, n = ours.shape[:2]
    pairs = {"mean": n * n, "sum": 1, "offdiag_mean": max(n * (n - 1), 1)}[manifold.reduction]
    return total / (sets * pairs)


def _in_scope(tokens: torch.Tensor, manifold: ManifoldSettings, step: int) -> torch.Tensor:
    """Return the sets ``(S, M, D)`` of tokens within which all pairs are compared, from tokens ``(B, N, D)``."""
    if manifold.scope == "intra":
        return tokens
    if manifold.scope == "batch_pooled":
        return gather(tokens.float().mean(dim=1)).unsqueeze(0)
    every = gather(tokens.flatten(0, 1))
    if len(every) > manifold.sample:
        # The same tokens of student and teacher, in every process and in every arm.
        chosen = torch.randperm(len(every), generator=torch.Generator().manual_seed(step))[: manifold.sample]
        every = every[chosen.to(every.device)]
    return every.unsqueeze(0)


class _Cosine(torch.autograd.Function):
    """The cosine with its gradient in closed form; it stores only its inputs and three numbers a token.

    With a = 1 / (|s| |t|) and c the cosine, dc/ds = a t - (c / |s|^2) s.
    """

    @staticmethod
    def forward(ctx: Any, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        dot, student_norm, teacher_norm = torch.empty(3, *student.shape[:-1], device=student.device).unbind()
        for rows, s, t in _pieces(student, teacher):
            dot.view(-1)[rows] = (s * t).sum(-1)
            student_norm.view(-1)[rows] = s.norm(dim=-1)
            teacher_norm.view(-1)[rows] = t.norm(dim=-1)
        per_student, per_teacher = _reciprocal(student_norm), _reciprocal(teacher_norm)
        cosine = dot * per_student * per_teacher
        ctx.save_for_backward(student, teacher, cosine, per_student, per_teacher)
        return cosine

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        student, teacher, cosine, per_student, per_teacher = ctx.saved_tensors
        toward = (gradient * per_student * per_teacher).view(-1, 1)
        along = (gradient * cosine * per_student.square()).view(-1, 1)
        out = torch.empty(student.shape, device=student.device)
        for rows, s, t in _pieces(student, teacher):
            piece = out.view(-1, out.shape[-1])[rows]
            torch.mul(t, toward[rows], out=piece)
            piece.addcmul_(s, along[rows], value=-1)
        return out.to(student.dtype), None


def _pieces(student: torch.Tensor, teacher: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Yield rows of the flattened tokens with their float32 values ``(n, D)``."""
    s, t = student.reshape(-1, student.shape[-1]), teacher.reshape(-1, teacher.shape[-1])
    whole = student.device.type != "cpu" or torch.compiler.is_compiling()
    size = len(s) if whole else max(1, _CACHED_BYTES // (4 * s.shape[-1]))
    for start in range(0, len(s), size):
        rows = slice(start, min(start + size, len(s)))
        yield rows, s[rows].float(), t[rows].float()


class _SumOfDistances(torch.autograd.Function):
    """The sum over sets and pairs of the distance between two similarities, of tokens ``(S, M, D)`` and ``(S, M, E)``.

    The matrix of differences d is symmetric, so its squares above the diagonal count twice, and the gradient in the
    unit token u_i is ``2 * sum over j of slope(d_ij) u_j``. Only this gradient is kept until the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, student: torch.Tensor, teacher: torch.Tensor, manifold: ManifoldSettings) -> torch.Tensor:
        (ours, per_norm), (theirs, _) = scale_to_unit(student), scale_to_unit(teacher)
        total = ours.new_zeros(())
        gradient = torch.zeros_like(ours) if ctx.needs_input_grad[0] else None
        count, tiles = ours.shape[1], -(-ours.shape[1] // _TILE)
        spans = [slice(*ends) for ends in itertools.pairwise(count * tile // tiles for tile in range(tiles + 1))]
        for rows, columns in itertools.combinations_with_replacement(spans, 2):
            difference = torch.bmm(ours[:, rows], ours[:, columns].transpose(1, 2))
            difference.baddbmm_(theirs[:, rows], theirs[:, columns].transpose(1, 2), alpha=-1)
            on_diagonal = rows == columns
            if on_diagonal and manifold.reduction == "offdiag_mean":
                difference.diagonal(dim1=1, dim2=2).zero_()
            if manifold.distance == "l2":
                distance, slope = difference.square(), 2 * difference
            else:
                excess = difference.abs() - manifold.margin
                distance, slope = excess.clamp_min(0), difference.sign() * (excess > 0)
            total += distance.sum() * (1 if on_diagonal else 2)
            if gradient is not None:
                gradient[:, rows] += 2 * torch.bmm(slope, ours[:, columns])
                if not on_diagonal:
                    gradient[:, columns] += 2 * torch.bmm(slope.transpose(1, 2), ours[:, rows])
        if gradient is not None:
            for rows in spans:  # from the unit tokens to the tokens, in place: (g - (g . u) u) / |s|
                g, u = gradient[:, rows], ours[:, rows]
                g.addcmul_(u, (g * u).sum(-1, keepdim=True), value=-1).mul_(per_norm[:, rows])
            ctx.dtype = student.dtype
            ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return (outer * gradient).to(ctx.dtype), None, None


def scale_to_unit(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens ``(..., D)`` scaled to length 1, and the factors ``(..., 1)``, in float32.

    A vector of length 0 stays 0 and passes no gradient. Dividing by a small epsilon instead would give NaN in half
    precision and a gradient of 1/eps in single.
    """
    values = tokens.float()
    per_norm = _reciprocal(values.norm(dim=-1, keepdim=True))
    return values * per_norm, per_norm


def _reciprocal(norm: torch.Tensor) -> torch.Tensor:
    """Return 1 / norm, and 0 for a norm of 0, so that cosine and gradient are 0."""
    return norm.masked_fill(norm <= 1e-12, torch.inf).reciprocal()


def _require_same_shape(student: torch.Tensor, teacher: torch.Tensor) -> None:
    if student.ndim != 3 or student.shape != teacher.shape:
        shapes = f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)}"
        raise ValueError(f"{shapes} must be the same (B, N, D)")
