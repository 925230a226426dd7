"""What the Frechet distance costs against torch-fidelity's eigenvalues, SciPy's matrix square root and symmetric roots.

Prints ratios; asserts that the numbers agree, nothing of time.
"""

from __future__ import annotations

import numpy as np
import pytest
from scipy.linalg import sqrtm
from threadpoolctl import threadpool_limits
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

from repa_lab.metrics import Statistics, frechet_distance, statistics
from tests.benchmarks.ratios import ratios, show

pytestmark = pytest.mark.bench


def ours(a: Statistics, b: Statistics) -> float:
    return frechet_distance(a.mu, a.sigma, b.mu, b.sigma)


def eigenvalues_of_the_product(a: Statistics, b: Statistics) -> float:
    sides = ({"mu": one.mu, "sigma": one.sigma} for one in (a, b))
    return float(fid_statistics_to_metric(*sides, verbose=False)[KEY_METRIC_FID])


def matrix_square_root(a: Statistics, b: Statistics) -> float:
    return without_root(a, b) - 2 * float(np.trace(sqrtm(a.sigma @ b.sigma)).real)


def symmetric_roots(a: Statistics, b: Statistics) -> float:
    """The eigenvalues of ``S1^(1/2) S2 S1^(1/2)``, the root from an eigendecomposition."""
    values, vectors = np.linalg.eigh(a.sigma)
    root = vectors * np.sqrt(values.clip(0))
    return without_root(a, b) - 2 * float(np.sqrt(np.linalg.eigvalsh(root.T @ b.sigma @ root).clip(0)).sum())


def without_root(a: Statistics, b: Statistics) -> float:
    return float((a.mu - b.mu) @ (a.mu - b.mu) + np.trace(a.sigma) + np.trace(b.sigma))


def pair(count: int, width: int) -> tuple[Statistics, Statistics]:
    """Of features that are correlated and of unequal spread, as a network's are."""
    rng = np.random.default_rng(0)
    mix = rng.standard_normal((width, width)) / np.sqrt(width) + np.diag(np.exp(-3 * np.arange(width) / width))
    return statistics(rng.standard_normal((count, width)) @ mix), statistics(
        rng.standard_normal((count, width)) @ mix + 0.1
    )


OTHERS = [eigenvalues_of_the_product, matrix_square_root, symmetric_roots]


@pytest.mark.parametrize("shape", [(2000, 768), (300, 768), (4000, 2048)], ids=str)
@pytest.mark.parametrize("other", OTHERS, ids=lambda other: other.__name__)
def test_frechet_distance(other, shape):
    a, b = pair(*shape)
    found: dict[str, float] = {}
    with threadpool_limits(1):  # NumPy's and SciPy's threads wait for each other, and waiting is CPU time
        first, second = (lambda way=way: found.update({way.__name__: way(a, b)}) for way in (other, ours))
        measured = ratios(first, second, rounds=5 if shape[1] < 1000 else 1)
    assert found["ours"] == pytest.approx(found[other.__name__], rel=1e-6)
    apart = abs(found["ours"] / found[other.__name__] - 1)
    show(f"{other.__name__} / frechet_distance, n, d = {shape}", measured, f"apart by {apart:.0e}")
