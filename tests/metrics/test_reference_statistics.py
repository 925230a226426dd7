from __future__ import annotations

import numpy as np
import pytest

from repa_lab.metrics import statistics
from repa_lab.metrics.reference import StatisticsError, read_statistics, write_statistics

INCEPTION = {"extractor": "inception", "weights": "67ab", "preprocessing": "tf1-bilinear-299", "layer": "2048"}
FEATURES = np.random.default_rng(0).standard_normal((50, 6))
FOUND = statistics(FEATURES)


@pytest.fixture
def ours(tmp_path):
    write_statistics(tmp_path / "ours.npz", FOUND, {**INCEPTION, "source": "abc"})
    return tmp_path / "ours.npz"


@pytest.fixture
def adm(tmp_path):
    """A reference batch as guided-diffusion publishes it: statistics of all images, and some of the images."""
    spatial = statistics(FEATURES[:, :4] + 1)
    path = tmp_path / "VIRTUAL_x.npz"
    images = np.zeros((3, 8, 8, 3), np.uint8)
    held = {"mu": FOUND.mu, "sigma": FOUND.sigma, "mu_s": spatial.mu, "sigma_s": spatial.sigma}
    np.savez(path, arr_0=images, **held)
    return path


def refused(match: str, path, identity=INCEPTION, width=None, spatial=False) -> None:
    with pytest.raises(StatisticsError, match=match) as caught:
        read_statistics(path, identity, width, spatial)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_what_is_written_is_read(ours):
    found = read_statistics(ours, INCEPTION, 6)
    assert np.array_equal(found.mu, FOUND.mu) and np.array_equal(found.sigma, FOUND.sigma)
    assert found.count == 50
    with np.load(ours, allow_pickle=False) as stored:
        assert {name: str(stored[name]) for name in (*INCEPTION, "source")} == {**INCEPTION, "source": "abc"}


def test_adms_statistics_are_inceptions_pooled_and_spatial_ones(adm):
    pooled, spatial = (
        read_statistics(adm, INCEPTION, width, is_spatial) for width, is_spatial in ((6, False), (4, True))
    )
    assert np.array_equal(pooled.mu, FOUND.mu) and np.array_equal(pooled.sigma, FOUND.sigma)
    assert np.allclose(spatial.mu, FOUND.mu[:4] + 1) and np.allclose(spatial.sigma, FOUND.sigma[:4, :4])
    assert pooled.count == 0  # the file does not say of how many images


def test_statistics_alone_are_taken_on_trust(tmp_path):
    np.savez(tmp_path / "fid_stats.npz", mu=FOUND.mu.astype(np.float32), sigma=FOUND.sigma)
    found = read_statistics(tmp_path / "fid_stats.npz", INCEPTION, 6)
    assert found.mu.dtype == np.float64
    np.testing.assert_allclose(found.mu, FOUND.mu, rtol=1e-6)


@pytest.mark.parametrize(
    ("word", "value"),
    [("extractor", "dinov2_vitl14"), ("weights", "0000"), ("preprocessing", "x"), ("layer", "spatial")],
)
def test_statistics_of_something_else(ours, word, value):
    refused(
        f"has statistics of {word} {INCEPTION[word]}, not {value}: compute them again", ours, {**INCEPTION, word: value}
    )


def test_adms_statistics_for_another_extractor(adm):
    match = "has statistics of extractor inception, not dinov2_vitl14 and preprocessing tf1-bilinear-299, not bicubic"
    refused(match, adm, {"extractor": "dinov2_vitl14", "preprocessing": "bicubic"})


def test_another_width(ours):
    refused("has 6 features and the extractor 2048: compute them with this extractor", ours, width=2048)


@pytest.mark.parametrize(
    ("held", "match"),
    [
        ({"mu": FOUND.mu}, "has no sigma: give an npz file with mu and sigma"),
        ({"arr_0": np.zeros((2, 8, 8, 3), np.uint8)}, "has no mu and no sigma"),
        ({"mu_s": FOUND.mu, "sigma_s": FOUND.sigma}, "has no mu and no sigma"),
        ({"mu": FOUND.mu, "sigma": FOUND.sigma[:5]}, r"has mu \(6,\) and sigma \(5, 6\); allowed: \(d,\) and \(d, d\)"),
        ({"mu": FOUND.mu * np.nan, "sigma": FOUND.sigma}, "not finite"),
        ({"mu": FOUND.mu, "sigma": FOUND.sigma * np.inf}, "not finite"),
        ({"mu": FOUND.mu, "sigma": FOUND.sigma, "count": 1}, "of 1 images: compute them of two or more"),
        (
            {"mu": FOUND.mu, "sigma": FOUND.sigma, "count": [9, 9]},
            r"has statistics of \[9 9\] images: compute them of two or more",
        ),
        ({"mu": FOUND.mu.astype(str), "sigma": FOUND.sigma}, "has mu of <U[0-9]+: give real numbers"),
        ({"mu": FOUND.mu, "sigma": FOUND.sigma + 1j}, "has sigma of complex128: give real numbers"),
        ({"mu": FOUND.mu, "sigma": -FOUND.sigma}, "has a sigma that is no covariance: .*variances below 0"),
        (
            {"mu": FOUND.mu, "sigma": FOUND.sigma + np.eye(6, k=1)},
            "has a sigma that is no covariance: it is not symmetric",
        ),
    ],
)
def test_what_is_no_file_of_statistics(tmp_path, held, match):
    np.savez(tmp_path / "x.npz", **held)
    refused(match, tmp_path / "x.npz")


def test_spatial_statistics_that_are_not_there(adm, tmp_path):
    np.savez(tmp_path / "x.npz", mu=FOUND.mu, sigma=FOUND.sigma, mu_s=FOUND.mu)
    refused("has no sigma_s", tmp_path / "x.npz", spatial=True)


def test_no_file_and_a_damaged_one(ours, tmp_path):
    refused("no file", tmp_path / "none.npz")
    (tmp_path / "cut.npz").write_bytes(ours.read_bytes()[:200])
    refused("is not an npz file of arrays, or is cut short; download it again", tmp_path / "cut.npz")
    # Only the sum over a member tells that a bit of it has turned.
    turned = bytearray(ours.read_bytes())
    turned[ours.read_bytes().index(FOUND.sigma.tobytes()) + 5] ^= 1
    (tmp_path / "turned.npz").write_bytes(turned)
    refused("is not an npz file of arrays: Bad CRC-32 .*; download it again", tmp_path / "turned.npz")
    np.savez(tmp_path / "code.npz", mu=np.array([{}], dtype=object), sigma=FOUND.sigma)
    refused("is not an npz file of arrays: .*allow_pickle", tmp_path / "code.npz")
