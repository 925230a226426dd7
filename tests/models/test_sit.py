from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from repa_lab.models.sit import SiT, SiTConfig, sincos_positions, timestep_features
from tests.models import reference_sit
from tests.rounding import SIT, UNIT, rounding

# depth, width, heads, patch, channels, (height, width), classes
TINY = SiTConfig(3, 32, 4, 2, 3, (6, 10), 5)


def awake(config: SiTConfig = TINY) -> SiT:
    """A SiT whose every weight is at work; at initialisation the blocks do nothing."""
    model = SiT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2)
    return model


def inputs(config: SiTConfig = TINY, batch: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.randn(batch, config.in_channels, *config.input_size)
    return x, torch.rand(batch), torch.arange(batch) % (config.num_classes + 1)


@pytest.mark.parametrize("size, count", [("B/2", 130_500_112), ("L/2", 458_086_416), ("XL/2", 675_111_184)])
def test_the_papers_parameter_counts(size, count):
    with torch.device("meta"):
        model = SiT.from_size(size)
    assert sum(p.numel() for p in model.parameters()) == count
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == {"pos_embed"}


@pytest.mark.parametrize("size, size_in", [("S/2", 8), ("S/4", (8, 16)), ("nano/2", 8), ("nano/8", (16, 8))])
def test_small_sizes_run_and_start_at_zero(size, size_in):
    model = SiT.from_size(size, in_channels=2, input_size=size_in, num_classes=3)
    side = (size_in, size_in) if isinstance(size_in, int) else size_in
    out = model(torch.randn(2, 2, *side), torch.rand(2), torch.tensor([0, 3]))
    assert torch.equal(out, torch.zeros(2, 2, *side))


@pytest.mark.parametrize("size_in, patch", [((6, 10), 2), ((10, 6), 2), ((8, 4), 4), ((3, 5), 1)])
def test_forward_agrees_with_float64(size_in, patch):
    config = SiTConfig(3, 32, 4, patch, 3, size_in, 5)
    model = awake(config)
    x, t, y = inputs(config, batch=6)
    weights = {name: p.double().numpy() for name, p in model.state_dict().items() if name != "pos_embed"}
    expected = reference_sit.forward(weights, config.heads, patch, x.double().numpy(), t.double().numpy(), y.numpy())
    assert np.abs(expected).mean() > 0.1
    with torch.no_grad():
        np.testing.assert_allclose(model(x, t, y).numpy(), expected, rtol=0, atol=rounding(expected, SIT))


def test_two_times_in_an_image_agree_with_a_conditioning_for_every_token_in_float64():
    model, (x, first, y) = awake(), inputs()
    second, is_second = torch.rand(4), torch.rand(4, 1, 3, 5) < 0.4
    is_second[3] = False  # an image may have one time as well
    t = torch.where(is_second, second.view(-1, 1, 1, 1), first.view(-1, 1, 1, 1))
    weights = {name: p.double().numpy() for name, p in model.state_dict().items() if name != "pos_embed"}
    given = (x.double().numpy(), t.flatten(1).double().numpy(), y.numpy())
    expected = reference_sit.forward(weights, TINY.heads, TINY.patch_size, *given)
    with torch.no_grad():
        np.testing.assert_allclose(model(x, t, y).numpy(), expected, rtol=0, atol=rounding(expected, SIT))
        assert not torch.allclose(model(x, t, y), model(x, first, y), atol=1e-2)


def test_positions_name_column_then_row():
    table = sincos_positions(16, (3, 5)).double().numpy()
    for row in range(3):
        for column in range(5):
            np.testing.assert_allclose(
                table[row * 5 + column], reference_sit.position(row, column, 16), rtol=0, atol=UNIT
            )
    np.testing.assert_array_equal(table[0], [0] * 4 + [1] * 4 + [0] * 4 + [1] * 4)


def test_time_goes_in_raw_with_cosines_first():
    t = torch.tensor([0.0, 0.25, 1.0])
    features = timestep_features(t).double().numpy()
    np.testing.assert_array_equal(features[0], [1] * 128 + [0] * 128)
    np.testing.assert_allclose(features, reference_sit.time_features(t.double().numpy()), rtol=0, atol=4 * UNIT)
    assert features[1, 0] == pytest.approx(math.cos(0.25))


def test_a_marked_patch_is_its_token_and_no_other():
    model = awake()
    seen: list[torch.Tensor] = []
    model.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    x, t, y = inputs(batch=1)
    rows, columns = model.grid
    assert (rows, columns) == (3, 5)
    with torch.no_grad():
        model(x, t, y)
        for k in range(rows * columns):
            marked = x.clone()
            row, column = divmod(k, columns)
            marked[..., 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] += 1
            model(marked, t, y)
            assert (seen[0] != seen[-1]).any(-1).nonzero().tolist() == [[0, k]]


class TestLabels:
    def test_the_null_label_is_the_last_row(self):
        model = awake()
        assert model.y_embedder.num_embeddings == TINY.num_classes + 1
        x, t, _ = inputs(batch=6)
        y = torch.arange(6)
        with torch.no_grad():
            before = model(x, t, y)
            model.y_embedder.weight[TINY.num_classes] += 1
            changed = (model(x, t, y) != before).flatten(1).any(1)
        assert changed.tolist() == [False] * 5 + [True]

    def test_there_is_no_label_beyond_the_null_label(self):
        x, t, _ = inputs(batch=1)
        with pytest.raises(IndexError):
            awake()(x, t, torch.tensor([TINY.num_classes + 1]))

    def test_training_mode_drops_no_labels(self):
        model = awake()
        x, t, y = inputs()
        assert torch.equal(model.train()(x, t, y), model.eval()(x, t, y))


class TestInit:
    def test_linear_layers_are_xavier_uniform_without_bias(self):
        model = SiT(SiTConfig(2, 128, 4, 2, 4, (8, 8), 10))
        layers = [layer for block in model.blocks for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc1)]
        for layer in layers:
            bound = math.sqrt(6 / (layer.in_features + layer.out_features))
            assert 0.99 * bound < layer.weight.abs().max() <= bound
            assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
            assert not layer.bias.any()

    def test_the_patch_kernel_is_xavier_uniform_as_a_matrix(self):
        projection = SiT(SiTConfig(1, 128, 4, 2, 4, (8, 8), 10)).x_embedder.proj
        bound = math.sqrt(6 / (128 + 4 * 2 * 2))
        assert 0.99 * bound < projection.weight.abs().max() <= bound
        assert not projection.bias.any()

    def test_labels_and_time_are_normal_with_a_fiftieth(self):
        model = SiT(SiTConfig(1, 256, 4, 2, 4, (8, 8), 200))
        for weight in (model.y_embedder.weight, model.t_embedder.mlp[0].weight, model.t_embedder.mlp[2].weight):
            assert weight.std().item() == pytest.approx(0.02, rel=0.03)
            assert weight.abs().max() > 0.06

    def test_every_modulation_and_the_last_layer_are_zero(self):
        model = SiT(TINY)
        zeroed = [module[-1] for name, module in model.named_modules() if name.endswith("adaLN_modulation")]
        zeroed.append(model.final_layer.linear)
        assert len(zeroed) == TINY.depth + 2
        assert not any(p.any() for layer in zeroed for p in layer.parameters())
        alive = {name for name, p in model.named_parameters() if p.ndim > 1 and p.any()}
        assert len(alive) == 5 + 4 * TINY.depth  # patches, positions, labels, time twice; four maps a block


def test_positions_are_saved_and_never_trained():
    model = awake()
    x, t, y = inputs()
    model(x, t, y).square().mean().backward()
    assert model.pos_embed.grad is None
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    other = SiT(TINY)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x, t, y), model(x, t, y))


def test_bfloat16_weights_work():
    model = awake().bfloat16()
    x, t, y = inputs()
    assert model(x.bfloat16(), t, y).dtype == torch.bfloat16


def test_what_cannot_be_built_is_refused():
    with pytest.raises(ValueError, match=r"input size \(6, 9\) is not a multiple of the patch size 2"):
        SiTConfig(1, 32, 4, 2, 3, (6, 9), 5)
    with pytest.raises(ValueError, match=r"unknown size of sit 'XXL/2'; allowed: .*; did you mean 'XL/2'\?"):
        SiT.from_size("XXL/2")


def test_norms_have_no_weights_and_attention_has_biases():
    model = SiT(TINY)
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    assert len(norms) == 2 * TINY.depth + 1
    assert all(module.eps == 1e-6 and not module.elementwise_affine for module in norms)
    assert all(block.attn.qkv.bias is not None and not block.attn.q_norm.state_dict() for block in model.blocks)
