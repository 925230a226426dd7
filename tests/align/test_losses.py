from __future__ import annotations

import numpy as np
import pytest
import torch

from repa_lab.align import alignment_loss, manifold_loss, nt_xent_loss
from repa_lab.align.losses import token_cosine
from tests.align import references
from tests.rounding import COSINE, UNIT

LOSSES = {
    "alignment": (alignment_loss, references.alignment),
    "manifold": (manifold_loss, references.manifold),
    "nt_xent": (nt_xent_loss, references.nt_xent),
}
HALVES = (torch.float16, torch.bfloat16)
losses = pytest.mark.parametrize("loss, reference", LOSSES.values(), ids=LOSSES.keys())


def pair(*shape: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator), torch.randn(*shape, generator=generator)


def test_the_worked_example():
    teacher = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
    student = torch.tensor([[[3.0, 4.0], [0.0, -1.0]]])
    torch.testing.assert_close(token_cosine(student, teacher), torch.tensor([[0.6, -1.0]]))
    assert alignment_loss(student, teacher).item() == pytest.approx(0.2, abs=UNIT)
    # Grams: off the diagonal the student's tokens have cosine -0.8, the teacher's 0; two of four entries differ.
    assert manifold_loss(student, teacher).item() == pytest.approx(2 * 0.8**2 / 4, abs=COSINE)


@losses
@pytest.mark.parametrize("seed", range(4))
def test_agrees_with_float64(loss, reference, seed):
    student, teacher = pair(3, 35, 24, seed=seed)
    expected = reference(student.double().numpy(), teacher.double().numpy())
    assert loss(student, teacher).item() == pytest.approx(expected, abs=COSINE)


@losses
@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_input_is_computed_in_float32(loss, reference, dtype):
    student, teacher = (tokens.to(dtype) for tokens in pair(2, 16, 64))
    value = loss(student, teacher)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(reference(student.double().numpy(), teacher.double().numpy()), abs=COSINE)


@losses
def test_gradient_agrees_with_central_differences(loss, reference):
    student, teacher = pair(2, 5, 4)
    student.requires_grad_()
    loss(student, teacher).backward()
    expected = references.gradient(reference, student.detach().double().numpy(), teacher.double().numpy())
    assert np.abs(expected).max() > 1e-2
    np.testing.assert_allclose(student.grad.numpy(), expected, atol=COSINE)


@losses
@pytest.mark.parametrize("factor", [1e-3, 7.0, 1e4])
def test_positive_scale_of_either_side_changes_nothing(loss, reference, factor):
    student, teacher = pair(2, 9, 8)
    expected = loss(student, teacher).item()
    assert loss(student * factor, teacher).item() == pytest.approx(expected, abs=COSINE)
    assert loss(student, teacher * factor).item() == pytest.approx(expected, abs=COSINE)


@losses
def test_order_and_duplication_of_the_batch_change_nothing(loss, reference):
    student, teacher = pair(4, 9, 8)
    expected = loss(student, teacher).item()
    order = torch.tensor([2, 0, 3, 1])
    assert loss(student[order], teacher[order]).item() == pytest.approx(expected, abs=COSINE)
    assert loss(torch.cat([student] * 2), torch.cat([teacher] * 2)).item() == pytest.approx(expected, abs=COSINE)


