"""What stands for an autoencoder in caches and fingerprints."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator

import pytest
import torch
from diffusers import AutoencoderKL

from repa_lab.data.latents import Autoencoder, weights_digest
from tests.data.autoencoders import kl


@pytest.fixture
def vae() -> AutoencoderKL:
    """So wide that torch adds its weights in several threads, and the weights of such sizes that this rounds differently."""
    torch.manual_seed(0)
    vae = kl(block_out_channels=(64, 64))
    for parameter in vae.parameters():
        parameter.data *= torch.exp(3 * torch.randn_like(parameter))
    return vae


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def digest_of(vae: AutoencoderKL) -> str:
    return Autoencoder(vae, "vae").identity["weights"]


def test_the_digest_is_of_names_types_shapes_and_bytes():
    state = {"b": torch.tensor([[1.5, -2.0]]), "a": torch.tensor(7, dtype=torch.int16)}
    content = b"a torch.int16 ()\n" + struct.pack("<h", 7) + b"b torch.float32 (1, 2)\n" + struct.pack("<2f", 1.5, -2.0)
    assert weights_digest(state) == hashlib.sha256(content).hexdigest()


def test_it_does_not_depend_on_the_number_of_threads(vae, threads):
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append((digest_of(vae), [value.double().sum().item() for value in vae.state_dict().values()]))
    digests, sums = zip(*found, strict=True)
    assert digests == (digests[0],) * 3
    assert sums[0] != sums[1]  # the sums of the same weights do


def test_it_does_not_depend_on_how_tensors_lie_in_memory(vae):
    before, weight = digest_of(vae), vae.encoder.conv_in.weight
    vae.to(memory_format=torch.channels_last)
    assert not weight.is_contiguous()
    assert digest_of(vae) == before
    state = {"spread": torch.arange(12.0).reshape(3, 4).t(), "part": torch.arange(8)[::2], "none": torch.empty(0, 2)}
    assert weights_digest(state) == weights_digest({name: value.contiguous() for name, value in state.items()})


def test_one_bit_changes_it(vae):
    before, sums = digest_of(vae), [value.double().sum().item() for value in vae.state_dict().values()]
    flat = vae.encoder.conv_in.weight.data.view(torch.int32).view(-1)
    flat[5] ^= 1
    assert digest_of(vae) != before
    flat[5] ^= 1
    assert digest_of(vae) == before
    assert sums == [value.double().sum().item() for value in vae.state_dict().values()]


def test_the_same_weights_in_other_places_change_it(vae):
    before, total = digest_of(vae), vae.encoder.conv_in.weight.double().sum()
    flat = vae.encoder.conv_in.weight.data.view(-1)
    flat[[3, 11]] = flat[[11, 3]]
    torch.testing.assert_close(vae.encoder.conv_in.weight.double().sum(), total)
    assert digest_of(vae) != before


@pytest.mark.parametrize("other", [
    {"x": torch.zeros(4)}, {"w": torch.zeros(2, 2)}, {"w": torch.zeros(4, dtype=torch.int32)}, {"w": torch.zeros(2, dtype=torch.float64)},
])  # fmt: skip
def test_equal_bytes_under_another_name_shape_or_type_change_it(other):
    assert weights_digest(other) != weights_digest({"w": torch.zeros(4)})
