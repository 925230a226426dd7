from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLLTXVideo
from torch import nn

from repa_lab.data import DataError
from repa_lab.data.latents import Autoencoder, LatentScaling, latent_scaling, to_uint8
from tests.data.autoencoders import MEAN, STD, dc, flux2, kl, qwen, tiny
from tests.rounding import TINY_VAE, UNIT, rounding

MEANS, STDS = np.array(MEAN).reshape(-1, 1, 1), np.array(STD).reshape(-1, 1, 1)
SCALING = {
    "scale": kl(scaling_factor=0.18215),
    "scale and shift": kl(scaling_factor=0.3611, shift_factor=0.1159),
    "mean, std and scale": kl(scaling_factor=0.5, latents_mean=MEAN, latents_std=STD),
    "mean and std": qwen(),
    "batch norm": flux2(),
    "scale of what is no distribution": dc(),
    "nothing": tiny(),
}
FORMS = pytest.mark.parametrize("vae", SCALING.values(), ids=SCALING)


class Bare(nn.Module):
    """What of an autoencoder says how its latents are scaled."""

    def __init__(self, **config) -> None:
        super().__init__()
        self.config = SimpleNamespace(**config)


def latents(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def by_hand(name: str, z: np.ndarray) -> np.ndarray:
    """What the pipelines of diffusers do, in NumPy."""
    return {
        "scale": lambda: z * 0.18215,
        "scale and shift": lambda: (z - 0.1159) * 0.3611,
        "mean, std and scale": lambda: (z - MEANS) * 0.5 / STDS,
        "mean and std": lambda: (z - MEANS) / STDS,
        "scale of what is no distribution": lambda: z * 0.4,
        "nothing": lambda: z,
    }[name]()


@pytest.mark.parametrize("name", [name for name in SCALING if name != "batch norm"])
def test_latents_are_scaled_as_the_pipelines_do(name):
    z = latents(2, 4, 6, 10)
    x = latent_scaling(SCALING[name]).normalise(z)
    assert x.dtype == torch.float64
    np.testing.assert_allclose(x.numpy(), by_hand(name, z.numpy()), rtol=0, atol=4 * UNIT**2)  # in float64


def test_batch_norm_is_over_patches_in_the_order_channel_row_column():
    z = latents(2, 4, 6, 10)
    x = latent_scaling(flux2()).normalise(z).numpy()
    assert x.shape == (2, 16, 3, 5)
    mean, var = np.linspace(-0.5, 0.5, 16), np.linspace(0.2, 3, 16)
    for channel, row, column in np.ndindex(4, 2, 2):
        at = 4 * channel + 2 * row + column
        expected = (z[:, channel, row::2, column::2].numpy() - mean[at]) / np.sqrt(var[at] + 1e-2)
        np.testing.assert_allclose(x[:, at], expected, rtol=4 * UNIT, atol=4 * UNIT)  # the statistics are float32


@FORMS
def test_the_inverse_is_exact(vae):
    scaling, z = latent_scaling(vae), latents(2, 4, 6, 10)
    x = scaling.normalise(z)
    assert tuple(x.shape[1:]) == scaling.shape(4, 6, 10)
    torch.testing.assert_close(scaling.denormalise(x), z, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(scaling.normalise(scaling.denormalise(x)), x, rtol=1e-14, atol=1e-14)


@FORMS
def test_what_the_diffusion_model_sees_decodes_to_the_autoencoders_own_reconstruction(vae):
    model = Autoencoder(vae, "vae")
    pixels = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    mean, std = model.moments(pixels).chunk(2, dim=1)
    images = pixels.float() / 127.5 - 1
    film = isinstance(vae, type(SCALING["mean and std"]))
    with torch.no_grad():
        encoded = vae.encode(images.unsqueeze(2) if film else images)
        own = encoded.latent_dist.mode() if "latent_dist" in encoded else encoded.to_tuple()[0]
        direct = vae.decode(own).sample
        back = model.scaling.denormalise(model.scaling.normalise(mean))
        ours = vae.decode(back.unsqueeze(2) if film else back).sample
    assert (ours - direct).abs().max() <= 1e-5
    assert direct.std() > 1e-3
    decoded = to_uint8(model.decode(model.scaling.normalise(mean))).int()
    expected = ((direct.squeeze(2) if film else direct).clamp(-1, 1) + 1) * 127.5
    assert (decoded - expected).abs().max() <= 0.501
    assert bool((std > 0).all()) == ("latent_dist" in encoded)


def test_a_shift_that_is_dropped_would_show():
    z = latents(1, 4, 4, 4)
    x = latent_scaling(kl(scaling_factor=0.3611, shift_factor=0.1159)).normalise(z)
    assert (x / 0.3611 - z).abs().min() > 0.11


def test_statistics_may_be_buffers():
    film = AutoencoderKLLTXVideo(
        latent_channels=4, block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1), spatio_temporal_scaling=(True, False), upsample_residual=(False, False),
        decoder_spatio_temporal_scaling=(True, False), decoder_inject_noise=(False, False, False), upsample_factor=(1, 1),
        down_block_types=("LTXVideoDownBlock3D",) * 2, patch_size=1, scaling_factor=2.0,
    )  # fmt: skip
    film.latents_mean.copy_(torch.tensor(MEAN))
    film.latents_std.copy_(torch.tensor(STD))
    z = latents(1, 4, 3, 3)
    np.testing.assert_allclose(
        latent_scaling(film).normalise(z).numpy(), (z.numpy() - MEANS) * 2 / STDS, rtol=4 * UNIT, atol=4 * UNIT
    )


def test_one_statistic_without_the_other_is_none():
    assert latent_scaling(kl(scaling_factor=0.5, latents_mean=MEAN)) == LatentScaling(scale=(0.5,))


def test_a_factor_of_none_is_1_and_of_0_is_refused():
    assert latent_scaling(Bare(scaling_factor=None, shift_factor=None)) == LatentScaling()
    for broken in (kl(scaling_factor=0.0), kl(latents_mean=MEAN, latents_std=(1.0, 1.0, 1.0, 0.0))):
        with pytest.raises(DataError, match="cannot be scaled by") as caught:
            latent_scaling(broken)
        assert caught.value.field == "vae"


def test_latents_that_do_not_divide_into_patches_are_refused():
    with pytest.raises(DataError, match="measure 7x8, which does not divide into patches of 2x2") as caught:
        latent_scaling(flux2()).shape(4, 7, 8)
    assert caught.value.field == "resolution"


def test_a_model_that_scales_inside_is_refused():
    model = Bare(scaling_factor=1.0)
    model.register_buffer("_latents_mean", torch.zeros(1))  # as AutoencoderRAE has it
    with pytest.raises(DataError, match="Bare scales its latents itself, which is not supported"):
        latent_scaling(model)


@FORMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_scaling_keeps_the_dtype(vae, dtype):
    scaling = latent_scaling(vae)
    x = scaling.normalise(latents(1, 4, 4, 4).to(dtype))
    assert x.dtype == scaling.denormalise(x).dtype == dtype


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_decoding_is_float32_whatever_surrounds_it(half):
    """In float16 what this VAE computes overflows, as SDXL's does; in bfloat16 its pixels are of few levels."""
    vae = kl()
    vae.decoder.conv_in.weight.data *= 1e7  # the normalisation that follows takes it back
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    model, plain = Autoencoder(vae, "vae"), partial(AutoencoderKL.decode, vae)
    precise = plain(z).sample
    with torch.autocast("cpu", half):
        rough = plain(z).sample
    with torch.autocast("cpu", half):
        pixels = model.decode(model.scaling.normalise(z)), model.model.decode(z, return_dict=False)[0]
        coarse = model.model.decode(z.to(half)).sample
    assert torch.equal(coarse, plain(z.to(half).float()).sample)
    assert rough.dtype is half
    if half is torch.float16:
        assert not rough.isfinite().any()
    else:
        levels, exact = ((image / 2 + 0.5).unique() for image in (rough, precise))  # as a pipeline scales them
        assert len(levels) < 400 < 1500 < len(exact)
    error = rounding(precise, TINY_VAE)  # of scaling there and back
    torch.testing.assert_close(pixels[0], precise, rtol=0, atol=error)
    assert torch.equal(pixels[1], precise)


def test_weights_in_half_precision_are_brought_to_float32():
    model = Autoencoder(kl().half(), "vae")
    assert {value.dtype for value in model.model.state_dict().values()} == {torch.float32}
