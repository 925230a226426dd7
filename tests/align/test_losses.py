from __future__ import annotations

import numpy as np
import pytest
import torch

from repa_lab.align import alignment_loss, manifold_loss
from repa_lab.align.losses import token_cosine, unit
from tests.align import references

LOSSES = {"alignment": (alignment_loss, references.alignment), "manifold": (manifold_loss, references.manifold)}
HALVES = (torch.float16, torch.bfloat16)
losses = pytest.mark.parametrize("loss, reference", LOSSES.values(), ids=LOSSES.keys())


def pair(*shape: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator), torch.randn(*shape, generator=generator)


def rotation(dim: int, seed: int = 0) -> torch.Tensor:
    q, _ = torch.linalg.qr(torch.randn(dim, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    return q.float()


def test_the_worked_example():
    teacher = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
    student = torch.tensor([[[3.0, 4.0], [0.0, -1.0]]])
    torch.testing.assert_close(token_cosine(student, teacher), torch.tensor([[0.6, -1.0]]))
    assert alignment_loss(student, teacher).item() == pytest.approx(0.2, abs=1e-7)
    # Grams: off the diagonal the student's tokens have cosine -0.8, the teacher's 0; two of four entries differ.
    assert manifold_loss(student, teacher).item() == pytest.approx(2 * 0.8**2 / 4, abs=1e-6)


@losses
@pytest.mark.parametrize("seed", range(4))
def test_agrees_with_float64(loss, reference, seed):
    student, teacher = pair(3, 35, 24, seed=seed)
    expected = reference(student.double().numpy(), teacher.double().numpy())
    assert loss(student, teacher).item() == pytest.approx(expected, abs=1e-6)


@losses
@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_input_is_computed_in_float32(loss, reference, dtype):
    student, teacher = (tokens.to(dtype) for tokens in pair(2, 16, 64))
    value = loss(student, teacher)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(reference(student.double().numpy(), teacher.double().numpy()), abs=1e-6)


@losses
def test_gradient_agrees_with_central_differences(loss, reference):
    student, teacher = pair(2, 5, 4)
    student.requires_grad_()
    loss(student, teacher).backward()
    expected = references.gradient(reference, student.detach().double().numpy(), teacher.double().numpy())
    assert np.abs(expected).max() > 1e-2
    np.testing.assert_allclose(student.grad.numpy(), expected, atol=1e-6)


@losses
@pytest.mark.parametrize("factor", [1e-3, 7.0, 1e4])
def test_positive_scale_of_either_side_changes_nothing(loss, reference, factor):
    student, teacher = pair(2, 9, 8)
    expected = loss(student, teacher).item()
    assert loss(student * factor, teacher).item() == pytest.approx(expected, abs=1e-6)
    assert loss(student, teacher * factor).item() == pytest.approx(expected, abs=1e-6)


@losses
def test_order_and_duplication_of_the_batch_change_nothing(loss, reference):
    student, teacher = pair(4, 9, 8)
    expected = loss(student, teacher).item()
    order = torch.tensor([2, 0, 3, 1])
    assert loss(student[order], teacher[order]).item() == pytest.approx(expected, abs=1e-6)
    assert loss(torch.cat([student] * 2), torch.cat([teacher] * 2)).item() == pytest.approx(expected, abs=1e-6)


@losses
def test_no_gradient_reaches_the_teacher(loss, reference):
    student, teacher = (tokens.requires_grad_() for tokens in pair(2, 9, 8))
    loss(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad.abs().min() > 0


@pytest.mark.parametrize("sign, expected", [(1, -1.0), (-1, 1.0)])
def test_parallel_and_opposite_tokens(sign, expected):
    student, _ = pair(2, 9, 8)
    assert alignment_loss(student, sign * student).item() == pytest.approx(expected, abs=1e-6)


def test_orthogonal_tokens():
    student, _ = pair(2, 9, 2)
    turned = torch.stack([-student[..., 1], student[..., 0]], dim=-1)
    assert alignment_loss(student, turned).item() == pytest.approx(0.0, abs=1e-7)


class TestManifold:
    def test_it_is_zero_for_equal_features_and_for_one_token(self):
        student, teacher = pair(2, 9, 8)
        assert manifold_loss(student, student.clone()).item() == 0.0
        assert manifold_loss(student[:, :1], teacher[:, :1]).item() == pytest.approx(0.0, abs=1e-12)

    def test_rotating_one_side_changes_nothing_but_the_alignment(self):
        student, teacher = pair(2, 20, 16)
        turned = student @ rotation(16)
        assert manifold_loss(turned, student).item() == pytest.approx(0.0, abs=1e-10)
        assert alignment_loss(turned, student).item() > -0.5
        expected = manifold_loss(student, teacher).item()
        assert expected > 1e-2
        assert manifold_loss(turned, teacher).item() == pytest.approx(expected, abs=1e-6)
        assert manifold_loss(student, teacher @ rotation(16, 1)).item() == pytest.approx(expected, abs=1e-6)

    def test_widths_may_differ(self):
        student, teacher = torch.randn(2, 20, 16), torch.randn(2, 20, 48)
        expected = references.manifold(student.double().numpy(), teacher.double().numpy())
        assert manifold_loss(student, teacher).item() == pytest.approx(expected, abs=1e-6)
        padded = torch.cat([student, torch.zeros(2, 20, 32)], dim=-1)
        assert manifold_loss(student, padded).item() == pytest.approx(0.0, abs=1e-12)

    def test_it_is_the_frobenius_norm_over_pairs_within_each_image(self):
        student, teacher = pair(3, 7, 5)
        norms = [
            torch.linalg.matrix_norm(unit(s) @ unit(s).T - unit(t) @ unit(t).T) ** 2 / 49
            for s, t in zip(student, teacher, strict=True)
        ]
        assert manifold_loss(student, teacher).item() == pytest.approx(torch.stack(norms).mean().item(), abs=1e-6)

    def test_its_bound_is_reached_by_opposite_relations(self):
        student = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]])
        teacher = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
        assert manifold_loss(student, teacher).item() == pytest.approx(2 * 4 / 4)


