from __future__ import annotations

import pytest
import torch

from repa_lab.models.family import UNET_SHAPES
from repa_lab.models.scratch import UNet
from repa_lab.models.tap import capture

SHAPE = UNET_SHAPES["nano"]


def mid_block(model: UNet, size: tuple[int, int]):
    with capture(model.net.mid_block) as tap:
        model(torch.empty(2, 4, *size), torch.empty(2), torch.zeros(2, dtype=torch.long))
        return tap.take()


@pytest.mark.parametrize("name, grid, width", [("S", (8, 12), 384), ("B", (4, 6), 960)])
def test_the_mid_block_of_every_size(name, grid, width):
    with torch.device("meta"):
        tokens = mid_block(UNet(UNET_SHAPES[name], 4, (32, 48), 1000), (32, 48))
    assert (tokens.grid, tokens.dim) == (grid, width)
    assert tokens.values.shape == (2, grid[0] * grid[1], width)


@pytest.fixture(scope="module")
def model() -> UNet:
    torch.manual_seed(0)
    return UNet(SHAPE, 3, (8, 8), 5).eval()


@torch.no_grad()
def test_shapes_in_are_shapes_out(model):
    for size in ((8, 8), (4, 12)):
        x = torch.randn(2, 3, *size)
        out = model(x, torch.rand(2), torch.tensor([0, 5]))
        assert out.shape == x.shape
        assert out.std() > 0


@torch.no_grad()
def test_the_null_label_is_the_last_row(model):
    table = model.net.class_embedding.weight
    assert len(table) == 6
    x, t, y = torch.randn(6, 3, 8, 8), torch.rand(6), torch.arange(6)
    before, row = model(x, t, y), table[5].clone()
    table[5] += 1
    changed = (model(x, t, y) - before).flatten(1).abs().amax(1)
    table[5] = row
    assert (changed > 1e-6).tolist() == [False] * 5 + [True]
    with pytest.raises(IndexError):
        model(x, t, y + 1)


@torch.no_grad()
def test_time_is_scaled_to_the_range_that_diffusers_expects(model):
    x, y = torch.randn(2, 3, 8, 8), torch.tensor([1, 2])
    expected = model.net(x, torch.tensor([250.0, 1000.0]), class_labels=y).sample
    assert torch.equal(model(x, torch.tensor([0.25, 1.0]), y), expected)


def test_attention_stands_in_every_level_but_the_first(model):
    down, up = ([hasattr(block, "attentions") for block in way] for way in (model.net.down_blocks, model.net.up_blocks))
    assert down == [False] + [True] * (len(SHAPE.channels) - 1)
    assert up == down[::-1]
