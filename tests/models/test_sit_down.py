from __future__ import annotations

import numpy as np
import pytest
import torch

from repa_lab.models.sit import SiTDown, SiTDownConfig
from repa_lab.models.tap import TapError
from tests.models import reference_sit_down
from tests.models.counting import count
from tests.rounding import SIT_DOWN, rounding

TINY = SiTDownConfig((2, 3, 2), 32, 2, 2, 3, (8, 12), 5)
# U-REPA's Table 2: parameters and GMACs; what the reconstruction is off by, in percent.
PUBLISHED = {"B/2": (199.7, 24.1, 2.5, 0.4), "L/2": (686.6, 79.3, 0.9, -1.3), "XL/2": (954.4, 109.3, 0.8, -1.7)}


def awake(config: SiTDownConfig = TINY) -> SiTDown:
    """A model whose every weight is at work; at initialisation the blocks do nothing."""
    model = SiTDown(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2 if parameter.ndim < 4 else 0.05)
    return model


def inputs(config: SiTDownConfig = TINY, batch: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.randn(batch, config.in_channels, *config.input_size)
    return x, torch.rand(batch), torch.arange(batch) % (config.num_classes + 1)


@pytest.mark.parametrize("size", PUBLISHED)
def test_counts_are_near_the_papers_by_what_the_docstring_says(size):
    parameters, gmacs, more_parameters, more_gmacs = PUBLISHED[size]
    with torch.device("meta"):
        model = SiTDown.from_size(size)
        x, t, y = torch.empty(1, 4, 32, 32), torch.empty(1), torch.zeros(1, dtype=torch.long)
    flops, _ = count(lambda: model(x, t, y), model)
    own = sum(p.numel() for p in model.parameters()) / 1e6
    half_a_digit = 0.05  # of the docstring's percents
    assert 100 * (own / parameters - 1) == pytest.approx(more_parameters, abs=half_a_digit)
    assert 100 * (flops / 2e9 / gmacs - 1) == pytest.approx(more_gmacs, abs=half_a_digit)
    assert model.middle_grid == (8, 8)
    assert model.grid == (16, 16)


@pytest.mark.parametrize("size_in, patch", [((8, 12), 2), ((12, 4), 2), ((4, 4), 1)])
def test_forward_agrees_with_float64(size_in, patch):
    config = SiTDownConfig((2, 3, 2), 32, 2, patch, 3, size_in, 5)
    model = awake(config)
    x, t, y = inputs(config, batch=6)
    weights = {name: p.double().numpy() for name, p in model.state_dict().items()}
    given = (x.double().numpy(), t.double().numpy(), y.numpy())
    expected = reference_sit_down.forward(weights, config.stages, config.heads, patch, *given)
    assert np.abs(expected).mean() > 0.1
    with torch.no_grad():
        np.testing.assert_allclose(model(x, t, y).numpy(), expected, rtol=0, atol=rounding(expected, SIT_DOWN))


@pytest.mark.parametrize("size_in", [8, (8, 16)])
def test_nano_runs_and_starts_at_zero(size_in):
    model = SiTDown.from_size("nano/2", in_channels=2, input_size=size_in, num_classes=3)
    side = (size_in, size_in) if isinstance(size_in, int) else size_in
    out = model(torch.randn(2, 2, *side), torch.rand(2), torch.tensor([0, 3]))
    assert torch.equal(out, torch.zeros(2, 2, *side))


def test_only_parameters_are_saved_and_every_one_learns():
    model = awake()
    x, t, y = inputs()
    model(x, t, y).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    assert model.state_dict().keys() == {name for name, _ in model.named_parameters()}
    other = SiTDown(TINY)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x, t, y), model(x, t, y))


def test_a_skip_joins_each_block_before_the_middle_with_its_counterpart_after():
    """With the way through the middle cut, what a late block is given differs from what the one before it left by a skip."""
    model = awake()
    before, after, grid = TINY.stages[0], sum(TINY.stages[:2]), model.grid
    left, given = {}, {}
    for index, block in enumerate(model.blocks):
        block.register_forward_hook(lambda module, args, output, index=index: left.update({index: output}))
        block.register_forward_pre_hook(lambda module, args, index=index: given.update({index: args[0]}))
    model.up.register_forward_hook(lambda module, args, output: torch.zeros(len(output), grid[0] * grid[1], TINY.width))
    model(*inputs())
    assert torch.equal(given[after], left[before - 1])
    for late, early in ((after + 1, before - 2),):
        assert torch.equal(given[late], left[late - 1] + left[early])


class TestTap:
    @pytest.mark.parametrize("block", range(7))
    def test_it_is_the_output_of_the_block_on_its_stages_grid(self, block):
        model = awake()
        tap = model.tap(block)
        seen: list[torch.Tensor] = []
        model.blocks[block].register_forward_hook(lambda module, args, output: seen.append(output))
        model(*inputs())
        tokens = tap.take()
        assert tokens.grid == ((2, 3) if 2 <= block < 5 else (4, 6))
        assert torch.equal(tokens.values, seen[0])

    def test_a_marked_square_of_patches_is_its_token_in_the_middle_and_no_other(self):
        """With attention still and the convolution cut to its centre, every token goes its own way."""
        model = SiTDown(TINY)
        with torch.no_grad():
            model.down.layers[1].weight[:, :, [0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 2, 0, 2, 0, 1, 2]] = 0
        tap = model.tap(3)
        x, t, y = inputs(batch=1)
        model(x, t, y)
        plain = tap.take().values
        for k in range(6):
            marked, (row, column) = x.clone(), divmod(k, 3)
            marked[..., 4 * row + 3, 4 * column + 3] += 1
            model(marked, t, y)
            assert (tap.take().values != plain).any(-1).nonzero().tolist() == [[0, k]]

    @pytest.mark.parametrize("block", [7, -1, "mid"])
    def test_a_block_that_does_not_exist_is_refused(self, block):
        with pytest.raises(TapError, match=f"sit_down has 7 blocks: block_index must be 0 to 6, got {block!r}"):
            SiTDown(TINY).tap(block)

    def test_gradients_reach_what_stands_before_it_and_nothing_beyond(self):
        model = awake()
        tap = model.tap(3)
        model(*inputs())
        tap.take().values.square().sum().backward()
        before = (*model.blocks[:4], model.down)
        after = (*model.blocks[4:], model.up, model.final_layer)
        assert all(p.grad is not None and p.grad.any() for module in before for p in module.parameters())
        assert all(p.grad is None for module in after for p in module.parameters())


def test_bfloat16_weights_work():
    model = awake().bfloat16()
    x, t, y = inputs()
    assert model(x.bfloat16(), t, y).dtype == torch.bfloat16


def test_what_cannot_be_built_is_refused():
    with pytest.raises(ValueError, match=r"input size \(8, 10\) is not a multiple of 4, twice the patch size"):
        SiTDownConfig((1, 1, 1), 32, 2, 2, 3, (8, 10), 5)
    with pytest.raises(ValueError, match=r"stages \(1, 1, 2\): a skip joins each block"):
        SiTDownConfig((1, 1, 2), 32, 2, 2, 3, (8, 8), 5)
    with pytest.raises(ValueError, match=r"unknown size of sit_down 'XL/4'; .*; did you mean 'XL/2'\?"):
        SiTDown.from_size("XL/4")
