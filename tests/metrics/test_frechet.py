from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest
import torch
import torch_fidelity
from scipy.linalg import sqrtm
from torch.utils.data import Dataset
from torch_fidelity.metric_fid import fid_statistics_to_metric

from repa_lab.metrics import Statistics, frechet_distance, statistics
from repa_lab.metrics.extractor import Extractor
from repa_lab.metrics.protocol import EXTRACTORS
from repa_lab.metrics.quality import Moments


def features(count: int, dim: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((count, dim)) @ rng.standard_normal((dim, dim)) + rng.standard_normal(dim)


def by_definition(a: np.ndarray, b: np.ndarray) -> float:
    """``|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))`` with SciPy's matrix square root."""
    mean = a.mean(axis=0) - b.mean(axis=0)
    first, second = ((x - x.mean(axis=0)).T @ (x - x.mean(axis=0)) / (len(x) - 1) for x in (a, b))
    return float(mean @ mean + np.trace(first + second - 2 * sqrtm(first @ second).real))


def distance(a: np.ndarray, b: np.ndarray) -> float:
    first, second = statistics(a), statistics(b)
    return frechet_distance(first.mu, first.sigma, second.mu, second.sigma)


def test_two_gaussians_in_the_plane():
    # 1 for the means, and (2 - 1)^2 for the standard deviations along each of two axes.
    assert frechet_distance(np.zeros(2), np.eye(2), np.array([1.0, 0]), 4 * np.eye(2)) == pytest.approx(3, abs=1e-12)


@pytest.mark.parametrize("sigma", [0.0, 0.5, 3.0])
def test_on_a_line(sigma):
    # (mu1 - mu2)^2 + (sigma1 - sigma2)^2
    found = frechet_distance(np.array([2.0]), np.array([[sigma**2]]), np.array([-1.0]), np.array([[1.0]]))
    assert found == pytest.approx(9 + (sigma - 1) ** 2, abs=1e-7)


def test_covariances_that_do_not_commute():
    a, b = np.array([[2.0, 1.0], [1.0, 1.0]]), np.array([[1.0, 0.0], [0.0, 3.0]])
    # For 2x2, tr (AB)^(1/2) = sqrt(tr AB + 2 sqrt(det AB)); tr AB = 5, det AB = 3.
    expected = 3 + 4 - 2 * np.sqrt(5 + 2 * np.sqrt(3))
    assert frechet_distance(np.zeros(2), a, np.zeros(2), b) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("dim", [1, 3, 40])
def test_agrees_with_the_matrix_square_root(dim):
    a, b = features(200, dim, 0), features(150, dim, 1)
    assert distance(a, b) == pytest.approx(by_definition(a, b), rel=1e-9)


def from_features(a: np.ndarray, b: np.ndarray) -> float:
    """Without covariances: the trace of the root is the sum of the singular values of ``A B^T``, A and B centred and scaled."""
    mean = a.mean(axis=0) - b.mean(axis=0)
    a, b = ((x - x.mean(axis=0)) / np.sqrt(len(x) - 1) for x in (a, b))
    return float(mean @ mean + (a**2).sum() + (b**2).sum() - 2 * np.linalg.svd(a @ b.T, compute_uv=False).sum())


# Samples of either side, and features.
SHAPES = [(200, 150, 40), (41, 300, 40), (30, 20, 64), (10, 300, 64), (300, 10, 64), (2, 2, 64)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_singular_covariances_cost_no_digits(shape):
    a, b = features(shape[0], shape[2], 0), features(shape[1], shape[2], 1)
    assert distance(a, b) == pytest.approx(from_features(a, b), rel=1e-12)
    assert distance(b, a) == pytest.approx(from_features(a, b), rel=1e-12)


def test_a_spectrum_over_many_orders_costs_no_digits():
    rng = np.random.default_rng(0)
    axes = np.linalg.qr(rng.standard_normal((256, 256)))[0]
    a, b = (rng.standard_normal((900, 256)) * np.exp(-30 * np.arange(256) / 256) @ axes for _ in range(2))
    assert distance(a, b) == pytest.approx(from_features(a, b), rel=1e-9)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_torch_fidelitys_number(shape):
    first, second = statistics(features(shape[0], shape[2], 0)), statistics(features(shape[1], shape[2], 1))
    sides = ({"mu": one.mu, "sigma": one.sigma} for one in (first, second))
    theirs = fid_statistics_to_metric(*sides, verbose=False)["frechet_inception_distance"]
    assert frechet_distance(first.mu, first.sigma, second.mu, second.sigma) == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize("shape", [(200, 40), (20, 64), (500, 3)], ids=str)
def test_of_a_set_to_itself_is_0(shape):
    a = features(*shape, 0)
    assert abs(distance(a, a)) < 1e-12 * np.trace(statistics(a).sigma)


def test_is_symmetric_and_moves_with_the_mean():
    a, b = features(100, 8, 0), features(100, 8, 1)
    assert distance(a, b) == pytest.approx(distance(b, a), rel=1e-10)
    shift = np.arange(8.0)
    assert distance(a, a + shift) == pytest.approx(shift @ shift, rel=1e-9)


def test_does_not_depend_on_the_axes():
    a, b = features(100, 8, 0), features(100, 8, 1)
    rotation = np.linalg.qr(np.random.default_rng(2).standard_normal((8, 8)))[0]
    assert distance(a @ rotation, b @ rotation) == pytest.approx(distance(a, b), rel=1e-9)
    assert distance(3 * a, 3 * b) == pytest.approx(9 * distance(a, b), rel=1e-9)


def test_statistics_are_unbiased():
    found = statistics(np.array([[1.0, 2.0], [3.0, 2.0], [2.0, 8.0]]))
    assert found.mu.tolist() == [2.0, 4.0]
    assert found.sigma.tolist() == [[1.0, 0.0], [0.0, 12.0]]
    assert found.count == 3


def test_statistics_of_one_feature_are_matrices():
    found = statistics(np.array([[1.0], [3.0]]))
    assert (found.mu.tolist(), found.sigma.tolist()) == ([2.0], [[2.0]])


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_statistics_by_batches_are_those_of_the_whole(offset):
    a = features(157, 12, 0) + offset
    moments = Moments(12)
    for part in np.split(a, [1, 1, 40, 41, 150]):
        moments.add(part)
    found, expected = moments.statistics, np.cov(a, rowvar=False)
    assert found.count == 157
    np.testing.assert_allclose(found.mu, a.mean(axis=0), rtol=1e-13)
    np.testing.assert_allclose(found.sigma, expected, atol=1e-9 * np.trace(expected))


@pytest.mark.parametrize("counts", [(60, 90, 7), (157, 0, 0), (0, 0, 157)], ids=str)
def test_statistics_of_several_processes_are_those_of_the_whole(counts):
    """Three processes that sum in threads, of which some may have drawn nothing."""
    a = features(157, 12, 0) + 1e3
    waiting, tensors = Barrier(3), [torch.empty(0)] * 3

    def run(rank: int) -> Statistics:
        def total(values: torch.Tensor) -> torch.Tensor:
            tensors[rank] = values
            waiting.wait()
            summed = tensors[0] + tensors[1] + tensors[2]
            waiting.wait()
            return summed

        moments = Moments(12)
        moments.add(np.split(a, np.cumsum(counts)[:-1])[rank])
        moments.merge(total)
        return moments.statistics

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(run, range(3)))
    expected = np.cov(a, rowvar=False)
    for one in found:
        assert one.count == 157
        np.testing.assert_allclose(one.mu, a.mean(axis=0), rtol=1e-13)
        np.testing.assert_allclose(one.sigma, expected, atol=1e-11 * np.trace(expected))


def test_batches_of_other_widths_are_refused():
    with pytest.raises(ValueError, match=r"need features \(n, 3\), got shape \(2, 4\)"):
        Moments(3).add(np.zeros((2, 4)))


def test_covariances_of_a_few_samples_have_no_more_ranks():
    # What reports say of such distances: n vectors span n - 1 directions about their mean.
    for count in (2, 3, 4):
        assert np.linalg.matrix_rank(statistics(features(count, 3, 0)).sigma) == min(count - 1, 3)


def test_statistics_that_do_not_fit_are_refused():
    one, two = (np.zeros(1), np.eye(1)), (np.zeros(2), np.eye(2))
    for sides in (
        (*one, *two),
        (np.zeros(2), np.eye(1), *two),
        (np.zeros((2, 1)), np.eye(2), *two),
        (np.zeros(0), np.eye(0)) * 2,
    ):
        with pytest.raises(ValueError, match=r"need \(d,\), \(d, d\)"):
            frechet_distance(*sides)
    with pytest.raises(ValueError, match="not finite"):
        frechet_distance(np.array([np.nan, 0]), np.eye(2), *two)


@pytest.mark.parametrize("array", [np.zeros((1, 3)), np.zeros((0, 3)), np.zeros(5)])
def test_too_few_vectors_are_refused(array):
    with pytest.raises(ValueError, match=r"need features \(n >= 2, d\)"):
        statistics(array)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_features_that_are_not_finite_are_refused(value):
    array = features(4, 3, 0)
    array[2, 1] = value
    with pytest.raises(ValueError, match="not finite"):
        statistics(array)


class Images(Dataset):
    """Random uint8 images ``(3, 64, 64)``, smooth or rough, so that the two sets differ."""

    def __init__(self, count: int, side: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        small = torch.randint(0, 256, (count, 3, side, side), generator=generator, dtype=torch.uint8)
        self.pixels = small.repeat_interleave(64 // side, -1).repeat_interleave(64 // side, -2)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.pixels[index]


def test_equals_torch_fidelitys_fid_of_the_same_images():
    generated, real = Images(24, 8, seed=0), Images(20, 32, seed=1)
    theirs = torch_fidelity.calculate_metrics(
        input1=generated,
        input2=real,
        fid=True,
        feature_extractor=EXTRACTORS["efficientnet_lite0"].registered,
        cuda=False,
        cache=False,
        verbose=False,
        batch_size=64,
        save_cpu_ram=True,
    )["frechet_inception_distance"]
    extractor = Extractor("efficientnet_lite0", None, torch.device("cpu"))
    ours = distance(*(extractor.features(side.pixels)["1280"] for side in (generated, real)))
    assert ours == pytest.approx(theirs, rel=1e-6)
    assert ours > 1
