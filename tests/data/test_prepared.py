from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

from repa_lab.data import DataError
from repa_lab.data.folders import IMAGES, LATENTS
from repa_lab.data.latents import latent_space
from repa_lab.data.prepared import Prepared
from repa_lab.data.settings import PreparedSettings
from tests.data.autoencoders import kl
from tests.data.conftest import noise_image
from tests.data.repa_folders import write_repa_folder
from tests.data.test_space import SCALE, SHIFT, SIDE, draw, save_vae
from tests.rounding import rounding

COUNT = 6
LABELS = [2, 0, 1, 0, 2, 1]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A VAE, and a folder that REPA's tool would have made with it."""
    root = tmp_path_factory.mktemp("made")
    vae = save_vae(root / "vae")
    images = [noise_image(i, (SIDE, SIDE)) for i in range(COUNT)]
    write_repa_folder(root / "data", images, LABELS, vae)
    return root, vae


@pytest.fixture
def data(made, tmp_path):
    return shutil.copytree(made[0] / "data", tmp_path / "data")


def opened(folder) -> Prepared:
    return Prepared(PreparedSettings(path=str(folder), resolution=SIDE))


def space_of(data, vae, tmp_path):
    return latent_space(opened(data), str(vae), tmp_path / "cache")


def refusal(action, *given) -> str:
    with pytest.raises(DataError) as caught:
        action(*given)
    return f"{caught.value.field}: {caught.value}"


def test_the_images_and_their_classes(data):
    source = opened(data)
    assert (len(source), source.channels, source.side, source.num_classes, list(source.captions)) == (
        COUNT,
        3,
        SIDE,
        3,
        [],
    )
    assert source.labels.tolist() == LABELS
    assert source.sizes.tolist() == [[SIDE, SIDE]] * COUNT
    expected = np.stack([np.asarray(noise_image(i, (SIDE, SIDE))) for i in (4, 1)]).transpose(0, 3, 1, 2)
    assert np.array_equal(source.read([4, 1]).numpy(), expected)


@pytest.mark.parametrize("shape", [(1,), ()], ids=["(1, 8, h, w)", "(8, h, w)"])
def test_training_draws_mean_plus_std_times_noise_and_scales(made, tmp_path, shape):
    root, vae = made
    images = [noise_image(i, (SIDE, SIDE)) for i in range(COUNT)]
    folder = write_repa_folder(tmp_path / "data", images, LABELS, vae, shape)
    assert np.load(LATENTS.path(folder, 0)).shape == (*shape, 8, 8, 8)
    space = space_of(folder, root / "vae", tmp_path)
    index = torch.tensor([4, 1, 4])
    noise = space.draw(space.read(index), len(index), draw(3))
    assert noise.shape == (3, 4, 8, 8) and space.shape(index) == (4, 8, 8)
    stored = np.stack([np.load(LATENTS.path(folder, i)).reshape(8, 8, 8) for i in (4, 1, 4)]).astype(np.float64)
    expected = (stored[:, :4] + stored[:, 4:] * noise.double().numpy() - SHIFT) * SCALE
    encoded = space.encode(space.read(index), noise)
    assert encoded.dtype == torch.float32
    np.testing.assert_allclose(encoded.numpy(), expected, rtol=0, atol=rounding(expected, (4, 1)))
    mean = (stored[:, :4] - SHIFT) * SCALE
    encoded = space.encode(space.read(index), None)
    np.testing.assert_allclose(encoded.numpy(), mean, rtol=0, atol=rounding(mean, (2, 1)))


def test_nothing_is_encoded_and_nothing_is_cached(made, data, tmp_path):
    heard = []
    latent_space(opened(data), str(made[0] / "vae"), tmp_path / "cache", lambda *now: heard.append(now))
    assert heard == [] and not (tmp_path / "cache").exists()


def test_samples_are_decoded_by_the_vae(made, data, tmp_path):
    root, vae = made
    space = space_of(data, root / "vae", tmp_path)
    x = space.encode(space.read(torch.arange(2)), None)
    with torch.no_grad():
        expected = (vae.decode(x / SCALE + SHIFT).sample.clamp(-1, 1) + 1) * 127.5
    assert (space.decode(x) - expected).abs().max() <= 0.501


