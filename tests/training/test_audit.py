"""The samples behind a number, as others' evaluators take them."""

import numpy as np
import pytest
import torch

from repa_lab.encoders.extractor import Extractor
from repa_lab.metrics import frechet_distance, statistics
from repa_lab.runs import RunDirectory
from repa_lab.training.audit import AuditError, write_samples
from repa_lab.training.trained import NoWeightsError
from tests.training.conftest import make_run, run_to_end

USUAL, FULL = "frechet:efficientnet_lite0@16/ode2", "frechet:efficientnet_lite0@24/sde3-random"


@pytest.fixture(scope="module")
def run(cache, tmp_path_factory):
    full = {"samples": 24, "sampler": {"type": "sde", "steps": 3}, "labels": "random"}
    made = make_run(**{"evaluate.full": full, "evaluate.batch_size": 7})
    return run_to_end(made, RunDirectory(tmp_path_factory.mktemp("runs") / "run"), cache)


@pytest.mark.parametrize(("metric", "expected", "count"), [(None, FULL, 24), (USUAL, USUAL, 16)])
def test_the_number_can_be_computed_again_from_the_file(run, cache, tmp_path, images, metric, expected, count):
    told = []
    step, name = write_samples(run, tmp_path / "a.npz", cache, metric, progress=lambda done, total: told.append((done, total)))
    assert (step, name, told[-1]) == (5, expected, (count, count))
    pixels = np.load(tmp_path / "a.npz")["arr_0"]
    assert (pixels.shape, pixels.dtype) == ((count, 8, 8, 3), np.uint8)
    extractor = Extractor("efficientnet_lite0", None, torch.device("cpu"))
    drawn = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())
    found, real = (
        statistics(extractor.features(side).of("frechet")) for side in (drawn, images.source.read(images.split.train.tolist()))
    )
    value = next(row[expected] for row in reversed(run.rows()) if expected in row)
    assert frechet_distance(found.mu, found.sigma, real.mu, real.sigma) == pytest.approx(value, rel=1e-6)


def test_what_cannot_be_had_is_said_and_nothing_is_written(run, cache, tmp_path):
    with pytest.raises(AuditError, match=f"measures no 'fid'; it measures: {USUAL}, {FULL}"):
        write_samples(run, tmp_path / "a.npz", cache, "fid")
    with pytest.raises(NoWeightsError, match="unknown weights 'best'; allowed: ema, last"):
        write_samples(run, tmp_path / "a.npz", cache, weights="best")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "a.npz").touch()
    with pytest.raises(AuditError, match="exists; name a new file"):
        write_samples(run, tmp_path / "a.npz", cache)
