from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLTemporalDecoder, UNet2DModel
from PIL import Image

from repa_lab.data import DataError
from repa_lab.data.crop import Buckets
from repa_lab.data.latents import Autoencoder, PixelSpace, Reconstructions, Space, latent_space, to_uint8
from repa_lab.data.sources import Digits, Flips
from tests.data.autoencoders import dc, flux2, qwen, tiny
from tests.data.conftest import image_folder, noise_image
from tests.rounding import rounding

SCALE, SHIFT = 0.3611, 0.1159
SIDE = 16

# The last two convolutions of the tiny encoder, whose sums have 9 * 16 terms.
ENDS = (2, 144)


def save_vae(path: Path, seed: int = 0, **config) -> AutoencoderKL:
    torch.manual_seed(seed)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        latent_channels=4,
        sample_size=SIDE,
        **{"scaling_factor": SCALE, "shift_factor": SHIFT, **config},
    )
    vae.save_pretrained(path)
    return vae.eval()


@pytest.fixture
def vae_path(tmp_path):
    return tmp_path / "vae"


@pytest.fixture
def vae(vae_path):
    return save_vae(vae_path)


@pytest.fixture
def source(folder):
    return image_folder(folder({f"{i}.png": noise_image(i, (SIDE, SIDE)) for i in range(5)}), SIDE)


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def encode(space: Space, index: list[int]) -> torch.Tensor:
    stored = space.read(torch.tensor(index))
    return space.encode(stored, space.draw(stored, len(index), draw()))


def uint8(x: torch.Tensor) -> np.ndarray:
    """The definition, in NumPy."""
    return np.clip(np.rint((x.detach().numpy() + np.float32(1)) * np.float32(127.5)), 0, 255).astype(np.uint8)


class TestPixels:
    def test_all_levels_come_back(self, folder):
        levels = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
        space = PixelSpace(image_folder(folder({"1.png": levels}), 16))
        x = space.encode(space.read(torch.tensor([0])), None)
        assert (x.dtype, x.min().item(), x.max().item()) == (torch.float32, -1.0, 1.0)
        assert space.shape(torch.tensor([0])) == (3, 16, 16)
        assert space.decode(torch.where(x == 1, torch.inf, x)) is space.decode(x * torch.nan) is None
        for channel in space.decode(x)[0]:
            assert channel.flatten().tolist() == list(range(256))

    def test_the_scale_is_linear(self):
        digits = Digits()
        space = PixelSpace(digits)
        assert space.shape(torch.tensor([0])) == (1, 8, 8)
        expected = digits.read([3, 1]).double() / 255 * 2 - 1
        encoded = space.encode(space.read(torch.tensor([3, 1])), None)
        torch.testing.assert_close(encoded.double(), expected, rtol=0, atol=rounding(expected, (1, 1)))

    def test_draws_nothing(self):
        generator = draw()
        space = PixelSpace(Digits())
        assert space.draw(space.read(torch.arange(2)), 2, generator) is None
        assert torch.equal(torch.randn(3, generator=generator), torch.randn(3, generator=draw()))

    def test_the_way_out_rounds_to_nearest_and_clamps(self):
        values = torch.tensor([-5.0, -1.0, -1 + 0.49 / 127.5, -1 + 0.51 / 127.5, 0.0, 1.0, 1.2, torch.inf, -torch.inf])
        assert to_uint8(values).tolist() == [0, 0, 0, 1, 128, 255, 255, 255, 0]
        assert to_uint8(values.double()).tolist() == to_uint8(values).tolist()

    def test_or_truncates_as_repas_script_does(self):
        values = torch.tensor([-5.0, -1.0, -1 + 0.99 / 127.5, -1 + 1.01 / 127.5, 0.0, 0.999, 1.0, 1.2])
        assert to_uint8(values, "truncate").tolist() == [0, 0, 0, 1, 127, 254, 255, 255]
        x = torch.rand(100_000, generator=draw()) * 2.2 - 1.1
        repa = np.clip(255.0 * ((x.numpy() + 1) / 2.0), 0, 255).astype(np.uint8)
        assert to_uint8(x, "truncate").tolist() == repa.tolist()
        inside = x.abs() < 1
        darker = to_uint8(x).double()[inside].mean() - to_uint8(x, "truncate").double()[inside].mean()
        standard_error = 0.5 / inside.sum().item() ** 0.5  # a value is darker by a level or is not, as a coin falls
        assert darker.item() == pytest.approx(0.5, abs=4 * standard_error)