class TestTheVae:
    def test_another_is_refused(self, data, tmp_path):
        save_vae(tmp_path / "other", seed=1)
        assert refusal(space_of, data, tmp_path / "other", tmp_path) == (
            f"vae: '{LATENTS.path(data, 0)}' holds other latents than this VAE makes of the image: it was made by another VAE, "
            "or files are mixed up"
        )

    def test_a_manifest_names_the_one_it_was(self, data, tmp_path):
        (data / "manifest.json").write_text('{"vae": "some/vae"}')
        save_vae(tmp_path / "other", seed=1)
        assert "the folder was prepared with 'some/vae', or" in refusal(space_of, data, tmp_path / "other", tmp_path)

    def test_one_of_other_shapes_is_refused(self, data, tmp_path):
        kl(latent_channels=8).save_pretrained(tmp_path / "other")
        assert "other latents of shape (8, 8, 8), not (16, 8, 8) than" in refusal(
            space_of, data, tmp_path / "other", tmp_path
        )

    def test_one_that_only_decodes_otherwise_will_do(self, made, data, tmp_path):
        """As ft-ema for what ft-mse encoded, with which the REPA papers decode."""
        vae = save_vae(tmp_path / "other")
        with torch.no_grad():
            for weight in vae.decoder.parameters():
                weight.mul_(1.5)
        vae.save_pretrained(tmp_path / "other")
        index = torch.arange(COUNT)
        space = space_of(data, tmp_path / "other", tmp_path)
        x = space.encode(space.read(index), None)
        own = space_of(data, made[0] / "vae", tmp_path)
        assert torch.equal(x, own.encode(own.read(index), None))
        assert not torch.equal(space_of(data, tmp_path / "other", tmp_path).decode(x), own.decode(x))

    def test_half_precision_will_do(self, made, data, tmp_path):
        for number in range(COUNT):
            path = LATENTS.path(data, number)
            np.save(path, np.load(path).astype(np.float16))
        assert space_of(data, made[0] / "vae", tmp_path).read(torch.arange(2)).dtype == torch.float32

    @pytest.mark.parametrize("number", [0, 2, 4])  # of six images every second is looked at
    def test_latents_of_another_image_are_refused(self, made, data, tmp_path, number):
        shutil.copy(LATENTS.path(made[0] / "data", number + 1), LATENTS.path(data, number))
        assert "files are mixed up" in refusal(space_of, data, made[0] / "vae", tmp_path)

    def test_logarithms_of_variances_in_place_of_deviations_are_refused(self, made, data, tmp_path):
        for number in range(COUNT):
            moments = np.load(LATENTS.path(data, number))
            moments[:, 4:] = 2 * np.log(moments[:, 4:])
            np.save(LATENTS.path(data, number), moments)
        assert "holds other latents" in refusal(space_of, data, made[0] / "vae", tmp_path)


class TestDamage:
    def test_latents_that_are_cut_short(self, made, data, tmp_path):
        path = LATENTS.path(data, 3)
        space = space_of(data, made[0] / "vae", tmp_path)
        path.write_bytes(path.read_bytes()[:-7])
        assert refusal(space.read, torch.tensor([1, 3])).startswith(f"path: cannot read '{path}': ")

    def test_latents_that_are_none(self, made, data, tmp_path):
        np.save(LATENTS.path(data, 0), np.zeros((3, 8, 8), np.float32))
        assert refusal(space_of, data, made[0] / "vae", tmp_path) == (
            f"path: '{LATENTS.path(data, 0)}' holds float32 of shape (3, 8, 8), not means and deviations "
            "(2 * channels, height, width)"
        )

    def test_latents_of_another_shape_than_the_first(self, made, data, tmp_path):
        space = space_of(data, made[0] / "vae", tmp_path)
        np.save(LATENTS.path(data, 5), np.zeros((8, 4, 4), np.float32))
        assert refusal(space.read, torch.tensor([5])) == (
            f"path: the latents of one folder must be of one shape: '{LATENTS.path(data, 5)}' is (8, 4, 4), the first is (8, 8, 8)"
        )

    def test_pickles_are_not_read(self, made, data, tmp_path):
        np.save(LATENTS.path(data, 0), np.array([{}], dtype=object), allow_pickle=True)
        assert refusal(space_of, data, made[0] / "vae", tmp_path).startswith(
            f"path: cannot read '{LATENTS.path(data, 0)}': "
        )

    def test_an_image_of_another_size_is_refused_when_it_is_read(self, data):
        source = opened(data)
        noise_image(1, (SIDE, 2 * SIDE)).save(IMAGES.path(data, 3))
        assert refusal(source.read, [1, 3]).startswith(
            f"resolution: '{IMAGES.path(data, 3)}' measures 16x32, not 16x16"
        )

    def test_an_image_that_is_cut_short(self, data):
        source, path = opened(data), IMAGES.path(data, 3)
        path.write_bytes(path.read_bytes()[:200])
        assert refusal(source.read, [3]).startswith(f"path: cannot read '{path}': ")
