from __future__ import annotations

from pathlib import Path

import datasets
import pytest
import torch

from repa_lab.data import DataError
from repa_lab.data.settings import SOURCES, SourceSettings
from repa_lab.data.sources import ImageFolder
from repa_lab.data.space import LatentSpace, PixelSpace
from repa_lab.spec import EncoderSettings
from repa_lab.training.data import open_images, pixels_for
from repa_lab.training.evaluate import real_images
from tests.data.autoencoders import tiny
from tests.data.conftest import noise_image
from tests.data.test_space import save_vae


@pytest.fixture
def folder(tmp_path):
    for name in ("a/1", "a/2", "b/3", "b/4", "b/5"):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        noise_image(int(name[-1]), (20, 24)).save(tmp_path / "images" / f"{name}.png")
    return tmp_path / "images"


def config(**settings) -> SourceSettings:
    return SOURCES[settings["source"]].settings.model_validate(settings)


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
    assert images.space.encode(torch.tensor([0, 4]), None).shape == (2, 4, 8, 8)


@pytest.fixture
def latent(folder, tmp_path):
    """Settings of a data set with latents."""
    save_vae(tmp_path / "vae")
    return config(source="imagefolder", path=str(folder), resolution=16, holdout=2, vae=str(tmp_path / "vae"))


