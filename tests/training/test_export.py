"""What leaves repa-lab: the denoiser as others load it, and the samples behind a number."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from safetensors.torch import load_file

from repa_lab.metrics import frechet_distance, statistics
from repa_lab.metrics.extractor import Extractor
from repa_lab.models.sit import SiT, SiTConfig, SiTDown, SiTDownConfig
from repa_lab.runs import RunDirectory, State
from repa_lab.training.checkpoint import NoWeightsError
from repa_lab.training.export import ExportError, export_model, write_real, write_samples
from repa_lab.training.loop import train
from tests.rounding import FRECHET
from tests.training.conftest import SIT_DOWN, UNET, make_options, make_run, run_steps, run_to_end, stop_after, weights

REGULARIZED = {**UNET, "regularizer.type": "urepa"}


@pytest.fixture(scope="module")
def unet(cache, tmp_path_factory):
    directory = RunDirectory(tmp_path_factory.mktemp("runs") / "unet")
    return run_steps(make_run(**REGULARIZED, **{"train.ema": 0.5}), directory, cache)


@pytest.mark.parametrize("kind", ["ema", "last"])
def test_a_unet_loads_in_stock_diffusers_with_no_key_left_over(unet, tmp_path, kind, caplog):
    assert export_model(unet, tmp_path / "unet", kind) == 4
    model, info = UNet2DModel.from_pretrained(tmp_path / "unet", output_loading_info=True)
    assert {name: list(found) for name, found in info.items() if found} == {}
    assert not caplog.records
    held = weights(unet)
    prefix = {"ema": "ema:denoiser.net.", "last": "denoiser:net."}[kind]
    for name, value in model.state_dict().items():
        assert torch.equal(value, held[f"{prefix}{name}"]), name
    assert any(not torch.equal(held[f"ema:denoiser.net.{n}"], held[f"denoiser:net.{n}"]) for n in model.state_dict())


def test_it_computes_what_the_run_does(unet, tmp_path, images):
    from repa_lab.training.model import build_denoiser

    export_model(unet, tmp_path / "unet", "last")
    ours = build_denoiser(make_run(**REGULARIZED).config, images.input, 0).eval()
    ours.load_state_dict(
        {n.removeprefix("denoiser:"): v for n, v in weights(unet).items() if n.startswith("denoiser:")}
    )
    theirs = UNet2DModel.from_pretrained(tmp_path / "unet").eval()
    x, t, y = torch.randn(3, 1, 8, 8), torch.rand(3), torch.tensor([0, 4, 10])
    with torch.no_grad():
        assert torch.equal(ours(x, t, y), theirs(x, t * 1000, class_labels=y).sample)


def test_no_projector_is_in_what_is_exported(unet, tmp_path):
    assert any(name.startswith("regularizer:projectors") for name in weights(unet))
    assert any(name.startswith("ema:regularizer.projectors") for name in weights(unet))
    export_model(unet, tmp_path / "unet")
    names = [name for file in (tmp_path / "unet").glob("*.safetensors") for name in load_file(file)]
    assert names
    assert not [name for name in names if "projector" in name or "regularizer" in name]


def test_a_sit_is_rebuilt_from_its_config(cache, fresh, tmp_path):
    directory = run_steps(make_run(), fresh(), cache)
    export_model(directory, tmp_path / "sit", "last")
    config = json.loads((tmp_path / "sit" / "config.json").read_text())
    model = SiT(SiTConfig(**{**config, "input_size": tuple(config["input_size"])}))
    model.load_state_dict(load_file(tmp_path / "sit" / "model.safetensors"))
    held = {n.removeprefix("denoiser:"): v for n, v in weights(directory).items() if n.startswith("denoiser:")}
    exported = model.state_dict()
    assert torch.equal(
        exported.pop("pos_embed"), SiT.from_size("nano/2", 1, 8, 10).pos_embed
    )  # fixed, so in no checkpoint
    assert exported.keys() == held.keys()
    assert all(torch.equal(value, held[name]) for name, value in exported.items())


def test_a_sit_down_is_rebuilt_from_its_config(cache, fresh, tmp_path):
    directory = run_steps(make_run(**SIT_DOWN, **{"regularizer.type": "urepa"}), fresh(), cache)
    export_model(directory, tmp_path / "sit_down", "last")
    config = json.loads((tmp_path / "sit_down" / "config.json").read_text())
    shapes = {name: tuple(config[name]) for name in ("stages", "input_size")}
    model = SiTDown(SiTDownConfig(**{**config, **shapes}))
    model.load_state_dict(load_file(tmp_path / "sit_down" / "model.safetensors"))
    held = {n.removeprefix("denoiser:"): v for n, v in weights(directory).items() if n.startswith("denoiser:")}
    assert model.state_dict().keys() == held.keys()
    assert all(torch.equal(value, held[name]) for name, value in model.state_dict().items())


def test_what_cannot_be_exported_is_refused_and_nothing_is_written(unet, fresh, cache, tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "precious").touch()
    with pytest.raises(ExportError, match="used' is not empty; name a new folder"):
        export_model(unet, tmp_path / "used")
    with pytest.raises(NoWeightsError, match="unknown weights 'best'; allowed: ema, last"):
        export_model(unet, tmp_path / "new", "best")
    with pytest.raises(NoWeightsError, match="run run has no checkpoint yet"):
        export_model(fresh(), tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert [path.name for path in (tmp_path / "used").iterdir()] == ["precious"]


USUAL, FULL = "frechet:efficientnet_lite0@16/ode2", "frechet:efficientnet_lite0@24/sde3-random"


@pytest.fixture(scope="module")
def run(cache, tmp_path_factory):
    full = {"samples": 24, "sampler": {"type": "sde", "steps": 3}, "labels": "random"}
    made = make_run(**{"evaluate.full": full, "evaluate.batch_size": 7})
    return run_to_end(made, RunDirectory(tmp_path_factory.mktemp("runs") / "run"), cache)


@pytest.fixture(scope="module")
def distance(run, cache, tmp_path_factory):
    """The Frechet distance of an exported file of samples from the exported real images."""
    extractor = Extractor("efficientnet_lite0", None, torch.device("cpu"))

    def of(path):
        pixels = torch.from_numpy(np.load(path)["arr_0"].transpose(0, 3, 1, 2).copy())
        return statistics(extractor.features(pixels)["1280"])

    path = tmp_path_factory.mktemp("real") / "real.npz"
    assert write_real(run, path, cache) == 1700
    real = of(path)

    def compute(path):
        found = of(path)
        return frechet_distance(found.mu, found.sigma, real.mu, real.sigma)

    return compute


@pytest.mark.parametrize(("metric", "expected", "count"), [(None, FULL, 24), (USUAL, USUAL, 16)])
def test_the_number_can_be_computed_again_from_the_file(run, cache, tmp_path, distance, metric, expected, count):
    told = []
    found = write_samples(
        run, tmp_path / "a.npz", cache, metric, progress=lambda done, total: told.append((done, total))
    )
    value = next(row[expected] for row in reversed(run.rows()) if expected in row)
    assert (found, told[-1]) == ((5, expected, value), (count, count))
    pixels = np.load(tmp_path / "a.npz")["arr_0"]
    assert (pixels.shape, pixels.dtype) == ((count, 8, 8, 3), np.uint8)
    assert distance(tmp_path / "a.npz") == pytest.approx(value, rel=FRECHET)


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
def test_a_number_is_drawn_again_in_the_precision_it_was_measured_in(
    cache, tmp_path, distance, settings, first, second
):
    """Begun in float32, resumed in bfloat16: what was measured at the end was drawn in the latter, or as the spec says."""
    made, directory = make_run(**{"train.steps": 4, "evaluate.every": 2}, **settings), RunDirectory(tmp_path / "run")
    train(made, directory, make_options(), cache, should_stop=stop_after(2))
    assert directory.protocols[USUAL].get("precision") == first
    assert directory.protocols[USUAL].get("rounding") == settings.get("evaluate.rounding")
    assert train(made, directory, make_options(precision="bf16"), cache) is State.DONE
    assert directory.protocols[USUAL]["precision"] == second
    assert directory.provenance["options"]["precision"] == "fp32"
    found = write_samples(directory, tmp_path / "a.npz", cache)
    # In float32 it would be off by 1e-4 and more.
    assert distance(tmp_path / "a.npz") == pytest.approx(found.value, rel=FRECHET)


def test_what_cannot_be_had_is_said_and_nothing_is_written(run, cache, tmp_path):
    with pytest.raises(ExportError, match=f"measures no 'fid'; it measures: {USUAL}, {FULL}"):
        write_samples(run, tmp_path / "a.npz", cache, "fid")
    with pytest.raises(NoWeightsError, match="unknown weights 'best'; allowed: ema, last"):
        write_samples(run, tmp_path / "a.npz", cache, weights="best")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "a.npz").touch()
    with pytest.raises(ExportError, match="exists; name a new file"):
        write_samples(run, tmp_path / "a.npz", cache)
