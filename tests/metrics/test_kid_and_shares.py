from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics.pairwise import polynomial_kernel
from sklearn.neighbors import NearestNeighbors

from repa_lab.metrics import inception_score, kid, precision_recall
from repa_lab.metrics.quality import kid_protocol


def features(count: int, dim: int = 16, seed: int = 0, shift: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, dim)) + shift


def unbiased_mmd(x: np.ndarray, y: np.ndarray) -> float:
    """Binkowski et al. (1801.01401), Eq. 4: means over different items on each side, less twice the mean between sides."""
    xx, yy, xy = polynomial_kernel(x, degree=3), polynomial_kernel(y, degree=3), polynomial_kernel(x, y, degree=3)
    m, n = len(x), len(y)
    return (xx.sum() - xx.trace()) / (m * (m - 1)) + (yy.sum() - yy.trace()) / (n * (n - 1)) - 2 * xy.mean()


class TestKID:
    def test_is_the_unbiased_estimate_when_a_subset_is_everything(self):
        x, y = features(60), features(60, seed=1, shift=0.5)
        found = kid(x, y)
        assert found.value == pytest.approx(unbiased_mmd(x, y), rel=1e-12)
        assert found.std < 1e-12

    def test_by_a_kernel_written_out(self):
        x, y = np.array([[1.0, 0.0], [0.0, 2.0]]), np.array([[1.0, 1.0], [2.0, 0.0]])
        # (x . y / 2 + 1)^3: x1x2 gives 1; y1y2 gives (1 + 1)^3 = 8; between sides 1.5^3, 2^3, 2^3 and 1.
        assert kid(x, y).value == pytest.approx(1 + 8 - 2 * (3.375 + 8 + 8 + 1) / 4, rel=1e-12)

    def test_is_a_mean_over_subsets_of_the_smaller_side(self):
        x, y = features(400), features(150, seed=1, shift=0.5)
        found = kid(x, y)
        assert kid_protocol(400, 150) == "100x150"
        assert found.std > 0
        assert abs(found.value - unbiased_mmd(x, y)) < 4 * found.std / np.sqrt(100) + found.std

    def test_subsets_are_at_most_a_thousand(self):
        assert (kid_protocol(50_000, 10_000), kid_protocol(999, 50_000)) == ("100x1000", "100x999")

    def test_of_one_distribution_has_both_signs(self):
        values = [kid(features(50, seed=2 * i), features(50, seed=2 * i + 1)).value for i in range(20)]
        assert min(values) < 0 < max(values)
        assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(20)

    def test_tensors_and_arrays_are_alike(self):
        x, y = torch.randn(20, 5), torch.randn(20, 5)
        assert kid(x, y) == kid(x.numpy(), y.numpy())


class TestInceptionScore:
    def test_confident_and_balanced_is_the_number_of_classes(self):
        # Every part has about as many of either class as of the other, but rarely exactly.
        logits = np.tile(np.array([[50.0, -50.0], [-50.0, 50.0]]), (500, 1))
        found = inception_score(logits)
        assert found.value == pytest.approx(2, rel=0.02)
        assert found.value < 2

    def test_a_part_of_one_sample_says_nothing(self):
        # One sample a part: p(y) is p(y|x), and the score 1, whatever the sample.
        assert inception_score(features(10, 7)).value == pytest.approx(1, rel=1e-12)

    def test_undecided_is_1(self):
        assert inception_score(np.zeros((40, 12))).value == pytest.approx(1, rel=1e-12)

    def test_one_class_only_is_1(self):
        assert inception_score(np.tile([60.0, 0, 0], (30, 1))).value == pytest.approx(1, rel=1e-12)

    def test_by_the_definition(self):
        logits = 3 * features(100, 6)
        order = np.random.RandomState(2020).permutation(100)
        p = np.exp(logits[order]) / np.exp(logits[order]).sum(axis=1, keepdims=True)
        scores = [np.exp((part * np.log(part / part.mean(axis=0))).sum(axis=1).mean()) for part in np.split(p, 10)]
        found = inception_score(logits)
        assert (found.value, found.std) == (
            pytest.approx(np.mean(scores), rel=1e-12),
            pytest.approx(np.std(scores), rel=1e-9),
        )


def share_within(samples: np.ndarray, manifold: np.ndarray, k: int = 3) -> float:
    """The share of samples that lie in the ball of some vector up to its k-th neighbour, with scikit-learn's neighbours."""
    radii = NearestNeighbors(n_neighbors=k + 1).fit(manifold).kneighbors(manifold)[0][:, k]
    distances = np.linalg.norm(samples[:, None] - manifold[None], axis=-1)
    return float((distances <= radii).any(axis=1).mean())


class TestPrecisionRecall:
    @pytest.mark.parametrize("sizes", [(40, 40), (30, 90), (4, 50)])
    def test_by_scikit_learns_neighbours(self, sizes):
        generated, real = features(sizes[0], 5, shift=0.7), features(sizes[1], 5, seed=1)
        found = precision_recall(generated, real)
        assert found.precision == pytest.approx(share_within(generated, real), abs=1e-6)
        assert found.recall == pytest.approx(share_within(real, generated), abs=1e-6)
        assert 0 < found.precision < 1 or sizes[0] == 4

    def test_part_of_what_is_real_is_precise_and_incomplete(self):
        # Two clusters, of which one is generated.
        real = np.concatenate([features(30, 4), features(30, 4, seed=1, shift=100)])
        found = precision_recall(real[:30], real)
        assert (found.precision, found.recall) == (1, pytest.approx(0.5))
        swapped = precision_recall(real, real[:30])
        assert (swapped.precision, swapped.recall) == (pytest.approx(0.5), 1)

    def test_of_a_set_with_itself_is_1(self):
        x = features(20)
        assert precision_recall(x, x) == precision_recall(x, x.copy())
        assert (precision_recall(x, x).precision, precision_recall(x, x).recall) == (1, 1)

    def test_of_sets_far_apart_is_0(self):
        found = precision_recall(features(20), features(20, shift=1e3))
        assert (found.precision, found.recall) == (0, 0)


class TestRefusals:
    @pytest.mark.parametrize("measure", [kid, precision_recall])
    def test_features_of_two_extractors(self, measure):
        with pytest.raises(ValueError, match="have 16 and 12 features: use one extractor"):
            measure(features(10), features(10, 12))

    @pytest.mark.parametrize(("measure", "least"), [(kid, 2), (precision_recall, 4)])
    def test_too_few_samples(self, measure, least):
        measure(features(least), features(least))
        with pytest.raises(ValueError, match=rf"generated: need features \(n >= {least}, d\)"):
            measure(features(least - 1), features(10))
        with pytest.raises(ValueError, match=rf"real: need features \(n >= {least}, d\)"):
            measure(features(10), features(least - 1))

    def test_too_few_samples_for_ten_parts(self):
        with pytest.raises(
            ValueError, match=r"logits: need features \(n >= 10, d\), one pooled vector an item, got \(9, 3\)"
        ):
            inception_score(features(9, 3))

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_what_is_not_finite(self, value):
        broken = features(12)
        broken[3, 0] = value
        for measure in (
            lambda: kid(broken, features(12)),
            lambda: precision_recall(features(12), broken),
            lambda: inception_score(broken),
        ):
            with pytest.raises(ValueError, match=r"not finite .*index 3"):
                measure()
