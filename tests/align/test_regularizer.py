from __future__ import annotations

import numpy as np
import pytest
import torch

from repa_lab.align import REPA, UREPA, Schedule, Tokens
from tests.align import references

GRID = (3, 4)


def tokens(dim: int, grid: tuple[int, int] = GRID, batch: int = 2) -> Tokens:
    return Tokens(torch.randn(batch, grid[0] * grid[1], dim), grid)


def projected(regularizer: REPA, student: Tokens) -> torch.Tensor:
    return regularizer.projector(student.values).detach()


@pytest.mark.parametrize("weight", [0.5, 0.25, 2.0])
@pytest.mark.parametrize("turn, cosine", [("same", 1.0), ("opposite", -1.0), ("orthogonal", 0.0)])
def test_the_ends_of_the_scale(weight, turn, cosine):
    regularizer, student = REPA(6, 2, weight, width=8), tokens(6)
    target = projected(regularizer, student)
    turned = {"same": target, "opposite": -target, "orthogonal": torch.stack([-target[..., 1], target[..., 0]], -1)}
    outcome = regularizer(student, Tokens(turned[turn], GRID))
    assert outcome.loss.item() == pytest.approx(-weight * cosine, abs=1e-6)
    assert outcome.cosine.item() == pytest.approx(cosine, abs=1e-6)
    assert (outcome.weight, outcome.manifold) == (weight, None)


def test_the_total_by_hand():
    """Teachers built so that every matching cosine is 0.5 and the mean squared Gram difference 0.1."""
    regularizer, student = UREPA(6, 8, weight=0.5, manifold_weight=3.0, width=16), tokens(6, (1, 2), batch=1)
    p = projected(regularizer, student)[0].double()
    p /= p.norm(dim=-1, keepdim=True)
    basis, _ = torch.linalg.qr(torch.cat([p.T, torch.randn(8, 2, dtype=torch.float64)], dim=1))
    u, v = basis[:, 2], basis[:, 3]
    close = p[0] @ p[1]
    difference = 0.2**0.5 if close < 0 else -(0.2**0.5)
    between = (close + difference - 0.25 * close) / 0.75
    first, second = u, between * u + (1 - between**2).sqrt() * v
    teacher = torch.stack([0.5 * p[0] + 0.75**0.5 * first, 0.5 * p[1] + 0.75**0.5 * second])
    outcome = regularizer(student, Tokens(teacher[None].float(), (1, 2)))
    assert outcome.cosine.item() == pytest.approx(0.5, abs=1e-6)
    assert outcome.manifold.item() == pytest.approx(0.1, abs=1e-6)
    assert outcome.loss.item() == pytest.approx(0.5 * (-0.5 + 3 * 0.1), abs=1e-6)


@pytest.mark.parametrize("weight, manifold_weight", [(0.5, 3.0), (0.5, 0.0), (0.0, 3.0), (1.5, 0.1)])
def test_the_total_is_weight_times_alignment_plus_manifold(weight, manifold_weight):
    regularizer, student, teacher = UREPA(6, 5, weight, manifold_weight, width=8), tokens(6), tokens(5)
    outcome = regularizer(student, teacher)
    p, t = projected(regularizer, student).double().numpy(), teacher.values.double().numpy()
    alignment, manifold = references.alignment(p, t), references.manifold(p, t)
    assert outcome.loss.item() == pytest.approx(weight * (alignment + manifold_weight * manifold), abs=1e-6)
    assert outcome.cosine.item() == pytest.approx(-alignment, abs=1e-6)
    assert outcome.manifold.item() == pytest.approx(manifold, abs=1e-6)


def test_zero_is_a_number():
    student, teacher = tokens(6), tokens(5)
    without = UREPA(6, 5, 0.5, manifold_weight=0, width=8)
    repa = REPA(6, 5, 0.5, width=8)
    repa.load_state_dict(without.state_dict())
    assert torch.equal(without(student, teacher).loss, repa(student, teacher).loss)

    off = UREPA(6, 5, weight=0, manifold_weight=3.0, width=8)
    assert off.weight_at(0) == off.weight_at(10**6) == 0
    outcome = off(student, teacher)
    outcome.loss.backward()
    assert outcome.loss.item() == 0
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in off.parameters())