def test_flips_double_the_source_and_leave_the_split_alone(folder, latent, tmp_path):
    plain = open_images(latent, tmp_path / "cache")
    flipped = open_images(latent.model_copy(update={"flip": True}), tmp_path / "cache")
    assert (plain.flips, plain.base_count, len(plain.source)) == (False, 5, 5)
    assert (flipped.flips, flipped.base_count, len(flipped.source)) == (True, 5, 10)
    assert torch.equal(flipped.split.train, plain.split.train)
    assert torch.equal(flipped.split.held_out, plain.split.held_out)
    assert flipped.input == plain.input
    pixels = ImageFolder(folder, 16).read([2])
    assert torch.equal(flipped.source.read([2, 7]), torch.cat([pixels, pixels.flip(-1)]))
    latents = flipped.space.encode(torch.tensor([2, 7]), None)
    torch.testing.assert_close(latents[:1], plain.space.encode(torch.tensor([2]), None), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(latents[0], latents[1], atol=1e-3)


def test_mirrored_arms_are_measured_against_the_same_images(folder):
    settings = {"source": "imagefolder", "path": str(folder), "resolution": 16, "holdout": 2}
    plain, flipped = (real_images(open_images(config(**settings, flip=flip), Path("unused"))) for flip in (False, True))
    assert (flipped.source, flipped.count, flipped.size) == (plain.source, 3, (16, 16))
    assert torch.equal(torch.cat([*flipped.batches()]), torch.cat([*plain.batches()]))


class TestPixels:
    def test_are_the_images_unless_told_otherwise(self, latent, tmp_path):
        images = open_images(latent, tmp_path / "cache")
        assert pixels_for(EncoderSettings(), images) is images.source

    def test_may_be_what_the_vae_gives_back(self, latent, tmp_path):
        images = open_images(latent, tmp_path / "cache")
        made = pixels_for(EncoderSettings(pixels="vae"), images)
        assert torch.equal(made.read(range(5)), images.space.decode(images.space.encode(torch.arange(5), None)))
        assert made.fingerprint != images.source.fingerprint

    def test_may_be_what_a_tiny_autoencoder_makes_of_the_latents(self, latent, tmp_path):
        tae = tiny()
        tae.save_pretrained(tmp_path / "tae")
        images = open_images(latent, tmp_path / "cache")
        made = pixels_for(EncoderSettings(pixels="tae", tae=str(tmp_path / "tae")), images)
        with torch.no_grad():
            expected = tae.eval().decode(images.space.encode(torch.tensor([1, 4]), None)).sample
        assert (made.read([1, 4]) - (expected.clamp(-1, 1) + 1) * 127.5).abs().max() <= 0.501

    @pytest.mark.parametrize("kind", ["vae", "tae"])
    def test_without_latents_are_refused(self, folder, tmp_path, kind):
        data = config(source="imagefolder", path=str(folder), resolution=16, holdout=2)
        encoder = EncoderSettings(pixels=kind, tae="x" if kind == "tae" else None)
        with pytest.raises(DataError) as caught:
            pixels_for(encoder, open_images(data, tmp_path))
        assert str(caught.value) == (
            f"pixels: {kind} decodes latents, and there is no VAE; set data.vae, or pixels: image"
        )
        assert caught.value.field == "vae"

    def test_a_tiny_autoencoder_that_is_missing_or_of_other_latents_is_refused(self, latent, tmp_path):
        images = open_images(latent, tmp_path / "cache")
        tiny(latent_channels=16).save_pretrained(tmp_path / "wide")
        for name, match in (("wide", "decodes latents of 16 channels"), ("missing", "cannot load the TAE '.*missing'")):
            with pytest.raises(DataError, match=match) as caught:
                pixels_for(EncoderSettings(pixels="tae", tae=str(tmp_path / name)), images)
            assert caught.value.field == "tae"


@pytest.mark.parametrize("settings, match", [({}, r"set data\.path"), ({"path": "nowhere"}, "no folder 'nowhere'")])
def test_a_folder_must_be_given_and_be_there(tmp_path, settings, match):
    with pytest.raises(DataError, match=match) as caught:
        open_images(config(source="imagefolder", **settings), tmp_path)
    assert caught.value.field == "path"


def test_holding_out_everything_is_refused(folder, tmp_path):
    with pytest.raises(DataError, match="holding out 5 of 5") as caught:
        open_images(config(source="imagefolder", path=str(folder), resolution=16, holdout=5), tmp_path)
    assert caught.value.field == "holdout"


def test_a_saved_data_set_is_opened_with_its_column_of_captions(tmp_path):
    rows = {"image": [noise_image(i, (20, 24)) for i in range(5)], "note": list("abcde"), "text": list("vwxyz")}
    columns = {"image": datasets.Image(), "note": datasets.Value("string"), "text": datasets.Value("string")}
    datasets.Dataset.from_dict(rows, features=datasets.Features(columns)).save_to_disk(tmp_path / "data")
    data = config(source="datasets", path=str(tmp_path / "data"), resolution=16, holdout=2)
    images = open_images(data, tmp_path)
    assert (images.input.channels, images.input.size, images.input.num_classes) == (3, (16, 16), 1)
    assert images.source.captions == list("vwxyz")
    assert open_images(data.model_copy(update={"caption_column": "note"}), tmp_path).source.captions == list("abcde")
    assert images.source.fingerprint == data.describe().fingerprint


def test_buckets_keep_aspects_in_latents_too(folder, tmp_path):
    save_vae(tmp_path / "vae")
    settings = {
        "source": "imagefolder",
        "path": str(folder),
        "resolution": 16,
        "holdout": 2,
        "vae": str(tmp_path / "vae"),
    }
    square, kept = config(**settings), config(**settings, buckets={"step": 4, "max_aspect": 2.0})
    images = open_images(kept, tmp_path / "cache")
    # 24 high and 20 wide is 1.2: nearer to 1 (16x16) than to 1.67 (20x12); a taller one is added.
    assert images.source.sizes.tolist() == [[16, 16]] * 5
    noise_image(9, (20, 40)).save(folder / "b" / "6.png")
    images = open_images(kept, tmp_path / "cache")
    assert images.source.sizes.tolist() == [[16, 16]] * 5 + [[20, 12]]
    assert images.space.shape(torch.tensor([5])) == (4, 10, 6)
    assert images.space.encode(torch.tensor([5]), None).shape == (1, 4, 10, 6)
    assert open_images(square, tmp_path / "cache").source.sizes.tolist() == [[16, 16]] * 6
    assert len({one.describe().fingerprint for one in (square, kept, kept.model_copy(update={"resolution": 32}))}) == 3


def test_the_pipelines_vae_is_taken_where_none_is_named(folder, tmp_path):
    save_vae(tmp_path / "own")
    save_vae(tmp_path / "pipeline" / "vae", seed=1)
    (tmp_path / "pipeline" / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    settings = {"source": "imagefolder", "path": str(folder), "resolution": 16, "holdout": 2}
    pipeline = str(tmp_path / "pipeline")

    def latents(around: str | None, named: str | None = None) -> torch.Tensor:
        images = open_images(config(**settings, vae=named), tmp_path / "cache", vae=around)
        return images.space.encode(torch.arange(5), None)

    own = str(tmp_path / "own")
    assert torch.equal(latents(pipeline, own), latents(None, own))
    assert torch.equal(latents(pipeline), latents(None, pipeline))
    assert not torch.equal(latents(pipeline), latents(None, own))
