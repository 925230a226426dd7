from __future__ import annotations

import numpy as np
import pytest
import torch

from repa_lab.data import DataError
from repa_lab.data.latents import Autoencoder, Reconstructions, latent_space
from repa_lab.data.sources import Flips
from tests.data.autoencoders import flux2, kl, tiny
from tests.data.conftest import image_folder, noise_image

SIDE, COUNT = 16, 11
CPU = torch.device("cpu")
SETTINGS = {"scaling_factor": 0.3611, "shift_factor": 0.1159}


@pytest.fixture
def source(folder):
    images = {f"{'ab'[i % 2]}/{i:02}.png": noise_image(i, (SIDE, SIDE)) for i in range(COUNT)}
    return image_folder(folder(images, dict.fromkeys(images, "") | {"a/00.png": "one"}), SIDE)


@pytest.fixture
def open_space(source, tmp_path):
    def open_space(vae, source=source):
        vae.save_pretrained(tmp_path / "vae")
        return latent_space(source, str(tmp_path / "vae"), tmp_path / "cache")

    return open_space


@pytest.fixture
def vae():
    return kl(**SETTINGS).eval()


@pytest.fixture
def tae():
    return tiny().eval()


def levels(x: torch.Tensor) -> np.ndarray:
    """Values in [-1, 1] on 0..255, not yet rounded."""
    return (np.clip(x.double().numpy(), -1, 1) + 1) * 127.5


@torch.no_grad()
def test_are_the_vaes_own_of_the_posteriors_mean(source, open_space, vae):
    space = open_space(vae)
    pixels = Reconstructions(source, space, space.vae, CPU).read(range(COUNT))
    assert (pixels.shape, pixels.dtype) == ((COUNT, 3, SIDE, SIDE), torch.uint8)
    own = levels(vae.decode(vae.encode(source.read(range(COUNT)).float() / 127.5 - 1).latent_dist.mean).sample)
    assert np.abs(pixels.numpy() - own).max() <= 0.501
    assert own.std() > 2


@torch.no_grad()
def test_a_tiny_autoencoder_decodes_what_the_diffusion_model_sees(source, open_space, vae, tae):
    space = open_space(vae)
    pixels = Reconstructions(source, space, Autoencoder(tae, "tae"), CPU).read([3, 7])
    mean = vae.encode(source.read([3, 7]).float() / 127.5 - 1).latent_dist.mean
    seen = (mean - SETTINGS["shift_factor"]) * SETTINGS["scaling_factor"]
    assert np.abs(pixels.numpy() - levels(tae.decode(seen).sample)).max() <= 0.501
    assert np.abs(pixels.numpy() - levels(tae.decode(mean).sample)).max() > 1  # the VAE's latents themselves


@torch.no_grad()
def test_a_tiny_autoencoders_own_scaling_is_undone(source, open_space, vae):
    space, tae = open_space(vae), tiny(scaling_factor=0.5, shift_factor=0.25).eval()
    pixels = Reconstructions(source, space, Autoencoder(tae, "tae"), CPU).read([3])
    expected = tae.decode(space.encode(space.read(torch.tensor([3])), None) / 0.5 + 0.25).sample
    assert np.abs(pixels.numpy() - levels(expected)).max() <= 0.501


def test_are_a_function_of_the_image(source, open_space, vae):
    space = open_space(vae)
    made = Reconstructions(source, space, space.vae, CPU)
    everything = made.read(range(COUNT))
    torch.manual_seed(5)
    assert torch.equal(made.read(range(COUNT)), everything)
    # Alone or in a batch, a convolution may round differently.
    assert (made.read([10, 2]).int() - everything[[10, 2]].int()).abs().max() <= 1


def test_have_the_labels_and_captions_of_the_images(source, open_space, vae):
    space = open_space(vae)
    made = Reconstructions(source, space, space.vae, CPU)
    assert (len(made), made.side, made.channels, made.num_classes) == (COUNT, SIDE, 3, 2)
    assert torch.equal(made.labels, source.labels)
    assert list(made.captions) == list(source.captions)


def test_of_mirrored_images_are_those_of_their_own_latents(source, open_space, vae):
    flips = Flips(source)
    space = open_space(vae, flips)
    made = Reconstructions(flips, space, space.vae, CPU)
    with torch.no_grad():
        mirrored = source.read([4]).flip(-1).float() / 127.5 - 1
        own = levels(vae.decode(vae.encode(mirrored).latent_dist.mean).sample)
    assert np.abs(made.read([COUNT + 4]).numpy() - own).max() <= 0.501
    assert not torch.equal(made.read([COUNT + 4]), made.read([4]).flip(-1))


def test_every_part_shows_in_the_fingerprint(source, open_space, vae, tae):
    space = open_space(vae)
    prints = [source.fingerprint, Reconstructions(source, space, space.vae, CPU).fingerprint]
    prints += [Reconstructions(source, space, Autoencoder(one, "tae"), CPU).fingerprint for one in (tae, tiny())]
    again = Reconstructions(source, space, Autoencoder(tae, "tae"), CPU).fingerprint
    assert again == prints[2]
    other = open_space(kl(**SETTINGS, latents_mean=(0.0,) * 4))
    prints.append(Reconstructions(source, other, Autoencoder(tae, "tae"), CPU).fingerprint)
    prints.append(Reconstructions(source, other, other.vae, CPU).fingerprint)
    assert len(set(prints)) == 6


@pytest.mark.parametrize("make, seen", [(lambda: kl(latent_channels=8), 8), (flux2, 16)])
def test_a_tiny_autoencoder_of_other_latents_is_refused(source, open_space, tae, make, seen):
    space = open_space(make())
    with pytest.raises(DataError) as caught:
        Reconstructions(source, space, Autoencoder(tae, "tae"), CPU)
    assert (
        str(caught.value)
        == f"'tae' decodes latents of 4 channels, but those of the VAE have {seen}: it is for another VAE"
    )
    assert caught.value.field == "tae"


def test_a_tiny_autoencoder_of_another_size_is_refused(source, open_space, vae):
    blocks = {"decoder_block_out_channels": (8, 8, 8), "num_decoder_blocks": (1, 1, 1)}
    made = Reconstructions(source, open_space(vae), Autoencoder(tiny(**blocks), "tae"), CPU)
    with pytest.raises(DataError, match=r"images of \(3, 16, 16\) are given back as \(3, 32, 32\)") as caught:
        made.read([0])
    assert caught.value.field == "tae"
