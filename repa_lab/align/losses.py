"""Losses that compare matching tokens, in float32 whatever comes in: the cosine of REPA, and its NT-Xent option."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

_ZERO_NORM = 1e-12
# Tokens are walked through in pieces that stay in a core's cache; on a GPU one piece is fastest.
_CACHED_BYTES = 1 << 20


def scaled_to_unit(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens ``(..., D)`` scaled to length 1, and what each was multiplied by, ``(..., 1)``, in float32.

    A vector of length zero stays zero and passes no gradient: dividing by a small epsilon instead would give NaN in
    half precision and a gradient of 1/eps in single.
    """
    values = tokens.float()
    per_norm = _reciprocal(values.norm(dim=-1, keepdim=True))
    return values * per_norm, per_norm


def token_cosine(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Cosine of matching tokens: ``(B, N, D)`` twice in, float32 ``(B, N)`` in [-1, 1] out; no gradient reaches the
    teacher.

    Raises:
        ValueError: the shapes differ.
    """
    _require_same_shape(student, teacher)
    cosine: torch.Tensor = _Cosine.apply(student, teacher.detach())
    return cosine


def alignment_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Minus the mean cosine of matching tokens over batch and tokens: REPA (2410.06940), section 3.2; U-REPA Eq. 1.

    Args:
        student: projected hidden states, ``(B, N, D)``; gradients flow here.
        teacher: encoder patch tokens, ``(B, N, D)``; detached.

    Returns:
        A float32 scalar in [-1, 1]; -1 is perfect alignment.

    Raises:
        ValueError: the shapes differ.
    """
    return -token_cosine(student, teacher).mean()


def nt_xent_loss(student: torch.Tensor, teacher: torch.Tensor, temperature: float = 0.1) -> torch.Tensor:
    """Cross-entropy of picking each token's own teacher token among those of its image, by cosine over ``temperature``.

    REPA (2410.06940), Tables 2 and 6, name NT-Xent as an alternative to the cosine but publish neither its negatives
    nor its temperature, and the released code lacks it. Negatives are read as the other tokens of the same image, so
    that the loss depends neither on the micro-batch nor on the number of processes.

    Returns:
        A float32 scalar of at least 0; ln N where no token is told from another.

    Raises:
        ValueError: the shapes differ.
    """
    _require_same_shape(student, teacher)
    # Autocast would run the product in half precision; similarities are float32 by contract.
    with torch.autocast(student.device.type, enabled=False):
        ours, theirs = scaled_to_unit(student)[0], scaled_to_unit(teacher.detach())[0]
        logits = ours @ theirs.transpose(1, 2) / temperature
    own = torch.arange(logits.shape[1], device=logits.device).expand(logits.shape[:2])
    return functional.cross_entropy(logits.flatten(0, 1), own.flatten())


class _Cosine(torch.autograd.Function):
    """Cosine with its gradient in closed form: it keeps nothing but its inputs and three numbers a token.

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


def _pieces(student: torch.Tensor, teacher: torch.Tensor) -> Any:
    s, t = student.reshape(-1, student.shape[-1]), teacher.reshape(-1, teacher.shape[-1])
    whole = student.device.type != "cpu" or torch.compiler.is_compiling()
    size = len(s) if whole else max(1, _CACHED_BYTES // (4 * s.shape[-1]))
    for start in range(0, len(s), size):
        rows = slice(start, min(start + size, len(s)))
        yield rows, s[rows].float(), t[rows].float()


def _reciprocal(norm: torch.Tensor) -> torch.Tensor:
    """1 / norm, and 0 for a vector of length zero, which then has cosine 0 and gradient 0."""
    return norm.masked_fill(norm <= _ZERO_NORM, torch.inf).reciprocal()


def _require_same_shape(student: torch.Tensor, teacher: torch.Tensor) -> None:
    if student.ndim != 3 or student.shape != teacher.shape:
        raise ValueError(
            f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must be the same (B, N, D)"
        )