class TestLatents:
    def test_encode_is_the_scaled_draw(self, vae, vae_path, source, cache):
        space = latent_space(source, str(vae_path), cache)
        assert space.shape(torch.tensor([0])) == (4, 8, 8)
        with torch.no_grad():
            posterior = vae.encode(source.read([4, 2]).float() / 127.5 - 1).latent_dist
        eps = torch.randn(2, 4, 8, 8, generator=draw(7)).double().numpy()
        mean, log_variance = posterior.mean.double().numpy(), posterior.logvar.double().numpy()
        expected = (mean + np.exp(log_variance / 2) * eps - SHIFT) * SCALE
        stored = space.read(torch.tensor([4, 2]))
        encoded = space.encode(stored, space.draw(stored, 2, draw(7)))
        assert encoded.dtype == torch.float32
        np.testing.assert_allclose(encoded.numpy(), expected, rtol=0, atol=rounding(expected, (4, 1)))
        assert np.abs(expected - (mean - SHIFT) * SCALE).max() > 1e-2  # the noise is no rounding error

    def test_what_was_drawn_for_an_image_is_its_own_noise(self, vae, vae_path, source, cache):
        space = latent_space(source, str(vae_path), cache)
        noise = space.draw(space.read(torch.tensor([0])), 2, draw(7))
        assert noise.shape == (2, 4, 8, 8)
        assert torch.equal(noise, torch.randn(2, 4, 8, 8, generator=draw(7)))
        both = space.encode(space.read(torch.tensor([4, 2])), noise)
        assert torch.equal(space.encode(space.read(torch.tensor([2, 4])), noise.flip(0)), both.flip(0))
        assert not torch.equal(space.encode(space.read(torch.tensor([2, 4])), noise), both.flip(0))

    def test_without_noise_the_latent_is_the_mean(self, vae, vae_path, source, cache):
        space = latent_space(source, str(vae_path), cache)
        with torch.no_grad():
            mean = vae.encode(source.read([3]).float() / 127.5 - 1).latent_dist.mean
        expected = (mean - SHIFT) * SCALE
        encoded = space.encode(space.read(torch.tensor([3])), None)
        torch.testing.assert_close(encoded, expected, rtol=0, atol=rounding(expected, ENDS))
        assert torch.equal(
            space.encode(space.read(torch.tensor([3])), None),
            space.encode(space.read(torch.tensor([3])), torch.zeros(1, 4, 8, 8)),
        )

    def test_decode_of_the_mean_is_the_vaes_own_reconstruction(self, vae, vae_path, source, cache):
        space = latent_space(source, str(vae_path), cache)
        with torch.no_grad():
            mean = vae.encode(source.read(range(5)).float() / 127.5 - 1).latent_dist.mode()
            own = uint8(vae.decode(mean).sample)
        ours = space.decode((mean - SHIFT) * SCALE)
        assert ours.dtype == torch.uint8
        assert np.array_equal(ours.numpy(), own)
        assert own.std() > 2  # not a plain image

    def test_a_vae_without_a_shift_has_shift_0(self, vae_path, source, cache):
        vae = save_vae(vae_path, shift_factor=None, scaling_factor=0.25)
        space = latent_space(source, str(vae_path), cache)
        with torch.no_grad():
            posterior = vae.encode(source.read([0]).float() / 127.5 - 1).latent_dist
        eps = torch.randn(1, 4, 8, 8, generator=draw())
        expected = (posterior.mean + posterior.std * eps) / 4
        torch.testing.assert_close(encode(space, [0]), expected, rtol=0, atol=rounding(expected, ENDS))

    def test_the_moments_are_computed_once(self, vae, vae_path, source, cache):
        done: list[int] = []
        first = encode(latent_space(source, str(vae_path), cache, lambda now, total: done.append(now)), [1, 3])
        assert done[-1] == 5
        done.clear()
        again = encode(latent_space(source, str(vae_path), cache, lambda now, total: done.append(now)), [1, 3])
        assert done == []
        assert torch.equal(first, again)

    @pytest.mark.parametrize("change", [{"seed": 1}, {"scaling_factor": 0.5}])
    def test_a_refilled_folder_is_another_vae(self, vae, vae_path, source, cache, change):
        before = encode(latent_space(source, str(vae_path), cache), [0])
        shutil.rmtree(vae_path)
        save_vae(vae_path, **change)
        done: list[int] = []
        after = encode(latent_space(source, str(vae_path), cache, lambda now, total: done.append(now)), [0])
        assert done and not torch.equal(before, after)

    def test_a_moved_folder_is_the_same_vae(self, vae, vae_path, source, cache, tmp_path):
        latent_space(source, str(vae_path), cache)
        shutil.move(vae_path, tmp_path / "elsewhere")
        done: list[int] = []
        latent_space(source, str(tmp_path / "elsewhere"), cache, lambda now, total: done.append(now))
        assert done == []

    def test_other_images_are_other_moments(self, vae, vae_path, source, cache, folder):
        latent_space(source, str(vae_path), cache)
        done: list[int] = []
        other = image_folder(folder({"1.png": noise_image(9, (SIDE, SIDE))}, name="other"), SIDE)
        latent_space(other, str(vae_path), cache, lambda now, total: done.append(now))
        assert done == [1]

    def test_what_does_not_decode_to_numbers_is_no_image(self, vae, vae_path, source, cache):
        space = latent_space(source, str(vae_path), cache)
        sound = space.encode(space.read(torch.tensor([0, 1])), None)
        assert space.decode(sound) is not None
        for value in (1e38, torch.nan, torch.inf):  # the first is finite, and what comes out is not
            x = sound.clone()
            x[1, 0, 3, 3] = value
            assert space.decode(x) is None

    def test_the_vae_is_frozen(self, vae, vae_path, source, cache):
        space = latent_space(source, str(vae_path), cache)
        x = space.encode(space.read(torch.tensor([0])), None).requires_grad_()
        assert not space.decode(x).requires_grad
        assert not space.vae.model.training
        assert not any(parameter.requires_grad for parameter in space.vae.model.parameters())

    @pytest.mark.parametrize("make, channels, side", [(flux2, 16, 4), (dc, 4, 8), (qwen, 4, 8), (tiny, 4, 8)])
    def test_any_autoencoder_is_loaded_by_its_config(self, vae_path, source, cache, make, channels, side):
        vae = make().eval()
        vae.save_pretrained(vae_path)
        space = latent_space(source, str(vae_path), cache)
        assert space.channels == channels
        assert space.shape(torch.tensor([4, 2])) == (channels, side, side)
        assert type(space.vae.model) is type(vae)
        noise = space.draw(space.read(torch.tensor([0])), 2, draw())
        assert noise.shape == (2, 4, 8, 8)
        x = space.encode(space.read(torch.tensor([4, 2])), noise)
        assert (x.shape, x.dtype) == ((2, channels, side, side), torch.float32)
        mean = space.encode(space.read(torch.tensor([4, 2])), None)
        assert torch.equal(mean, x) == (make in (dc, tiny))  # which leave nothing to chance
        assert torch.equal(space.decode(mean), to_uint8(Autoencoder(vae, "vae").decode(mean)))
        assert space.decode(mean).shape == (2, 3, SIDE, SIDE)

    def test_another_class_of_the_same_weights_is_another_vae(self, vae):
        class Renamed(AutoencoderKL):
            pass

        renamed = Renamed(**vae.config)
        renamed.load_state_dict(vae.state_dict())
        assert Autoencoder(renamed, "vae").identity != Autoencoder(vae, "vae").identity

    def test_a_model_that_is_no_autoencoder_is_refused(self, source, cache, tmp_path):
        blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
        UNet2DModel(norm_num_groups=4, **blocks).save_pretrained(tmp_path / "unet")
        with pytest.raises(DataError, match="UNet2DModel is not an autoencoder") as caught:
            latent_space(source, str(tmp_path / "unet"), cache)
        assert caught.value.field == "vae"

    def test_an_autoencoder_that_makes_films_of_images_is_refused(self, source, cache, tmp_path):
        film = AutoencoderKLTemporalDecoder(block_out_channels=(32,), layers_per_block=1)
        film.save_pretrained(tmp_path / "film")
        with pytest.raises(DataError, match="turns images into films; an autoencoder of images is required"):
            latent_space(source, str(tmp_path / "film"), cache)

    def test_latents_that_do_not_divide_into_patches_are_refused_before_all_are_computed(self, vae_path, cache, folder):
        flux2().save_pretrained(vae_path)
        source = image_folder(folder({f"{i}.png": noise_image(i, (18, 18)) for i in range(20)}), 18)
        done: list[int] = []
        with pytest.raises(DataError, match="measure 9x9, which does not divide into patches of 2x2"):
            latent_space(source, str(vae_path), cache, lambda now, total: done.append(now))
        assert done == []

    def test_mirrored_images_have_latents_of_their_own(self, vae, vae_path, source, cache):
        space = latent_space(Flips(source), str(vae_path), cache)
        with torch.no_grad():
            mirrored = source.read([3]).flip(-1).float() / 127.5 - 1
            mean = vae.encode(mirrored).latent_dist.mean
        expected = (mean - SHIFT) * SCALE
        encoded = space.encode(space.read(torch.tensor([8])), None)
        torch.testing.assert_close(encoded, expected, rtol=0, atol=rounding(expected, ENDS))
        assert (
            space.encode(space.read(torch.tensor([8])), None)
            - space.encode(space.read(torch.tensor([3])), None).flip(-1)
        ).abs().max() > 1e-3

    def test_a_vae_for_other_images_is_refused(self, vae, vae_path, cache):
        with pytest.raises(DataError, match="the VAE takes 3 channels, the images have 1") as caught:
            latent_space(Digits(), str(vae_path), cache)
        assert caught.value.field == "vae"

    def test_a_pipelines_vae_is_found_in_its_folder(self, source, cache, tmp_path):
        save_vae(tmp_path / "pipeline" / "vae")
        save_vae(tmp_path / "alone")
        (tmp_path / "pipeline" / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
        ours, theirs = (
            encode(latent_space(source, str(tmp_path / name), cache), [0]) for name in ("pipeline", "alone")
        )
        assert torch.equal(ours, theirs)

    def test_a_folder_without_a_vae_is_refused(self, source, cache, tmp_path):
        (tmp_path / "empty").mkdir()
        for path in (tmp_path / "empty", tmp_path / "missing"):
            with pytest.raises(DataError, match=f"cannot load the VAE '{path}'") as caught:
                latent_space(source, str(path), cache)
            assert caught.value.field == "vae"

    def test_truncated_weights_are_refused(self, vae, vae_path, source, cache):
        weights = vae_path / "diffusion_pytorch_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:5000])
        with pytest.raises(DataError, match="cannot load the VAE"):
            latent_space(source, str(vae_path), cache)


class TestSizes:
    """Images that keep their aspects: of each size an array of its own shape."""

    @pytest.fixture
    def mixed(self, folder):
        shapes = [(16, 16), (50, 30), (33, 61), (40, 24), (24, 22)]
        images = {f"{i}.png": noise_image(i, shape) for i, shape in enumerate(shapes)}
        return image_folder(folder(images), SIDE, Buckets(SIDE, 4, 2.0))

    def test_pixels(self, mixed):
        space = PixelSpace(mixed)
        for index, size in (([0, 4], (16, 16)), ([3, 1], (12, 20)), ([2], (20, 12))):
            wanted = torch.tensor(index)
            assert space.shape(wanted) == (3, *size)
            x = space.encode(space.read(wanted), None)
            assert torch.equal(x, mixed.read(index).float() / 127.5 - 1)

    def test_latents(self, vae, vae_path, mixed, cache):
        space = latent_space(mixed, str(vae_path), cache)
        assert len(list(cache.glob("latents/*/values-*"))) == 3
        for index, size in (([0, 4], (8, 8)), ([3, 1], (6, 10)), ([2], (10, 6))):
            wanted = torch.tensor(index)
            assert space.shape(wanted) == (4, *size)
            noise = space.draw(space.read(wanted), len(index), draw(7))
            assert torch.equal(noise, torch.randn(len(index), 4, *size, generator=draw(7)))
            with torch.no_grad():
                posterior = vae.encode(mixed.read(index).float() / 127.5 - 1).latent_dist
            expected = (posterior.mean + posterior.std * noise - SHIFT) * SCALE
            encoded = space.encode(space.read(wanted), noise)
            torch.testing.assert_close(encoded, expected, rtol=0, atol=rounding(expected, ENDS))
            assert space.decode(space.encode(space.read(wanted), None)).shape == mixed.read(index).shape

    def test_latents_of_a_patched_autoencoder(self, vae_path, mixed, cache):
        flux2().save_pretrained(vae_path)
        space = latent_space(mixed, str(vae_path), cache)
        assert [space.shape(torch.tensor([i])) for i in (0, 1, 2)] == [(16, 4, 4), (16, 3, 5), (16, 5, 3)]
        for i in (0, 1, 2):
            assert space.encode(space.read(torch.tensor([i])), None).shape[1:] == space.shape(torch.tensor([i]))

    def test_reconstructions_have_the_sizes_of_the_images(self, vae, vae_path, mixed, cache):
        space = latent_space(mixed, str(vae_path), cache)
        made = Reconstructions(mixed, space, space.vae, torch.device("cpu"))
        assert torch.equal(made.sizes, mixed.sizes)
        assert torch.equal(made.frames([2, 0]), mixed.frames([2, 0]))
        for index in ([3, 1], [2], [0, 4]):
            assert torch.equal(made.read(index), space.decode(space.encode(space.read(torch.tensor(index)), None)))