def test_the_student_is_projected_and_then_brought_to_the_encoders_grid():
    regularizer, student, teacher = UREPA(6, 5, width=8), tokens(6, (2, 3)), tokens(5, (4, 5))
    p = references.bilinear(projected(regularizer, student).double().numpy(), (2, 3), (4, 5))
    outcome = regularizer(student, teacher)
    t = teacher.values.double().numpy()
    assert outcome.cosine.item() == pytest.approx(-references.alignment(p, t), abs=1e-6)
    assert outcome.manifold.item() == pytest.approx(references.manifold(p, t), abs=1e-6)


@pytest.mark.parametrize("kind", [REPA, UREPA])
def test_gradients_reach_student_and_projector_and_nothing_else(kind):
    regularizer, student, teacher = kind(6, 5, width=8), tokens(6, (2, 3)), tokens(5)
    student.values.requires_grad_()
    teacher.values.requires_grad_()
    outcome = regularizer(student, teacher)
    outcome.loss.backward()
    assert teacher.values.grad is None
    assert (student.values.grad.abs().amax(-1) > 0).all()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in regularizer.parameters())
    parts = [outcome.cosine] if kind is REPA else [outcome.cosine, outcome.manifold]
    assert not any(part.requires_grad for part in parts)


def test_the_schedule_sets_the_weight_of_a_step_and_leaves_the_parts_unscaled():
    regularizer = REPA(6, 5, Schedule(weight=1.0, warmup_steps=10, cutoff_step=20), width=8)
    student, teacher = tokens(6), tokens(5)
    at = {step: regularizer(student, teacher, step) for step in (0, 5, 10, 19, 20)}
    assert {step: outcome.weight for step, outcome in at.items()} == {0: 0.0, 5: 0.5, 10: 1.0, 19: 1.0, 20: 0.0}
    for step, outcome in at.items():
        assert torch.equal(outcome.cosine, at[10].cosine)
        assert outcome.loss.item() == pytest.approx(-outcome.weight * outcome.cosine.item(), abs=1e-7), step


def test_autocast_projects_in_half_and_measures_in_float32():
    regularizer, student, teacher = UREPA(64, 48, width=64), tokens(64), tokens(48)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outcome = regularizer(student, teacher)
        p = regularizer.projector(student.values)
    assert p.dtype == torch.bfloat16
    assert outcome.loss.dtype == outcome.cosine.dtype == outcome.manifold.dtype == torch.float32
    p64, t64 = p.detach().double().numpy(), teacher.values.double().numpy()
    assert outcome.cosine.item() == pytest.approx(-references.alignment(p64, t64), abs=1e-6)
    assert outcome.manifold.item() == pytest.approx(references.manifold(p64, t64), abs=1e-6)


def test_half_precision_hidden_states_are_taken_as_they_come():
    regularizer, teacher = REPA(6, 5, width=8), tokens(5)
    half = Tokens(tokens(6).values.bfloat16(), GRID)
    outcome = regularizer(half, teacher)
    assert outcome.loss.dtype == torch.float32
    assert torch.equal(outcome.loss, regularizer(Tokens(half.values.float(), GRID), teacher).loss)


def test_zero_hidden_states_are_finite():
    regularizer, teacher = UREPA(6, 5, width=8), tokens(5)
    student = Tokens(torch.zeros(2, 12, 6, requires_grad=True), GRID)
    outcome = regularizer(student, teacher)
    outcome.loss.backward()
    assert outcome.cosine.item() == 0.0
    assert np.isfinite(outcome.loss.item())
    assert all(torch.isfinite(p.grad).all() for p in regularizer.parameters())


def test_what_does_not_fit_is_refused():
    student = tokens(6)
    with pytest.raises(ValueError, match="the encoder gave a single token"):
        UREPA(6, 5, width=8)(student, tokens(5, (1, 1)))
    with pytest.raises(ValueError, match="must be the same"):
        REPA(6, 5, width=8)(student, tokens(4))
    with pytest.raises(ValueError, match="must be the same"):
        REPA(6, 5, width=8)(student, tokens(5, batch=3))
    with pytest.raises(ValueError, match="manifold_weight must not be negative, got -1"):
        UREPA(6, 5, manifold_weight=-1)
    with pytest.raises(ValueError, match="schedule weight must not be negative"):
        REPA(6, 5, weight=-0.5)
    with pytest.raises(ValueError, match="unknown projector"):
        REPA(6, 5, projector="conv")
