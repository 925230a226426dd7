"""The samples behind a number, as others' evaluators take them."""

import ast
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from repa_lab.metrics import frechet_distance, statistics
from repa_lab.metrics.extractor import Extractor
from repa_lab.runs import RunDirectory, State
from repa_lab.training.checkpoint import NoWeightsError
from repa_lab.training.data import open_images
from repa_lab.training.export import ExportError, write_real, write_samples
from repa_lab.training.loop import train
from tests.training.conftest import make_options, make_run, run_to_end, stop_after

USUAL, FULL = "frechet:efficientnet_lite0@16/ode2", "frechet:efficientnet_lite0@24/sde3-random"


@pytest.fixture(scope="module")
def run(cache, tmp_path_factory):
    full = {"samples": 24, "sampler": {"type": "sde", "steps": 3}, "labels": "random"}
    made = make_run(**{"evaluate.full": full, "evaluate.batch_size": 7})
    return run_to_end(made, RunDirectory(tmp_path_factory.mktemp("runs") / "run"), cache)


@pytest.mark.parametrize(("metric", "expected", "count"), [(None, FULL, 24), (USUAL, USUAL, 16)])
def test_the_number_can_be_computed_again_from_the_file(run, cache, tmp_path, images, metric, expected, count):
    told = []
    found = write_samples(
        run, tmp_path / "a.npz", cache, metric, progress=lambda done, total: told.append((done, total))
    )
    value = next(row[expected] for row in reversed(run.rows()) if expected in row)
    assert (found, told[-1]) == ((5, expected, value), (count, count))
    pixels = np.load(tmp_path / "a.npz")["arr_0"]
    assert (pixels.shape, pixels.dtype) == ((count, 8, 8, 3), np.uint8)
    extractor = Extractor("efficientnet_lite0", None, torch.device("cpu"))
    assert write_real(run, tmp_path / "real.npz", cache) == len(images.split.train)
    both = (
        torch.from_numpy(one.transpose(0, 3, 1, 2).copy()) for one in (pixels, np.load(tmp_path / "real.npz")["arr_0"])
    )
    found, real = (statistics(extractor.features(side).of("frechet")) for side in both)
    assert frechet_distance(found.mu, found.sigma, real.mu, real.sigma) == pytest.approx(value, rel=1e-6)


def test_the_real_images_are_the_training_images_as_they_are_in_order(run, cache, tmp_path, images):
    told = []
    write_real(run, tmp_path / "real.npz", cache, lambda done, total: told.append((done, total)))
    found = np.load(tmp_path / "real.npz")["arr_0"]
    expected = images.source.read(images.split.train.tolist()).expand(-1, 3, -1, -1)
    assert np.array_equal(found.transpose(0, 3, 1, 2), expected.numpy())
    assert told[-1] == (1700, 1700)
    with pytest.raises(ExportError, match="exists; name a new file"):
        write_real(run, tmp_path / "real.npz", cache)


@pytest.mark.slow
def test_the_documents_recipe_gives_the_runs_numbers(cache, tmp_path):
    made = make_run(**{"evaluate.metrics": ["frechet", "kid", "precision_recall"], "evaluate.samples": 40})
    directory = run_to_end(made, RunDirectory(tmp_path / "run"), cache)
    value = write_samples(directory, tmp_path / "samples.npz", cache).value
    write_real(directory, tmp_path / "real.npz", cache)
    recipe = Path("docs/protocol.md").read_text(encoding="utf-8").partition("```python\n")[2].partition("```")[0]
    (tmp_path / "recipe.py").write_text(recipe)
    told = subprocess.run(
        [sys.executable, "recipe.py"], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout
    found = ast.literal_eval(told.splitlines()[-1])
    (row,) = (row for row in directory.rows() if "kernel:efficientnet_lite0@40/ode2" in row)
    # Of 40 vectors of 1,280 numbers torch-fidelity's own root loses half its digits.
    assert found["frechet_inception_distance"] == pytest.approx(value, rel=2e-6)
    assert found["kernel_inception_distance_mean"] == pytest.approx(row["kernel:efficientnet_lite0@40/ode2"], rel=1e-5)
    for name in ("precision", "recall"):
        assert found[name] == pytest.approx(row[f"{name}:efficientnet_lite0@40/ode2"])


def test_samples_that_were_not_measured_have_no_value(run, cache, tmp_path):
    assert write_samples(run, tmp_path / "last.npz", cache, USUAL, weights="last").value is None


@pytest.mark.parametrize(
    ("settings", "first", "second"),
    [({}, None, "bf16"), ({"evaluate.precision": "tf32", "evaluate.rounding": "truncate"}, "tf32", "tf32")],
)
def test_a_number_is_drawn_again_in_the_precision_it_was_measured_in(cache, tmp_path, settings, first, second):
    """Begun in float32, resumed in bfloat16: what was measured at the end was drawn in the latter, or as the spec says."""
    made, directory = make_run(**{"train.steps": 4, "evaluate.every": 2}, **settings), RunDirectory(tmp_path / "run")
    train(made, directory, make_options(), cache, should_stop=stop_after(2))
    assert directory.protocols[USUAL].get("precision") == first
    assert directory.protocols[USUAL].get("rounding") == settings.get("evaluate.rounding")
    assert train(made, directory, make_options(precision="bf16"), cache) is State.DONE
    assert directory.protocols[USUAL]["precision"] == second
    assert directory.provenance["options"]["precision"] == "fp32"
    found = write_samples(directory, tmp_path / "a.npz", cache)
    pixels = torch.from_numpy(np.load(tmp_path / "a.npz")["arr_0"].transpose(0, 3, 1, 2).copy())
    sides = (pixels, open_images(made.config.data, cache))
    extractor = Extractor("efficientnet_lite0", None, torch.device("cpu"))
    drawn = statistics(extractor.features(sides[0]).of("frechet"))
    real = statistics(extractor.features(sides[1].source.read(sides[1].split.train.tolist())).of("frechet"))
    # In float32 it would be off by 1e-4 and more.
    assert frechet_distance(drawn.mu, drawn.sigma, real.mu, real.sigma) == pytest.approx(found.value, rel=1e-6)


def test_what_cannot_be_had_is_said_and_nothing_is_written(run, cache, tmp_path):
    with pytest.raises(ExportError, match=f"measures no 'fid'; it measures: {USUAL}, {FULL}"):
        write_samples(run, tmp_path / "a.npz", cache, "fid")
    with pytest.raises(NoWeightsError, match="unknown weights 'best'; allowed: ema, last"):
        write_samples(run, tmp_path / "a.npz", cache, weights="best")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "a.npz").touch()
    with pytest.raises(ExportError, match="exists; name a new file"):
        write_samples(run, tmp_path / "a.npz", cache)
