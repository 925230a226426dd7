from __future__ import annotations

import numpy as np
import pytest
import torch

from repa_lab import metrics
from repa_lab.metrics import CosineSums
from tests.metrics.conftest import cosine_gap as gap_of_tensors
from tests.metrics.conftest import of_arrays

cka, cosine_gap = of_arrays(metrics.cka), of_arrays(gap_of_tensors)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def related(count: int, wide: int, narrow: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features that share a part, with means far from 0."""
    shared = normal(count, 3, seed=seed)
    x = shared @ normal(3, wide, seed=seed + 1) + normal(count, wide, seed=seed + 2) + 5
    return x, shared @ normal(3, narrow, seed=seed + 3) + normal(count, narrow, seed=seed + 4) - 2


def biased_by_definition(x: np.ndarray, y: np.ndarray) -> float:
    """``tr(KHLH)`` normalised, with n x n kernels and the centring matrix H: 1905.00414, Eqs. 3-4."""
    n = len(x)
    h = np.eye(n) - np.ones((n, n)) / n

    def hsic(a: np.ndarray, b: np.ndarray) -> float:
        return np.trace(a @ a.T @ h @ b @ b.T @ h) / (n - 1) ** 2

    return hsic(x, y) / np.sqrt(hsic(x, x) * hsic(y, y))


def unbiased_by_definition(x: np.ndarray, y: np.ndarray) -> float:
    """HSIC_1 of 2010.15327, Eq. 3, with n x n kernels whose diagonals are 0, on the raw features."""
    n, ones = len(x), np.ones(len(x))

    def kernel(a: np.ndarray) -> np.ndarray:
        return a @ a.T * (1 - np.eye(n))

    def hsic(a: np.ndarray, b: np.ndarray) -> float:
        k, m = kernel(a), kernel(b)
        middle = ones @ k @ ones * (ones @ m @ ones) / ((n - 1) * (n - 2))
        return (np.trace(k @ m) + middle - 2 / (n - 2) * (ones @ k @ m @ ones)) / (n * (n - 3))

    return hsic(x, y) / np.sqrt(hsic(x, x) * hsic(y, y))


FORMS = {"unbiased": (True, unbiased_by_definition), "biased": (False, biased_by_definition)}
forms = pytest.mark.parametrize("unbiased, definition", FORMS.values(), ids=FORMS.keys())


class TestCKA:
    @forms
    @pytest.mark.parametrize("count, wide, narrow", [(4, 2, 3), (12, 40, 3), (60, 5, 5), (200, 30, 20)])
    def test_agrees_with_the_definition(self, unbiased, definition, count, wide, narrow, tensor):
        x, y = related(count, wide, narrow)
        expected = definition(x, y)
        assert cka(tensor(x), tensor(y), unbiased) == pytest.approx(expected, abs=1e-9)
        assert abs(expected) > 0.05

    @forms
    def test_of_features_with_themselves_is_1(self, unbiased, definition):
        x, _ = related(30, 8, 4)
        assert cka(x, x, unbiased) == pytest.approx(1, abs=1e-12)

    @forms
    def test_is_symmetric(self, unbiased, definition):
        x, y = related(30, 8, 4)
        assert cka(x, y, unbiased) == pytest.approx(cka(y, x, unbiased), abs=1e-12)

    @forms
    def test_ignores_rotation_scale_place_and_order(self, unbiased, definition):
        x, y = related(30, 8, 4)
        rotation = np.linalg.qr(normal(8, 8, seed=9))[0]
        order = np.random.default_rng(1).permutation(30)
        for changed in (x @ rotation, 7 * x, x + np.arange(8)):
            assert cka(changed, y, unbiased) == pytest.approx(cka(x, y, unbiased), abs=1e-9)
        assert cka(x[order], y[order], unbiased) == pytest.approx(cka(x, y, unbiased), abs=1e-12)
        assert cka(x[order], y, unbiased) < cka(x, y, unbiased) / 2
        stretched = x * np.array([100.0, *[1.0] * 7])
        assert abs(cka(stretched, y, unbiased) - cka(x, y, unbiased)) > 0.01  # only isotropic scaling is ignored

    def test_of_independent_features_is_0_on_average_if_unbiased(self):
        pairs = [(normal(40, 100, seed=2 * i), normal(40, 100, seed=2 * i + 1)) for i in range(200)]
        found = np.array([cka(x, y) for x, y in pairs])
        standard_error = found.std() / np.sqrt(len(found))
        assert standard_error < 0.01
        assert abs(found.mean()) < 4 * standard_error
        # The plain form is of the order of d / (n + d) here: high for want of data, not for agreement.
        assert np.mean([cka(x, y, unbiased=False) for x, y in pairs]) > 0.6

    def test_takes_single_precision_without_losing_it(self):
        x, y = related(200, 30, 20)
        x, y = (x * 1e-3 + 1e3).astype(np.float32), y.astype(np.float32)
        assert cka(x, y) == pytest.approx(unbiased_by_definition(x.astype(float) - 1e3, y.astype(float)), abs=1e-6)

    @forms
    def test_of_constant_features_is_0(self, unbiased, definition, tensor):
        assert cka(tensor(np.full((6, 2), 0.1)), tensor(normal(6, 3)), unbiased) == 0

    @pytest.mark.parametrize("x, y", [((3, 2), (3, 2)), ((5, 2), (6, 2)), ((5,), (5, 2)), ((5, 2, 2), (5, 2))])
    def test_refuses_what_it_cannot_compare(self, x, y):
        with pytest.raises(
            ValueError, match=r"need features (\(n >= 4, d\), one pooled vector an item|of the same items), got"
        ):
            cka(normal(*x), normal(*y))

    @forms
    def test_refuses_values_that_are_not_finite(self, unbiased, definition):
        x = normal(6, 3)
        x[2, 1] = np.nan
        with pytest.raises(ValueError, match="not finite"):
            cka(x, normal(6, 3), unbiased)


def gap_by_loops(student: np.ndarray, teacher: np.ndarray) -> tuple[float, float]:
    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        length = np.sqrt((a @ a) * (b @ b))
        return a @ b / length if length else 0.0

    images, places = student.shape[:2]
    matched, mismatched = [], []
    for i in range(images):
        for j in range(images):
            row = [cosine(student[i, n], teacher[j, n]) for n in range(places)]
            (matched if i == j else mismatched).extend(row)
    return float(np.mean(matched)), float(np.mean(matched) - np.mean(mismatched))


class TestCosineGap:
    @pytest.mark.parametrize("shape", [(2, 1, 3), (5, 4, 7), (3, 6, 1)])
    def test_agrees_with_explicit_loops(self, shape, tensor):
        teacher = normal(*shape)
        student = teacher + normal(*shape, seed=1)
        assert cosine_gap(tensor(student), tensor(teacher)) == pytest.approx(gap_by_loops(student, teacher), abs=1e-12)

    @pytest.mark.parametrize("sizes", [(7,), (1, 6), (2, 3, 2)])
    def test_of_batches_is_that_of_all(self, sizes, tensor):
        student, teacher = normal(7, 4, 5), normal(7, 4, 5, seed=1) + 0.5
        sums, ends = CosineSums(), np.cumsum(sizes)
        assert np.isnan([sums.cosine, sums.gap]).all()
        for start, end in zip([0, *ends], ends, strict=False):
            sums.add(tensor(student[start:end]), tensor(teacher[start:end]))
        assert (sums.cosine, sums.gap) == pytest.approx(gap_by_loops(student, teacher), abs=1e-12)
        assert sums.images == 7

    def test_one_image_has_a_cosine_and_no_gap(self):
        sums = CosineSums()
        add = of_arrays(sums.add)
        add(normal(1, 4, 5), normal(1, 4, 5))
        assert (sums.cosine, str(sums.gap)) == (pytest.approx(1, abs=1e-15), "nan")
        with pytest.raises(ValueError, match=r"\(N, D\) = \(4, 5\) as before, got \(2, 3, 5\)"):
            add(normal(2, 3, 5), normal(2, 3, 5))
        assert sums.images == 1

    def test_by_hand(self):
        # Matched: 1 and 0. Mismatched: student 0 with teacher 1 gives 0, student 1 with teacher 0 gives 1.
        student, teacher = np.array([[[2.0, 0.0]], [[3.0, 0.0]]]), np.array([[[1.0, 0.0]], [[0.0, 5.0]]])
        assert cosine_gap(student, teacher) == (0.5, 0.0)

    def test_a_positional_prior_has_a_cosine_but_no_gap(self):
        average = np.broadcast_to(normal(1, 9, 16), (6, 9, 16))
        teacher = average + 0.1 * normal(6, 9, 16, seed=1)
        matched, gap = cosine_gap(average, teacher)
        assert matched > 0.95
        assert abs(gap) < 1e-12

    def test_ignores_the_length_of_every_token(self):
        student, teacher = normal(4, 3, 5), normal(4, 3, 5, seed=1)
        scale = np.exp(normal(4, 3, 1, seed=2))
        assert cosine_gap(student * scale, teacher / scale) == pytest.approx(cosine_gap(student, teacher), abs=1e-12)

    def test_a_token_of_length_0_counts_as_0(self):
        student, teacher = normal(2, 2, 3), normal(2, 2, 3, seed=1)
        student[0, 1] = 0
        assert cosine_gap(student, teacher) == pytest.approx(gap_by_loops(student, teacher), abs=1e-12)

    @pytest.mark.parametrize("student, teacher", [((2, 4, 3), (2, 5, 3)), ((4, 3), (4, 3))])
    def test_refuses_what_it_cannot_compare(self, student, teacher):
        with pytest.raises(ValueError, match="need two equal"):
            cosine_gap(normal(*student), normal(*teacher))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_tensors_of_any_precision_are_measured_by_their_values(dtype):
    for metric, shape in ((metrics.cka, (9, 5)), (gap_of_tensors, (9, 4, 5))):
        x, y = (torch.from_numpy(normal(*shape, seed=seed)).to(dtype).requires_grad_() for seed in (0, 1))
        assert metric(x, y) == metric(x.detach().double(), y.detach().double())


def test_centring_leaves_no_rounding_of_a_constant_column():
    x = np.column_stack([np.full(7, 0.1), normal(7)])
    assert (x[:, 0] - x[:, 0].mean()).any()
    assert cka(x[:, :1], normal(7, 2)) == 0
    assert cka(x, normal(7, 2)) == pytest.approx(cka(x[:, 1:], normal(7, 2)), abs=1e-12)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_both_sides_are_compared_on_the_first_ones_device():
    x, y = torch.tensor(normal(30, 5)), torch.tensor(normal(30, 4, seed=1))
    assert metrics.cka(x.cuda(), y) == pytest.approx(metrics.cka(x, y.cuda()), abs=1e-12)
