from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from repa_lab.align import REPA, UREPA, Signals, Tokens
from repa_lab.align.settings import EncoderSettings
from repa_lab.data import DataError
from repa_lab.data.crop import Buckets
from repa_lab.data.latents import Autoencoder, Reconstructions, latent_space
from repa_lab.data.sources import Flips, ImageFolder
from repa_lab.encoders import targets
from repa_lab.encoders.encoder import EncoderOptions, load_encoder
from repa_lab.encoders.registry import ENCODERS
from repa_lab.encoders.targets import CachedTargets, OnlineTargets, cached_targets, packed, unpacked
from repa_lab.timm_models import EncoderError, lite0_model
from tests.align.references import align
from tests.data.autoencoders import kl, tiny
from tests.data.conftest import image_folder, noise_image
from tests.data.test_cache import flip_bit
from tests.rounding import LITE0, rounding

CPU = torch.device("cpu")
COUNT = 6
PLAIN = EncoderOptions()


def make_source(folder, count: int = COUNT, first: int = 0) -> ImageFolder:
    folder.mkdir()
    for i in range(count):
        noise_image(first + i, (16, 16)).save(folder / f"{i}.png")
    return image_folder(folder, 16)


@pytest.fixture
def source(tmp_path):
    return make_source(tmp_path / "images")


@pytest.fixture
def loads(monkeypatch):
    """The names of the encoders that were loaded."""
    names: list[str] = []

    def counted(name, *args):
        names.append(name)
        return load_encoder(name, *args)

    monkeypatch.setattr(targets, "load_encoder", counted)
    return names


@pytest.fixture
def cached(tmp_path, source):
    def cached(source=source, name="efficientnet_lite0", size=48, weights=None, standardize=False, **options):
        encoder = EncoderSettings(name=name, image_size=size, weights=weights, standardize=standardize)
        return cached_targets(source, encoder, tmp_path / "cache", CPU, **options)

    return cached


@pytest.fixture
def online(source):
    def online(source=source, options=PLAIN):
        return OnlineTargets(load_encoder("efficientnet_lite0", 48, 16, None, options), "it", source, CPU)

    return online


EVERYTHING = torch.arange(COUNT)


def stores(tmp_path) -> list[dict]:
    paths = (tmp_path / "cache" / "features").glob("*/manifest.json")
    return [json.loads(path.read_text())["identity"] for path in paths]


def test_features_kept_in_float32_are_the_encoders_own_bit_for_bit(cached, online):
    offline = cached(storage="fp32")
    assert offline.dim == online().dim == 112
    fresh, kept = online()(EVERYTHING, CPU), offline(EVERYTHING, CPU)
    assert fresh.grid == kept.grid == (3, 3)
    assert torch.equal(fresh.values, kept.values)
    assert torch.equal(cached(storage="fp32")(EVERYTHING, CPU).values, kept.values)  # read again from disk


def test_features_kept_in_float16_are_the_encoders_own_rounded(cached, online):
    kept = cached()(EVERYTHING, CPU).values
    assert kept.dtype == torch.float32
    expected = online()(EVERYTHING, CPU).values.numpy().astype(np.float16).astype(np.float32)
    assert np.array_equal(kept.numpy(), expected)


@pytest.mark.parametrize("urepa", [False, True])
@pytest.mark.parametrize("standardize", [False, True])
def test_the_loss_on_cached_features_is_that_on_fresh_ones(cached, online, urepa, standardize):
    torch.manual_seed(1)
    regularizer = (UREPA if urepa else REPA)(8, 112, weight=1.0, projector={"width": 16})
    student = Tokens(torch.randn(COUNT, 9, 8), (3, 3))

    def loss(source: CachedTargets | OnlineTargets) -> float:
        return align(regularizer, student, source(EVERYTHING, CPU)).loss.item()

    exact = loss(cached(storage="fp32", standardize=standardize))
    half = loss(cached(storage="fp16", standardize=standardize))
    assert half == pytest.approx(exact, rel=2 * 2.0**-11)  # float16 is off by 2**-11 at most
    assert half != exact
    if not standardize:
        assert loss(online()) == exact


