from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from repa_lab.data.fingerprint import DataError
from repa_lab.data.sources import Digits, ImageFolder
from repa_lab.data.space import PixelSpace, latent_space, to_uint8
from tests.data.conftest import noise_image

SCALE, SHIFT = 0.3611, 0.1159
SIDE = 16


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
    return ImageFolder(folder({f"{i}.png": noise_image(i, (SIDE, SIDE)) for i in range(5)}), SIDE)


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def uint8(x: torch.Tensor) -> np.ndarray:
    """The definition, in NumPy."""
    return np.clip(np.rint((x.detach().numpy() + np.float32(1)) * np.float32(127.5)), 0, 255).astype(np.uint8)


class TestPixels:
    def test_all_levels_come_back(self, folder):
        levels = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
        space = PixelSpace(ImageFolder(folder({"1.png": levels}), 16))
        x = space.encode([0], draw())
        assert (x.dtype, x.min().item(), x.max().item()) == (torch.float32, -1.0, 1.0)
        assert (space.channels, space.size) == (3, (16, 16))
        for channel in space.decode(x)[0]:
            assert channel.flatten().tolist() == list(range(256))

    def test_the_scale_is_linear(self):
        digits = Digits()
        space = PixelSpace(digits)
        assert (space.channels, space.size) == (1, (8, 8))
        expected = digits.read([3, 1]).double() / 255 * 2 - 1
        torch.testing.assert_close(space.encode([3, 1], draw()).double(), expected, rtol=0, atol=1e-7)

    def test_draws_nothing(self):
        generator = draw()
        PixelSpace(Digits()).encode([0, 1], generator)
        assert torch.equal(torch.randn(3, generator=generator), torch.randn(3, generator=draw()))

    def test_the_way_out_rounds_to_nearest_and_clamps(self):
        values = torch.tensor([-5.0, -1.0, -1 + 0.49 / 127.5, -1 + 0.51 / 127.5, 0.0, 1.0, 1.2, torch.inf, -torch.inf])
        assert to_uint8(values).tolist() == [0, 0, 0, 1, 128, 255, 255, 255, 0]
        assert to_uint8(values.double()).tolist() == to_uint8(values).tolist()


class TestLatents:
    def test_encode_is_the_scaled_draw(self, vae, vae_path, source, cache):
        space = latent_space(source, str(vae_path), cache)
        assert (space.channels, space.size) == (4, (8, 8))
        with torch.no_grad():
            posterior = vae.encode(source.read([4, 2]).float() / 127.5 - 1).latent_dist
        eps = torch.randn(2, 4, 8, 8, generator=draw(7)).double().numpy()
        mean, log_variance = posterior.mean.double().numpy(), posterior.logvar.double().numpy()
        expected = (mean + np.exp(log_variance / 2) * eps - SHIFT) * SCALE
        encoded = space.encode([4, 2], draw(7))
        assert encoded.dtype == torch.float32
        np.testing.assert_allclose(encoded.numpy(), expected, rtol=0, atol=1e-6)
        assert np.abs(expected - (mean - SHIFT) * SCALE).max() > 1e-2  # the noise is no rounding error

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
        torch.testing.assert_close(space.encode([0], draw()), (posterior.mean + posterior.std * eps) / 4, rtol=0, atol=1e-6)

    def test_the_moments_are_computed_once(self, vae, vae_path, source, cache):
        done: list[int] = []
        first = latent_space(source, str(vae_path), cache, lambda now, total: done.append(now)).encode([1, 3], draw())
        assert done[-1] == 5
        done.clear()
        again = latent_space(source, str(vae_path), cache, lambda now, total: done.append(now)).encode([1, 3], draw())
        assert done == []
        assert torch.equal(first, again)

    @pytest.mark.parametrize("change", [{"seed": 1}, {"scaling_factor": 0.5}])
    def test_a_refilled_folder_is_another_vae(self, vae, vae_path, source, cache, change):
        before = latent_space(source, str(vae_path), cache).encode([0], draw())
        shutil.rmtree(vae_path)
        save_vae(vae_path, **change)
        done: list[int] = []
        after = latent_space(source, str(vae_path), cache, lambda now, total: done.append(now)).encode([0], draw())
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
        other = ImageFolder(folder({"1.png": noise_image(9, (SIDE, SIDE))}, name="other"), SIDE)
        latent_space(other, str(vae_path), cache, lambda now, total: done.append(now))
        assert done == [1]

    def test_the_vae_is_frozen(self, vae, vae_path, source, cache):
        space = latent_space(source, str(vae_path), cache)
        x = space.encode([0], draw()).requires_grad_()
        assert not space.decode(x).requires_grad
        assert not space._vae.training
        assert not any(parameter.requires_grad for parameter in space._vae.parameters())

    def test_a_vae_for_other_images_is_refused(self, vae, vae_path, cache):
        with pytest.raises(DataError, match="the VAE takes 3 channels, the images have 1") as caught:
            latent_space(Digits(), str(vae_path), cache)
        assert caught.value.field == "vae"

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
