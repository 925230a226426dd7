"""U-REPA's manifold loss in all its readings."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from repa_lab.align import ManifoldSettings, alignment_loss, manifold_loss
from tests.align import references
from tests.align.test_losses import pair
from tests.rounding import COSINE


def rotation(dim: int, seed: int = 0) -> torch.Tensor:
    q, _ = torch.linalg.qr(torch.randn(dim, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    return q.float()


def differences(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """The matrices of differences of cosines, in float64: ``(B, N, N)``."""
    s, t = (torch.nn.functional.normalize(tokens.double(), dim=-1) for tokens in (student, teacher))
    return s @ s.mT - t @ t.mT


def test_it_is_zero_for_equal_features_and_for_one_token():
    student, teacher = pair(2, 9, 8)
    assert manifold_loss(student, student.clone()).item() == 0.0
    assert manifold_loss(student[:, :1], teacher[:, :1]).item() == pytest.approx(0.0, abs=COSINE**2)


def test_rotating_one_side_changes_nothing_but_the_alignment():
    student, teacher = pair(2, 20, 16)
    turned = student @ rotation(16)
    assert manifold_loss(turned, student).item() == pytest.approx(0.0, abs=(8 * COSINE) ** 2)
    assert alignment_loss(turned, student).item() > -0.5
    expected = manifold_loss(student, teacher).item()
    assert expected > 1e-2
    assert manifold_loss(turned, teacher).item() == pytest.approx(expected, abs=COSINE)
    assert manifold_loss(student, teacher @ rotation(16, 1)).item() == pytest.approx(expected, abs=COSINE)


def test_widths_may_differ():
    student, teacher = torch.randn(2, 20, 16), torch.randn(2, 20, 48)
    expected = references.manifold(student.double().numpy(), teacher.double().numpy())
    assert manifold_loss(student, teacher).item() == pytest.approx(expected, abs=COSINE)
    padded = torch.cat([student, torch.zeros(2, 20, 32)], dim=-1)
    assert manifold_loss(student, padded).item() == pytest.approx(0.0, abs=COSINE**2)


def test_it_is_the_frobenius_norm_over_pairs_within_each_image():
    student, teacher = pair(3, 7, 5)
    norms = torch.linalg.matrix_norm(differences(student, teacher)) ** 2 / 49
    assert manifold_loss(student, teacher).item() == pytest.approx(norms.mean().item(), abs=COSINE)


def test_its_bound_is_reached_by_opposite_relations():
    student = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]])
    teacher = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
    assert manifold_loss(student, teacher).item() == pytest.approx(2 * 4 / 4)


@pytest.mark.parametrize("count", [5, 512, 513, 1369])
@pytest.mark.parametrize("reduction", ["mean", "sum", "offdiag_mean"])
@pytest.mark.parametrize("distance", ["l2", "l1_margin"])
def test_value_and_gradient_agree_with_the_whole_matrix_in_float64(count, reduction, distance):
    student, teacher = pair(1, count, 24)
    student = (student + teacher).requires_grad_()
    value = manifold_loss(student, teacher, ManifoldSettings(reduction=reduction, distance=distance, margin=0.05))
    value.backward()
    gradient = student.grad.clone()
    student.grad = None

    d = differences(student, teacher)
    d = d * (1 - torch.eye(count)) if reduction == "offdiag_mean" else d
    distances = d.square() if distance == "l2" else (d.abs() - 0.05).relu()
    pairs = {"mean": count**2, "sum": 1, "offdiag_mean": count * (count - 1)}[reduction]
    expected = distances.sum() / pairs
    expected.backward()
    assert value.item() == pytest.approx(expected.item(), rel=10 * COSINE)  # cosines differ by a tenth or more
    assert (gradient - student.grad).norm() < 1e-5 * student.grad.norm()


def test_no_matrix_of_all_pairs_is_kept():
    student, teacher = pair(2, 1369, 16)
    sizes: list[int] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        manifold_loss(student.requires_grad_(), teacher)
    assert max(sizes) == student.numel()


def test_nothing_is_differentiated_where_no_gradient_is_wanted():
    student, teacher = pair(2, 9, 8)
    with torch.no_grad():
        value = manifold_loss(student.requires_grad_(), teacher)
    assert not value.requires_grad
    assert value.item() == manifold_loss(student, teacher).item()


def test_va_vaes_worked_example():
    student = torch.tensor([[[1.0, 0.0], [1.0, 1.0]]])
    teacher = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    found = manifold_loss(student, teacher, ManifoldSettings(distance="l1_margin", margin=0.25))
    assert found.item() == pytest.approx((0.5**0.5 - 0.25) * 2 / 4, abs=COSINE)
    assert found.item() == pytest.approx(0.228553, abs=COSINE)


def test_reductions_count_pairs():
    student, teacher = pair(3, 7, 5)
    found = {
        name: manifold_loss(student, teacher, ManifoldSettings(reduction=name)).item()
        for name in ("mean", "sum", "offdiag_mean")
    }
    # A token's similarity with itself is 1 on both sides, so the diagonal adds nothing.
    assert found["sum"] == pytest.approx(49 * found["mean"], rel=COSINE)
    assert found["offdiag_mean"] == pytest.approx(found["mean"] * 49 / 42, rel=COSINE)


def test_the_diagonal_of_a_zero_token_counts_only_where_the_diagonal_does():
    student, teacher = torch.zeros(1, 2, 3), torch.ones(1, 2, 3)
    for first, off_diagonal, everywhere in ((torch.zeros(3), 2, 4), (torch.tensor([1.0, 2.0, 3.0]), 2, 3)):
        student[0, 0] = first
        found = {
            name: manifold_loss(student, teacher, ManifoldSettings(reduction=name)).item()
            for name in ("mean", "sum", "offdiag_mean")
        }
        expected = {"mean": everywhere / 4, "sum": everywhere, "offdiag_mean": off_diagonal / 2}
        assert found == pytest.approx(expected, abs=COSINE)


class TestScopes:
    def test_pooled_compares_images_by_their_mean_token(self):
        student, teacher = pair(4, 9, 8)
        found = manifold_loss(student, teacher, ManifoldSettings(scope="batch_pooled")).item()
        expected = differences(student.double().mean(1)[None], teacher.double().mean(1)[None]).square().mean().item()
        assert found == pytest.approx(expected, abs=COSINE)
        assert found != pytest.approx(manifold_loss(student, teacher).item(), rel=0.01)

    def test_pooled_does_not_see_the_order_of_tokens(self):
        student, teacher = pair(4, 9, 8)
        shuffled = student[:, torch.randperm(9)]
        first, second = (
            manifold_loss(s, teacher, ManifoldSettings(scope="batch_pooled")).item() for s in (student, shuffled)
        )
        assert first == pytest.approx(second, abs=COSINE)

    def test_batch_tokens_compares_all_tokens_with_all(self):
        student, teacher = pair(3, 5, 8)
        found = manifold_loss(student, teacher, ManifoldSettings(scope="batch_tokens")).item()
        expected = differences(student.flatten(0, 1)[None], teacher.flatten(0, 1)[None]).square().mean().item()
        assert found == pytest.approx(expected, abs=COSINE)

    def test_of_too_many_tokens_a_sample_is_drawn_anew_at_every_step(self):
        student, teacher = pair(3, 50, 8)
        few = ManifoldSettings(scope="batch_tokens", sample=40)
        values = [manifold_loss(student, teacher, few, step).item() for step in (0, 1, 2, 0)]
        assert values[0] == values[3]
        assert len(set(values)) == 3
        mean = np.mean([manifold_loss(student, teacher, few, step).item() for step in range(200)])
        assert mean == pytest.approx(
            manifold_loss(student, teacher, ManifoldSettings(scope="batch_tokens")).item(), rel=0.03
        )

    def test_of_one_image_both_batch_scopes_are_what_they_say(self):
        student, teacher = pair(1, 9, 8)
        assert (
            manifold_loss(student, teacher, ManifoldSettings(scope="batch_tokens")).item()
            == manifold_loss(student, teacher).item()
        )
        assert manifold_loss(student, teacher, ManifoldSettings(scope="batch_pooled")).item() == pytest.approx(
            0, abs=COSINE**2
        )

    @pytest.mark.parametrize("scope", ["intra", "batch_pooled", "batch_tokens"])
    def test_gradients_agree_with_central_differences(self, scope):
        student, teacher = pair(2, 4, 3)
        student.requires_grad_()
        manifold_loss(student, teacher, ManifoldSettings(scope=scope)).backward()

        def loss(s, t):
            s, t = torch.from_numpy(s), torch.from_numpy(t)
            if scope == "batch_pooled":
                s, t = s.mean(1)[None], t.mean(1)[None]
            if scope == "batch_tokens":
                s, t = s.flatten(0, 1)[None], t.flatten(0, 1)[None]
            return differences(s, t).square().mean().item()

        expected = references.gradient(loss, student.detach().double().numpy(), teacher.double().numpy())
        np.testing.assert_allclose(student.grad.numpy(), expected, atol=COSINE)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"scope": "image"}, "scope\n  Input should be 'intra', 'batch_pooled' or 'batch_tokens'.*'image'"),
        ({"reduction": "max"}, "reduction\n  Input should be 'mean', 'sum' or 'offdiag_mean'.*'max'"),
        ({"distance": "kl"}, "distance\n  Input should be 'l2' or 'l1_margin'.*'kl'"),
        ({"margin": -0.1}, "margin\n  Input should be greater than or equal to 0.*=-0.1"),
        ({"sample": 1}, "sample\n  Input should be greater than or equal to 2.*=1"),
    ],
)
def test_what_is_not_known_is_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        ManifoldSettings(**settings)
