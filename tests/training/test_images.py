from __future__ import annotations

import pytest
import torch

from repa_lab.data.fingerprint import DataError
from repa_lab.data.space import LatentSpace, PixelSpace
from repa_lab.spec import DataConfig
from repa_lab.training.images import open_images
from tests.data.conftest import noise_image
from tests.data.test_space import save_vae


@pytest.fixture
def folder(tmp_path):
    for name in ("a/1", "a/2", "b/3", "b/4", "b/5"):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        noise_image(int(name[-1]), (20, 24)).save(tmp_path / "images" / f"{name}.png")
    return tmp_path / "images"


def config(**settings) -> DataConfig:
    return DataConfig.model_validate(settings)


def test_digits(tmp_path):
    images = open_images(config(source="digits", holdout=97), tmp_path)
    assert (len(images.split.train), len(images.split.held_out)) == (1700, 97)
    assert isinstance(images.space, PixelSpace)
    assert (images.input.channels, images.input.size, images.input.num_classes) == (1, (8, 8), 10)


def test_a_folder_at_its_resolution(folder, tmp_path):
    images = open_images(config(source="imagefolder", path=str(folder), resolution=16, holdout=2), tmp_path)
    assert (images.input.channels, images.input.size, images.input.num_classes) == (3, (16, 16), 2)
    assert len(images.split.train) == 3


def test_a_folder_in_latents_announces_its_work(folder, tmp_path):
    save_vae(tmp_path / "vae")
    heard: list[tuple[str, int, int]] = []
    data = config(source="imagefolder", path=str(folder), resolution=16, holdout=2, vae=str(tmp_path / "vae"))
    images = open_images(data, tmp_path / "cache", lambda task: lambda done, total: heard.append((task, done, total)))
    assert heard[-1] == ("latents", 5, 5)
    assert isinstance(images.space, LatentSpace)
    assert (images.input.channels, images.input.size) == (4, (8, 8))
    assert images.space.encode([0, 4], torch.Generator().manual_seed(0)).shape == (2, 4, 8, 8)


@pytest.mark.parametrize("settings, match", [({}, r"set data\.path"), ({"path": "nowhere"}, "no folder 'nowhere'")])
def test_a_folder_must_be_given_and_be_there(tmp_path, settings, match):
    with pytest.raises(DataError, match=match) as caught:
        open_images(config(source="imagefolder", **settings), tmp_path)
    assert caught.value.field == "path"


def test_holding_out_everything_is_refused(folder, tmp_path):
    with pytest.raises(DataError, match="holding out 5 of 5") as caught:
        open_images(config(source="imagefolder", path=str(folder), resolution=16, holdout=5), tmp_path)
    assert caught.value.field == "holdout"
