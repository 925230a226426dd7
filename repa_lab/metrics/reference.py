"""Files of statistics: the lab's own, which say what they were computed with, and those that others publish."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from repa_lab.metrics.arrays import Array
from repa_lab.metrics.frechet import Statistics

# What the statistics in a published reference batch of ADM (guided-diffusion's VIRTUAL_*.npz) are of, in the lab's
# words.
_ADM = {"extractor": "inception", "preprocessing": "tf1-bilinear-299"}
_SPATIAL = {"mu": "mu_s", "sigma": "sigma_s"}


class StatisticsError(ValueError):
    """A file holds no statistics, or others than are asked for: one line with the file, what is wrong and what to do."""


def write_statistics(path: Path, found: Statistics, identity: Mapping[str, str]) -> None:
    """Write ``mu``, ``sigma``, ``count`` and the words of what they are as npz; whole or not is the caller's part.

    Args:
        path: where, by any name.
        found: the statistics.
        identity: what they are: extractor, weights, preprocessing, layer, source.
    """
    with path.open("wb") as file:
        held: dict[str, Any] = {"mu": found.mu, "sigma": found.sigma, "count": found.count, **identity}
        np.savez(file, **held)


def read_statistics(
    path: Path, identity: Mapping[str, str], width: int | None = None, spatial: bool = False
) -> Statistics:
    """Read statistics, the lab's own, or ``mu`` and ``sigma`` as ADM, pytorch-fid and torch-fidelity's forks publish
    them.

    Args:
        path: an npz file.
        identity: what they must be. A word that the file does not say is taken on trust; ADM's are known to be
            Inception's.
        width: features there must be, or None.
        spatial: whether those of sFID are wanted of a file of ADM's, ``mu_s`` and ``sigma_s``.

    Raises:
        StatisticsError: there is no such file, it holds something else, or statistics of something else.
    """
    held = _arrays(path)
    is_adm = "mu_s" in held
    named = _SPATIAL if is_adm and spatial else {key: key for key in _SPATIAL}
    if missing := [name for name in named.values() if name not in held]:
        raise StatisticsError(f"'{path}' has no {' and no '.join(missing)}: give an npz file with mu and sigma")
    _require_same(path, {**held, **(_ADM if is_adm else {})}, identity)
    mu, sigma, count = (_real(path, name, held.get(name, 0)) for name in (*named.values(), "count"))
    if count.size != 1:
        raise StatisticsError(f"'{path}' has counts {count.shape}: give one number of images, or none")
    found = Statistics(mu, sigma, int(count.item()))
    _require_sound(path, found, width, "count" in held)
    return found


def _real(path: Path, name: str, value: Any) -> Array:
    array = np.asarray(value)
    if array.dtype.kind not in "fiu":
        raise StatisticsError(f"'{path}' has {name} of {array.dtype}: give real numbers")
    return array.astype(np.float64)


def _arrays(path: Path) -> dict[str, Any]:
    """What a file holds but for its images, which may be gigabytes."""
    if not path.is_file():
        raise StatisticsError(f"no file '{path}'")
    if not zipfile.is_zipfile(path):  # which numpy would take for a pickle
        raise StatisticsError(f"'{path}' is no npz file of arrays, or cut short; get it anew")
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files if name != "arr_0"}
    except Exception as error:  # a damaged file can raise anything
        raise StatisticsError(
            f"'{path}' is no npz file of arrays: {' '.join(str(error).split())}; get it anew"
        ) from None


def _require_same(path: Path, held: Mapping[str, Any], wanted: Mapping[str, str]) -> None:
    said = {name: str(held[name]) for name in wanted if name in held}
    if differing := [f"{name} {value}, not {wanted[name]}" for name, value in said.items() if value != wanted[name]]:
        what = " and ".join(differing)
        raise StatisticsError(f"'{path}' has statistics of {what}: compute them anew, or use the extractor they are of")


def _require_sound(path: Path, found: Statistics, width: int | None, is_counted: bool) -> None:
    mu, sigma = found.mu, found.sigma
    if mu.ndim != 1 or sigma.shape != 2 * mu.shape:
        raise StatisticsError(f"'{path}' has mu {mu.shape} and sigma {sigma.shape}; allowed: (d,) and (d, d)")
    if width not in (None, len(mu)):
        raise StatisticsError(
            f"'{path}' has {len(mu)} features and the extractor {width}: compute them with this extractor"
        )
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise StatisticsError(f"'{path}' has statistics that are not finite: compute them anew")
    if not np.allclose(sigma, sigma.T, rtol=1e-5, atol=1e-6 * np.abs(sigma).max()) or (sigma.diagonal() < 0).any():
        what = "a sigma that is no covariance: it is not symmetric, or has variances below 0"
        raise StatisticsError(f"'{path}' has {what}; compute it anew")
    if is_counted and found.count < 2:
        raise StatisticsError(f"'{path}' has statistics of {found.count} images: compute them of two or more")
