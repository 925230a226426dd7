"""Every family of diffusers, from a tiny model of its class: what is tapped are the image's tokens, in their order, alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from repa_lab.models.denoiser import Denoiser, build_net, network_of, tap_denoiser
from repa_lab.models.facts import Family
from repa_lab.models.families import FAMILIES
from repa_lab.models.tap import TapError

OURS = [family for family in FAMILIES.values() if family.network]
families = pytest.mark.parametrize("family", OURS, ids=lambda family: family.name)
TOKENS = 7
GRID = (3, 2)  # of what is tapped: not square
# Their tokens see each other by more than softmax attention and convolutions.
MIXING = {"sana"}


def make(family: Family) -> Denoiser:
    """A tiny model of the family with no weight at zero, so that nothing is passed over."""
    torch.manual_seed(0)
    net = build_net(family, network_of(family).tiny)
    for parameter in net.parameters():
        if not parameter.any() or parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3):
            centre = layer.weight.detach()[:, :, 1, 1].clone()
            layer.weight.data.zero_()[:, :, 1, 1] = centre  # it sees what it stands on, and no neighbour
    return Denoiser(net, family).eval()


def given(family: Family, denoiser: Denoiser, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Latents, times and conditioning; where texts are masked, the second is two tokens shorter."""
    stride, config = family.shapes[""].stride, denoiser.net.config
    channels = network_of(family).tiny.get("latent_channels") or latent_channels(family, denoiser)
    latents = torch.randn(batch, channels, GRID[0] * stride, GRID[1] * stride)
    condition = {name: torch.randn(batch, *shape) for name, shape in network_of(family).condition(config, TOKENS).items()}
    for mask in (name for name in condition if "mask" in name):
        condition[mask] = torch.ones(batch, TOKENS, dtype=torch.long)
        condition[mask][1, -2:] = 0
    return latents, torch.tensor([0.3, 0.7])[:batch], condition


def latent_channels(family: Family, denoiser: Denoiser) -> int:
    """Of the tiny model: what is packed 2x2 has four values a cell."""
    packed = network_of(family).output.__name__ == "unpack"
    return int(denoiser.net.config.in_channels) // (4 if packed else 1)


@contextmanager
def apart() -> Iterator[None]:
    """Every token attends to itself alone, none to another sequence, and nothing is normalised over an image: what is left
    maps tokens one by one."""
    attend, normalise = F.scaled_dot_product_attention, F.group_norm

    def alone(query, key, value, *args, **kwargs):
        if query.shape[-2] != key.shape[-2]:
            return query * 0
        repeat = query.shape[-3] // value.shape[-3]
        return value.repeat_interleave(repeat, dim=-3) if repeat > 1 else value

    F.scaled_dot_product_attention, F.group_norm = alone, lambda values, *args, **kwargs: values
    try:
        yield
    finally:
        F.scaled_dot_product_attention, F.group_norm = attend, normalise


def blocks_of(family: Family, denoiser: Denoiser) -> list[int | str]:
    if family.kind == "unet":
        return ["mid"]
    return list(range(sum(len(denoiser.net.get_submodule(blocks.path)) for blocks in network_of(family).blocks)))


def captured(denoiser: Denoiser, block: int | str, *inputs) -> torch.Tensor:
    tap = tap_denoiser(denoiser, block)
    with torch.no_grad():
        denoiser(*inputs)
    tokens = tap.take()
    tap.remove()
    assert tokens.grid == GRID
    return tokens.values


@families
def test_the_prediction_has_the_latents_shape_and_every_block_the_grids_tokens(family):
    denoiser = make(family)
    latents, time, condition = given(family, denoiser)
    with torch.no_grad():
        assert denoiser(latents, time, condition).shape == latents.shape
    for block in blocks_of(family, denoiser):
        values = captured(denoiser, block, latents, time, condition)
        assert values.shape[:2] == (2, GRID[0] * GRID[1])
        assert values.isfinite().all()