def test_images_are_picked_by_index(cached, online):
    offline = cached(storage="fp32")
    everything, index = offline(EVERYTHING, CPU).values, torch.tensor([4, 0, 4])
    assert torch.equal(offline(index, CPU).values, everything[index])
    # A convolution's rounding depends on the batch it runs in, hence the tolerance.
    torch.testing.assert_close(online()(index, CPU).values, everything[index], rtol=0, atol=rounding(everything, LITE0))


def test_standardized_channels_have_mean_0_and_std_1(cached):
    plain = cached()(torch.arange(COUNT), CPU).values.double().flatten(0, 1)
    scaled = cached(standardize=True)(torch.arange(COUNT), CPU).values.double().flatten(0, 1)
    assert plain.mean(0).abs().max() > 1
    error = rounding(plain / plain.std(0, correction=0), (4, 1))  # float32 moments of a float32 feature
    assert scaled.mean(0).abs().max() < error
    np.testing.assert_allclose(scaled.std(0, correction=0), 1, rtol=0, atol=error)
    expected = (plain - plain.mean(0)) / plain.std(0, correction=0)
    np.testing.assert_allclose(scaled, expected, rtol=0, atol=error)


def test_a_constant_channel_becomes_0(cached, source, tmp_path):
    state = lite0_model().state_dict()
    # The last layer of the stage, and the blocks before it that are added to it, silenced in channel 5.
    for name in ("blocks.4.0.bn3", "blocks.4.1.bn3", "blocks.4.2.bn3"):
        state[f"{name}.weight"][5], state[f"{name}.bias"][5] = 0, 0.3
    save_file(state, tmp_path / "silent.safetensors")
    tokens = cached(weights=str(tmp_path / "silent.safetensors"), standardize=True)(torch.arange(COUNT), CPU).values
    assert tokens.isfinite().all()
    assert tokens[..., 5].abs().max() < 1e-3
    assert tokens[..., 6].std() > 0.9


def e4m3(values: np.ndarray) -> np.ndarray:
    """The nearest numbers with four exponent bits of bias 7 and three mantissa bits, halves to even (2209.05433)."""
    exponent = np.maximum(np.floor(np.log2(np.maximum(np.abs(values), 2.0**-20))), -6)
    step = 2.0 ** (exponent - 3)
    return np.rint(values / step) * step


@pytest.mark.parametrize("storage, largest, bound", [("int8", 127, 0.5 / 127), ("fp8", 448, 2.0**-4)])
def test_a_byte_for_each_value_and_a_scale_for_each_token(cached, tmp_path, storage, largest, bound):
    exact = cached(storage="fp32")(EVERYTHING, CPU).values.numpy()
    kept = cached(storage=storage)
    assert kept.dim == 112
    assert kept.reader(EVERYTHING).shape == (COUNT, 3, 3, 112 + 4)
    found = kept(EVERYTHING, CPU).values.numpy()
    scale = (np.abs(exact).max(-1, keepdims=True) / largest).astype(np.float32)
    codes = exact.astype(np.float32) / scale
    expected = scale * (np.rint(codes) if storage == "int8" else e4m3(codes.astype(np.float64))).astype(np.float32)
    np.testing.assert_array_equal(found, expected.astype(np.float32))
    of_largest = np.abs(found - exact) / (np.abs(exact) if storage == "fp8" else np.abs(exact).max(-1, keepdims=True))
    assert of_largest[np.abs(exact) > 2.0**-6 * scale].max() <= bound * (1 + 1e-6)
    sizes = {json.loads(path.read_text())["identity"]["storage"]: sum(
        values.stat().st_size for values in path.parent.glob("values-*")
    ) for path in (tmp_path / "cache" / "features").glob("*/manifest.json")}  # fmt: skip
    assert sizes == {"float32": COUNT * 9 * 112 * 4, storage: COUNT * 9 * 116}