@losses
def test_no_gradient_reaches_the_teacher(loss, reference):
    student, teacher = (tokens.requires_grad_() for tokens in pair(2, 9, 8))
    loss(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad.abs().min() > 0


@pytest.mark.parametrize("sign, expected", [(1, -1.0), (-1, 1.0)])
def test_parallel_and_opposite_tokens(sign, expected):
    student, _ = pair(2, 9, 8)
    assert alignment_loss(student, sign * student).item() == pytest.approx(expected, abs=COSINE)


def test_orthogonal_tokens():
    student, _ = pair(2, 9, 2)
    turned = torch.stack([-student[..., 1], student[..., 0]], dim=-1)
    assert alignment_loss(student, turned).item() == pytest.approx(0.0, abs=UNIT)


@losses
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
class TestZeroVectors:
    def test_all_zero_students_give_zero_gradient(self, loss, reference, dtype):
        student = torch.zeros(2, 6, 8, dtype=dtype, requires_grad=True)
        teacher = torch.randn(2, 6, 8).to(dtype)
        value = loss(student, teacher)
        value.backward()
        assert value.item() == pytest.approx(reference(np.zeros((2, 6, 8)), teacher.double().numpy()), abs=COSINE)
        assert torch.equal(student.grad, torch.zeros_like(student))

    def test_one_zero_token_gets_no_gradient_and_spoils_no_other(self, loss, reference, dtype):
        student, teacher = (tokens.to(dtype) for tokens in pair(2, 6, 8))
        student[0, 3] = 0
        student.requires_grad_()
        value = loss(student, teacher)
        value.backward()
        expected = reference(student.detach().double().numpy(), teacher.double().numpy())
        assert value.item() == pytest.approx(expected, abs=COSINE)
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
    assert alignment_loss(tiny, torch.eye(2)[None]).item() == pytest.approx(-1.0, abs=COSINE)


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


@losses
def test_many_tokens_are_worked_off_in_pieces(loss, reference):
    student, teacher = pair(3, 1100, 300)  # 4 MB, and 1,100 tokens: more than a piece and more than a square
    student = (student + teacher).requires_grad_()
    value = loss(student, teacher)
    value.backward()
    assert value.item() == pytest.approx(
        reference(student.detach().double().numpy(), teacher.double().numpy()), rel=COSINE
    )
    gradient = student.grad.clone()
    student.grad = None
    slow = {alignment_loss: slow_alignment, manifold_loss: slow_manifold, nt_xent_loss: slow_nt_xent}[loss]
    slow(student.double(), teacher.double()).backward()
    assert (gradient - student.grad).norm() < 1e-5 * student.grad.norm()


def slow_alignment(student, teacher):
    return -torch.nn.functional.cosine_similarity(student, teacher, dim=-1).mean()


def slow_manifold(student, teacher):
    s, t = (torch.nn.functional.normalize(tokens, dim=-1) for tokens in (student, teacher))
    return (s @ s.mT - t @ t.mT).square().mean()


def slow_nt_xent(student, teacher):
    s, t = (torch.nn.functional.normalize(tokens, dim=-1) for tokens in (student, teacher))
    return -(s @ t.mT / 0.1).log_softmax(-1).diagonal(dim1=1, dim2=2).mean()


class TestNtXent:
    def test_by_hand(self):
        student = torch.tensor([[[2.0, 0.0], [0.0, 3.0]]])
        teacher = torch.tensor([[[1.0, 0.0], [1.0, 1.0]]])
        # Cosines: 1 and 0.7071 for the first token, 0 and 0.7071 for the second; temperature 0.5.
        expected = (np.log(1 + np.exp((0.5**0.5 - 1) / 0.5)) + np.log(1 + np.exp(-(0.5**0.5) / 0.5))) / 2
        assert nt_xent_loss(student, teacher, temperature=0.5).item() == pytest.approx(expected, abs=COSINE)

    @pytest.mark.parametrize("count", [1, 2, 9])
    def test_tokens_that_cannot_be_told_apart_give_ln_n(self, count):
        same = torch.ones(2, count, 4)
        assert nt_xent_loss(same, same).item() == pytest.approx(np.log(count), abs=COSINE)

    def test_images_do_not_see_each_other(self):
        student, teacher = pair(4, 9, 8)
        each = [nt_xent_loss(s[None], t[None]).item() for s, t in zip(student, teacher, strict=True)]
        assert nt_xent_loss(student, teacher).item() == pytest.approx(np.mean(each), abs=COSINE)

    def test_it_falls_as_tokens_find_their_own(self):
        student, teacher = pair(2, 9, 8)
        values = [nt_xent_loss(student + a * teacher, teacher).item() for a in (0, 1, 3, 100)]
        assert values == sorted(values, reverse=True)

    def test_other_shapes_are_refused(self):
        with pytest.raises(ValueError, match="must be the same"):
            nt_xent_loss(torch.zeros(2, 6, 8), torch.zeros(2, 5, 8))
