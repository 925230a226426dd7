from __future__ import annotations

import numpy as np
import pytest
import torch
import torch_fidelity
from scipy.linalg import sqrtm
from torch.utils.data import Dataset

from repa_lab.encoders.extractor import EXTRACTORS, Extractor
from repa_lab.metrics import frechet_distance, statistics


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


def test_of_a_set_to_itself_is_0():
    a = features(200, 40, 0)
    assert distance(a, a) == pytest.approx(0, abs=1e-6)


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


@pytest.mark.parametrize("array", [np.zeros((1, 3)), np.zeros((0, 3)), np.zeros(5)])
def test_too_few_vectors_are_refused(array):
    with pytest.raises(ValueError, match="at least two feature vectors"):
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
        feature_extractor=EXTRACTORS["efficientnet_lite0"][0],
        cuda=False,
        cache=False,
        verbose=False,
        batch_size=64,
        save_cpu_ram=True,
    )["frechet_inception_distance"]
    extractor = Extractor("efficientnet_lite0", None, torch.device("cpu"))
    ours = distance(extractor(generated.pixels), extractor(real.pixels))
    assert ours == pytest.approx(theirs, rel=1e-6)
    assert ours > 1