@pytest.mark.parametrize("storage", ["int8", "fp8"])
def test_an_empty_token_stays_empty_and_a_token_that_is_not_finite_is_nan(storage):
    tokens = torch.tensor([[0.0, 0.0], [1e-30, -1e-30], [3e38, -1e38], [torch.inf, 1.0], [torch.nan, 1.0]])
    found = unpacked(packed(tokens, storage), storage)
    assert found[0].tolist() == [0, 0]
    torch.testing.assert_close(found[1:3], tokens[1:3], rtol=0.04, atol=0)  # fp8 keeps 448 / 3 = 149.3 as 144
    assert found[3:].isnan().all()


def test_what_float16_cannot_hold_is_refused():
    # 65520 is the least float32 that rounds to infinity.
    assert packed(torch.tensor([65519.0]), "fp16").tolist() == [65504]
    with pytest.raises(DataError) as caught:
        packed(torch.tensor([1.0, -65520.0]), "fp16")
    assert str(caught.value) == (
        "a value of 65520 is too large to be stored as float16 (up to 65504); set run.encoder_storage: fp32"
    )
    assert caught.value.field == "encoder_storage"
    assert packed(torch.tensor([torch.inf]), "fp16").tolist() == [torch.inf]  # which is no fault of the storage


@pytest.mark.parametrize("storage", ["int8", "fp8", "fp16"])
@pytest.mark.parametrize("urepa", [False, True])
def test_gradients_point_where_those_of_float32_do(cached, storage, urepa):
    def gradient(kind: str) -> torch.Tensor:
        torch.manual_seed(1)
        regularizer = (UREPA if urepa else REPA)(8, 112, weight=1.0, projector={"width": 16})
        values = torch.randn(COUNT, 9, 8, requires_grad=True)
        targets = cached(storage=kind, standardize=True)(EVERYTHING, CPU)
        regularizer(Signals(taps=(Tokens(values, (3, 3)),), encoders=(targets,))).value.backward()
        return torch.cat([values.grad.flatten(), *(weight.grad.flatten() for weight in regularizer.parameters())])

    exact, found = gradient("fp32").double(), gradient(storage).double()
    assert torch.cosine_similarity(exact, found, dim=0) > 0.999
    assert not torch.equal(exact, found)


def test_standardizing_shares_the_cache(cached, loads):
    cached()
    cached(standardize=True)
    assert loads == ["efficientnet_lite0"]


def test_the_encoder_is_loaded_only_for_what_is_missing(cached, loads, tmp_path):
    cached()
    cached()
    assert loads == ["efficientnet_lite0"]
    next((tmp_path / "cache").glob("features/*/values-*")).unlink()
    cached()
    assert loads == ["efficientnet_lite0"] * 2
    cached(size=32)
    assert loads == ["efficientnet_lite0"] * 3


