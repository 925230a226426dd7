from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from repa_lab.data import store
from repa_lab.data.sources import ImageFolder
from repa_lab.encoders import targets
from repa_lab.encoders.encoder import EncoderError, lite0_model, load_encoder
from repa_lab.encoders.targets import OnlineTargets, cached_targets
from tests.data.conftest import noise_image

CPU = torch.device("cpu")
COUNT = 6


def make_source(folder, count: int = COUNT, first: int = 0) -> ImageFolder:
    folder.mkdir()
    for i in range(count):
        noise_image(first + i, (16, 16)).save(folder / f"{i}.png")
    return ImageFolder(folder, 16)


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
    def cached(source=source, name="efficientnet_lite0", size=48, weights=None, standardize=False):
        return cached_targets(source, name, size, weights, standardize, tmp_path / "cache", CPU)

    return cached


def stores(tmp_path) -> list[dict]:
    return [json.loads(path.read_text()) for path in (tmp_path / "cache" / "features").glob("*/manifest.json")]


def test_cached_features_are_the_encoders_own(cached, source):
    online = OnlineTargets(load_encoder("efficientnet_lite0", 48, 16), "it", source, CPU)
    offline = cached()
    assert offline.dim == online.dim == 112
    everything = torch.arange(COUNT)
    fresh, kept = online(everything, CPU), offline(everything, CPU)
    assert fresh.grid == kept.grid == (3, 3)
    assert torch.equal(fresh.values, kept.values)
    assert torch.equal(cached()(everything, CPU).values, kept.values)  # read again from disk


def test_images_are_picked_by_index(cached, source):
    online = OnlineTargets(load_encoder("efficientnet_lite0", 48, 16), "it", source, CPU)
    everything, index = cached()(torch.arange(COUNT), CPU).values, torch.tensor([4, 0, 4])
    assert torch.equal(cached()(index, CPU).values, everything[index])
    # A convolution's rounding depends on the batch it runs in, hence the tolerance.
    torch.testing.assert_close(online(index, CPU).values, everything[index], rtol=1e-5, atol=1e-4)


def test_standardized_channels_have_mean_0_and_std_1(cached):
    plain = cached()(torch.arange(COUNT), CPU).values.double().flatten(0, 1)
    scaled = cached(standardize=True)(torch.arange(COUNT), CPU).values.double().flatten(0, 1)
    assert plain.mean(0).abs().max() > 1
    assert scaled.mean(0).abs().max() < 1e-5
    np.testing.assert_allclose(scaled.std(0, correction=0), 1, atol=1e-5)
    np.testing.assert_allclose(scaled, (plain - plain.mean(0)) / plain.std(0, correction=0), atol=1e-5)


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


def test_standardizing_shares_the_cache(cached, loads):
    cached()
    cached(standardize=True)
    assert loads == ["efficientnet_lite0"]


def test_the_encoder_is_loaded_only_for_what_is_missing(cached, loads, monkeypatch, tmp_path):
    monkeypatch.setattr(store, "_SHARD", 4)
    cached()
    cached()
    assert loads == ["efficientnet_lite0"]
    shard = next((tmp_path / "cache").glob("features/*/values-00000004.safetensors"))
    shard.unlink()
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
    assert len(stores(tmp_path)) == len(loads) == 5
    cached(weights=str(tmp_path / "copy.safetensors"))
    assert len(stores(tmp_path)) == len(loads) == 5  # the same content under another name
    assert not torch.equal(first(torch.arange(3), CPU).values, second(torch.arange(3), CPU).values)


def test_what_is_no_patch_grid_is_refused_before_anything_is_computed(cached, tmp_path):
    with pytest.raises(EncoderError, match="'efficientnet_lite0' gives one token an image"):
        cached(size=16)
    assert not list((tmp_path / "cache").glob("features/*/values-*"))


def test_an_online_encoder_passes_the_preflight_too(source):
    with pytest.raises(EncoderError, match="'lite0' gives one token an image"):
        OnlineTargets(load_encoder("efficientnet_lite0", 16, 16), "lite0", source, CPU)
