"""The two losses, in float32 whatever comes in: cosine alignment (REPA) and the manifold term (U-REPA)."""

from __future__ import annotations

import torch

_ZERO_NORM = 1e-12


def unit(tokens: torch.Tensor) -> torch.Tensor:
    """Tokens scaled to length 1 over the last axis, in float32.

    A vector of length zero stays zero and passes no gradient: dividing by a small epsilon instead would give NaN in half
    precision and a gradient of 1/eps in single.
    """
    values = tokens.float()
    norm: torch.Tensor = values.norm(dim=-1, keepdim=True)
    return values / norm.masked_fill(norm <= _ZERO_NORM, torch.inf)


def token_cosine(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Cosine of matching tokens: ``(B, N, D)`` twice in, ``(B, N)`` in [-1, 1] out; no gradient reaches the teacher.

    Raises:
        ValueError: the shapes differ.
    """
    _require_same_shape(student, teacher)
    return (unit(student) * unit(teacher.detach())).sum(-1)


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


def manifold_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean squared difference of the two cosine Gram matrices within each image: U-REPA (2503.18414), Eqs. 3-4.

    ``mean over b, i, j of (cos(s_bi, s_bj) - cos(t_bi, t_bj))**2`` for ``(B, N, D)`` inputs. The paper prints a minus sign
    before the expectation; minimising that would push the Grams apart, so the plus sign is meant. Its expectation over
    i and j is read as the mean over the N*N pairs of tokens of one image, which puts the term in [0, 4] and makes the
    published weight 3 sensible. The student and the teacher may differ in width D.

    Returns:
        A float32 scalar in [0, 4]; 0 for one token, or when one side is a rotation of the other.

    Raises:
        ValueError: batch size or token count differ.
    """
    if student.ndim != 3 or student.shape[:2] != teacher.shape[:2]:
        raise ValueError(f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must share (B, N)")
    student_unit, teacher_unit = unit(student), unit(teacher.detach())
    # Autocast would run the two products in half precision; similarities are float32 by contract.
    with torch.autocast(student.device.type, enabled=False):
        difference = student_unit @ student_unit.transpose(1, 2) - teacher_unit @ teacher_unit.transpose(1, 2)
    return difference.square().mean()


def _require_same_shape(student: torch.Tensor, teacher: torch.Tensor) -> None:
    if student.ndim != 3 or student.shape != teacher.shape:
        raise ValueError(f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must be the same (B, N, D)")