@losses
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
class TestZeroVectors:
    def test_all_zero_students_give_zero_gradient(self, loss, reference, dtype):
        student = torch.zeros(2, 6, 8, dtype=dtype, requires_grad=True)
        teacher = torch.randn(2, 6, 8).to(dtype)
        value = loss(student, teacher)
        value.backward()
        assert value.item() == pytest.approx(reference(np.zeros((2, 6, 8)), teacher.double().numpy()), abs=1e-6)
        assert torch.equal(student.grad, torch.zeros_like(student))

    def test_one_zero_token_gets_no_gradient_and_spoils_no_other(self, loss, reference, dtype):
        student, teacher = (tokens.to(dtype) for tokens in pair(2, 6, 8))
        student[0, 3] = 0
        student.requires_grad_()
        value = loss(student, teacher)
        value.backward()
        expected = reference(student.detach().double().numpy(), teacher.double().numpy())
        assert value.item() == pytest.approx(expected, abs=1e-6)
        assert torch.equal(student.grad[0, 3], torch.zeros(8, dtype=dtype))
        others = torch.ones(2, 6, dtype=torch.bool)
        others[0, 3] = False
        assert torch.isfinite(student.grad).all()
        assert (student.grad[others].abs().amax(-1) > 0).all()

    def test_zero_teachers_give_no_gradient(self, loss, reference, dtype):
        student = torch.randn(2, 6, 8).to(dtype).requires_grad_()
        value = loss(student, torch.zeros(2, 6, 8, dtype=dtype))
        value.backward()
        assert torch.isfinite(value)
        assert torch.isfinite(student.grad).all()


def test_the_smallest_numbers_of_half_precision_have_a_direction():
    tiny = torch.tensor([[[6e-8, 0.0], [0.0, 6e-8]]], dtype=torch.float16)
    assert tiny.abs().max() > 0
    assert alignment_loss(tiny, torch.eye(2)[None]).item() == pytest.approx(-1.0, abs=1e-6)


@losses
def test_autocast_changes_no_bit(loss, reference):
    student, teacher = pair(2, 32, 48)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = loss(student, teacher)
    assert under_autocast.dtype == torch.float32
    assert torch.equal(under_autocast, loss(student, teacher))


@pytest.mark.parametrize("teacher", [(2, 1, 8), (2, 8), (1, 6, 8), (2, 6, 4)])
def test_alignment_refuses_other_shapes(teacher):
    with pytest.raises(ValueError, match=r"student \(2, 6, 8\) and teacher \(.*\) must be the same \(B, N, D\)"):
        alignment_loss(torch.zeros(2, 6, 8), torch.zeros(teacher))


@pytest.mark.parametrize("teacher", [(2, 1, 8), (2, 8), (1, 6, 8)])
def test_manifold_refuses_other_batches_and_counts(teacher):
    with pytest.raises(ValueError, match=r"must share \(B, N\)"):
        manifold_loss(torch.zeros(2, 6, 8), torch.zeros(teacher))