def test_every_part_of_the_identity_is_a_key(cached, tmp_path, loads):
    state = lite0_model().state_dict()
    save_file(state, tmp_path / "a.safetensors")
    (tmp_path / "copy.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes())
    state["conv_stem.weight"] *= 2
    save_file(state, tmp_path / "b.safetensors")
    cached()
    cached(size=32)
    cached(source=make_source(tmp_path / "others", 3, first=100))
    first = cached(weights=str(tmp_path / "a.safetensors"))
    second = cached(weights=str(tmp_path / "b.safetensors"))
    cached(storage="fp32")
    cached(storage="fp8")
    cached(options=EncoderOptions(precision="bf16"))
    assert len(stores(tmp_path)) == len(loads) == 8
    cached(weights=str(tmp_path / "copy.safetensors"))
    cached(options=EncoderOptions(batch_size=2))
    assert len(stores(tmp_path)) == len(loads) == 8  # the same content under another name, and in other portions
    assert not torch.equal(first(torch.arange(3), CPU).values, second(torch.arange(3), CPU).values)


def test_features_after_the_final_norm_are_never_taken_for_those_before_it(cached, tmp_path, loads, monkeypatch):
    """A cache that was filled when the encoder's row said otherwise, or nothing."""
    with monkeypatch.context() as patched:
        patched.setitem(ENCODERS._entries, "mae_vitb16", (replace(ENCODERS["mae_vitb16"], norm=True), None))
        normed = cached(name="tiny-mae_vitb16", storage="fp32")(EVERYTHING, CPU).values
        assert [identity.get("norm") for identity in stores(tmp_path)] == [None]
    plain = cached(name="tiny-mae_vitb16", storage="fp32")(EVERYTHING, CPU).values
    assert sorted(identity.get("norm", True) for identity in stores(tmp_path)) == [False, True]
    assert len(loads) == 2
    norm = load_encoder("tiny-mae_vitb16", 48, 16).model.norm
    torch.testing.assert_close(norm(plain), normed)
    assert not torch.allclose(plain, normed, atol=0.1)


def test_features_of_other_images_are_never_read(cached, tmp_path, loads):
    """A folder of features is renamed to where those of other images are looked for."""
    other = make_source(tmp_path / "others", first=100)
    cached()
    (mine,) = (tmp_path / "cache" / "features").iterdir()
    cached(source=other)
    (theirs,) = (path for path in mine.parent.iterdir() if path != mine)
    shutil.rmtree(theirs)
    shutil.copytree(mine, theirs)
    with pytest.raises(DataError) as caught:
        cached(source=other)
    assert f"'{theirs}' is not the cache of these images" in str(caught.value)
    assert ": data differ; delete it" in str(caught.value)
    shutil.rmtree(theirs)
    assert not torch.equal(cached(source=other)(EVERYTHING, CPU).values, cached()(EVERYTHING, CPU).values)


def test_a_flipped_bit_is_found_and_the_features_computed_again(cached, tmp_path, loads):
    before = cached()(EVERYTHING, CPU).values
    (file,) = (tmp_path / "cache").glob("features/*/values-*")
    flip_bit(file, file.stat().st_size // 2)
    assert torch.equal(cached()(EVERYTHING, CPU).values, before)
    assert loads == ["efficientnet_lite0"] * 2


def test_features_of_mirrored_images_are_the_encoders_of_mirrored_pixels(cached, source):
    kept = cached(source=Flips(source), storage="fp32")
    encoder = load_encoder("efficientnet_lite0", 48, 16)
    plain, mirrored = kept(EVERYTHING, CPU).values, kept(EVERYTHING + COUNT, CPU).values
    error, pixels = rounding(plain, LITE0), source.read(range(COUNT))
    torch.testing.assert_close(plain, encoder(pixels).values, rtol=0, atol=error)
    torch.testing.assert_close(mirrored, encoder(pixels.flip(-1)).values, rtol=0, atol=error)
    assert (plain - mirrored).abs().amax((1, 2)).min() > 0.1
    grid_mirrored = plain.unflatten(1, (3, 3)).flip(2).flatten(1, 2)
    assert (grid_mirrored - mirrored).abs().max() > 0.1  # an encoder does not commute with mirroring


@pytest.mark.parametrize("kind", ["vae", "tae"])
def test_features_of_reconstructions_are_the_same_cached_and_online(cached, online, source, tmp_path, kind):
    kl().save_pretrained(tmp_path / "vae")
    space = latent_space(source, str(tmp_path / "vae"), tmp_path / "cache")
    decoder = space.vae if kind == "vae" else Autoencoder(tiny(), "tae")
    made = Reconstructions(source, space, decoder, CPU)
    kept = cached(source=made, storage="fp32")(EVERYTHING, CPU).values
    assert torch.equal(kept, online(source=made)(EVERYTHING, CPU).values)
    assert not torch.allclose(kept, cached(storage="fp32")(EVERYTHING, CPU).values, atol=0.1)
    assert len(stores(tmp_path)) == 2


def test_precision_is_passed_on(cached, online):
    half = cached(storage="fp32", options=EncoderOptions(precision="bf16"))(EVERYTHING, CPU).values
    assert torch.equal(half, online(options=EncoderOptions(precision="bf16"))(EVERYTHING, CPU).values)
    full = cached(storage="fp32")(EVERYTHING, CPU).values
    assert 1e-3 < (half - full).norm() / full.norm() < 0.1


def test_what_is_no_patch_grid_is_refused_before_anything_is_computed(cached, tmp_path):
    with pytest.raises(EncoderError, match="'efficientnet_lite0' gives one token an image"):
        cached(size=16)
    assert not list((tmp_path / "cache").glob("features/*/values-*"))


def test_an_online_encoder_passes_the_preflight_too(source):
    with pytest.raises(EncoderError, match="'lite0' gives one token an image"):
        OnlineTargets(load_encoder("efficientnet_lite0", 16, 16), "lite0", source, CPU)


class TestSizes:
    """Images that keep their aspects are seen by the encoder on grids of their own."""

    # Images by their size (height x width): 64x64, 48x80 and 80x48; and their grids by the papers' rule, a token for 16 pixels.
    GROUPS = (([0, 4], (4, 4)), ([3, 1], (3, 5)), ([2], (5, 3)))

    @pytest.fixture
    def mixed(self, tmp_path):
        root = tmp_path / "mixed"
        root.mkdir()
        for i, shape in enumerate([(64, 64), (80, 48), (48, 80), (160, 96), (70, 64)]):
            noise_image(i, shape).save(root / f"{i}.png")
        return image_folder(root, 64, Buckets(64, 16, 2.0))

    def make(self, mixed, tmp_path, cached=True, size=None, standardize=False, **options):
        if not cached:
            return OnlineTargets(load_encoder("efficientnet_lite0", size, 64), "it", mixed, CPU)
        encoder = EncoderSettings(name="efficientnet_lite0", image_size=size, standardize=standardize)
        return cached_targets(mixed, encoder, tmp_path / "cache", CPU, storage="fp32", **options)

    @pytest.mark.parametrize("cached", [True, False])
    def test_every_image_has_the_encoders_own_tokens(self, mixed, tmp_path, cached):
        targets, encoder = self.make(mixed, tmp_path, cached), load_encoder("efficientnet_lite0", None, 64)
        for index, grid in self.GROUPS:
            found = targets(torch.tensor(index), CPU)
            assert (found.grid, found.values.shape) == (grid, (len(index), grid[0] * grid[1], 112))
            expected = encoder(mixed.read(index)).values
            torch.testing.assert_close(found.values, expected, rtol=0, atol=rounding(expected, LITE0))
            read = targets.reader(torch.tensor(index))
            assert torch.equal(targets(torch.tensor(index), CPU, read).values, found.values)

    @pytest.mark.parametrize("cached", [True, False])
    def test_a_size_that_is_given_is_that_of_squares(self, mixed, tmp_path, cached):
        targets = self.make(mixed, tmp_path, cached, size=96)
        # By hand: 96 * sqrt(48/80) = 74.4 is nearest to 5 patches of 16, 96 * sqrt(80/48) = 123.9 to 8.
        grids = [targets(torch.tensor(index), CPU).grid for index, _ in self.GROUPS]
        assert grids == [(6, 6), (5, 8), (8, 5)]

    def test_standardizing_is_over_all_sizes(self, mixed, tmp_path):
        plain, scaled = (self.make(mixed, tmp_path, standardize=on) for on in (False, True))
        indices = [torch.tensor(index) for index, _ in self.GROUPS]
        tokens = np.concatenate([plain(index, CPU).values.double().flatten(0, 1).numpy() for index in indices])
        assert tokens.shape == (2 * 16 + 3 * 15, 112)
        for index in indices:
            expected = (plain(index, CPU).values.double().numpy() - tokens.mean(0)) / tokens.std(0)
            error = rounding(tokens / tokens.std(0), (4, 1))
            np.testing.assert_allclose(scaled(index, CPU).values, expected, rtol=0, atol=error)

    def test_the_progress_is_over_all_sizes(self, mixed, tmp_path):
        heard: list[tuple[int, int]] = []
        self.make(mixed, tmp_path, progress=lambda *told: heard.append(told))
        assert heard == [(2, 5), (4, 5), (5, 5)]
