"""What leaves the lab is the denoiser alone, as others load it."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import UNet2DModel
from safetensors.torch import load_file

from repa_lab.models.sit import SiT, SiTConfig
from repa_lab.models.sit_down import SiTDown, SiTDownConfig
from repa_lab.training.checkpoint import NoWeightsError
from repa_lab.training.export import ExportError, export_model
from tests.training.conftest import SIT_DOWN, UNET, make_run, run_steps, weights

REGULARIZED = {**UNET, "regularizer.type": "urepa"}


@pytest.fixture(scope="module")
def unet(cache, tmp_path_factory):
    from repa_lab.runs import RunDirectory

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