@families
def test_a_marked_patch_shows_at_its_own_row(family):
    denoiser, stride = make(family), family.shapes[""].stride
    latents, time, condition = given(family, denoiser)
    for block in blocks_of(family, denoiser):
        for row in range(GRID[0] * GRID[1]):
            y, x = row // GRID[1], row % GRID[1]
            marked = latents.clone()
            marked[:, :, y * stride : (y + 1) * stride, x * stride : (x + 1) * stride] += 1.0
            with apart():
                before, after = (captured(denoiser, block, one, time, condition) for one in (latents, marked))
            change = (after - before).norm(dim=-1)
            if family.name in MIXING:
                assert change.argmax(dim=1).tolist() == [row, row], (block, row)
            else:
                assert [sample.nonzero().flatten().tolist() for sample in change] == [[row], [row]], (block, row)


@families
def test_a_marked_word_shows_at_no_row(family):
    denoiser = make(family)
    latents, time, condition = given(family, denoiser)
    sequences = [name for name, value in condition.items() if value.ndim == 3]
    assert sequences or family.name == "dit"
    for name in sequences:
        for position in (0, TOKENS - 3):  # which no text lacks
            marked = {**condition, name: condition[name].clone()}
            marked[name][:, position] += 1.0
            for block in blocks_of(family, denoiser):
                with apart():
                    before, after = (captured(denoiser, block, latents, time, one) for one in (condition, marked))
                assert torch.equal(before, after), (name, position, block)


@families
def test_gradients_are_those_without_checkpointing(family):
    denoiser = make(family)
    inputs = given(family, denoiser)
    block = blocks_of(family, denoiser)[-1]

    def gradients() -> dict[str, torch.Tensor]:
        denoiser.zero_grad()
        tap = tap_denoiser(denoiser, block)
        (denoiser(*inputs).square().mean() + tap.take().values.square().mean()).backward()
        tap.remove()
        return {name: p.grad.clone() for name, p in denoiser.named_parameters() if p.grad is not None}

    if not getattr(denoiser.net, "_supports_gradient_checkpointing", False):
        pytest.skip(f"diffusers' {type(denoiser.net).__name__} cannot be checkpointed")
    denoiser.train()
    plain = gradients()
    denoiser.net.enable_gradient_checkpointing()
    found = gradients()
    assert plain.keys() == found.keys()
    assert plain
    assert all(torch.equal(plain[name], found[name]) for name in plain)


@families
@pytest.mark.parametrize("index", [-1, 999, "mad"])
def test_a_block_that_is_not_there_is_refused(family, index):
    denoiser = make(family)
    depth = len(blocks_of(family, denoiser))
    allowed = "'mid'" if family.kind == "unet" else f"0 to {depth - 1}"
    with pytest.raises(TapError, match=f"{family.name}: block_index must be {allowed}, got"):
        tap_denoiser(denoiser, index)


@families
def test_the_released_model_is_what_the_facts_say(family):
    network, shape = network_of(family), family.shapes[""]
    with torch.device("meta"):
        net = build_net(family, network.config)
    assert sum(p.numel() for p in net.parameters()) == network.parameters
    denoiser = Denoiser(net, family)
    if family.kind == "transformer":
        assert len(blocks_of(family, denoiser)) == shape.depth
    side = network.native // family.latent_stride
    latents = torch.empty(1, network.channels, side, side, device="meta")
    condition = {
        name: torch.empty(1, *size, device="meta", dtype=torch.long if "mask" in name else None)
        for name, size in network.condition(net.config, 77).items()
    }
    tap = tap_denoiser(denoiser, shape.block)
    with torch.no_grad():
        denoiser(latents, torch.empty(1, device="meta"), condition)
    tokens = tap.take()
    assert tokens.dim == shape.width
    assert tokens.grid == (side // shape.stride, side // shape.stride)
