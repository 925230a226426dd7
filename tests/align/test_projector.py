from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from repa_lab.align import Projector, ProjectorSettings, Tokens
from tests.rounding import rounding


def project(projector: Projector, values: torch.Tensor) -> torch.Tensor:
    """The projected values of tokens in a row."""
    return projector(Tokens(values, (1, values.shape[1]))).values.detach()


@pytest.mark.parametrize("in_dim, count", [(768, 7_344_896), (1024, 7_869_184), (1152, 8_131_328)])
def test_the_papers_parameter_counts(in_dim, count):
    with torch.device("meta"):
        projector = Projector(in_dim, 768)
    assert sum(p.numel() for p in projector.parameters()) == count


def test_the_mlp_is_three_linear_maps_with_silu_between():
    projector = Projector(5, 7, ProjectorSettings(width=11))
    tokens = torch.randn(2, 3, 5)
    x = tokens.double().numpy()
    layers = [module for module in projector.modules() if isinstance(module, torch.nn.Linear)]
    for position, layer in enumerate(layers):
        bias = torch.randn_like(layer.bias)
        with torch.no_grad():
            layer.bias.copy_(bias)
        x = x @ layer.weight.detach().double().numpy().T + bias.double().numpy()
        if position < 2:
            x = x / (1 + np.exp(-x))
    np.testing.assert_allclose(project(projector, tokens).numpy(), x, rtol=0, atol=rounding(x, (3, 8)))


def test_xavier_uniform_weights_and_no_bias_at_the_start():
    projector = Projector(300, 200, ProjectorSettings(width=400))
    layers = [module for module in projector.modules() if isinstance(module, torch.nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in layers] == [(300, 400), (400, 400), (400, 200)]
    for layer in layers:
        bound = math.sqrt(6 / (layer.in_features + layer.out_features))
        assert layer.weight.abs().max() <= bound
        assert layer.weight.abs().max() > 0.999 * bound
        assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
        assert torch.equal(layer.bias, torch.zeros_like(layer.bias))


def test_linear_is_a_norm_and_one_map():
    projector = Projector(6, 4, ProjectorSettings(type="linear"))
    tokens = torch.randn(2, 3, 6)
    x = tokens.double().numpy()
    normed = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    layer = projector.net.layers[1]
    expected = normed @ layer.weight.detach().double().numpy().T + layer.bias.detach().double().numpy()
    np.testing.assert_allclose(project(projector, tokens).numpy(), expected, rtol=0, atol=rounding(expected, (2, 6)))


@pytest.mark.parametrize("kind", ["mlp", "linear"])
def test_every_token_is_projected_alone(kind):
    projector, tokens = Projector(6, 4, ProjectorSettings(width=8, type=kind)), torch.randn(2, 5, 6)
    torch.testing.assert_close(project(projector, tokens)[:, 2:3], project(projector, tokens[:, 2:3]))


@pytest.mark.parametrize("kind", ["mlp", "linear", "conv"])
@pytest.mark.parametrize("grid", [(2, 3), (3, 2), (1, 6)])
def test_tokens_keep_their_grid(kind, grid):
    projected = Projector(6, 4, ProjectorSettings(width=8, type=kind))(Tokens(torch.randn(2, 6, 6), grid))
    assert (projected.grid, projected.values.shape) == (grid, (2, 6, 4))


class TestConv:
    def test_a_kernel_of_ones_counts_neighbours(self):
        projector = Projector(1, 1, ProjectorSettings(type="conv"))
        torch.nn.init.ones_(projector.net.conv.weight)
        torch.nn.init.zeros_(projector.net.conv.bias)
        ones = torch.ones(1, 6, 1)
        assert projector(Tokens(ones, (2, 3))).values.flatten().tolist() == [4, 6, 4, 4, 6, 4]
        assert projector(Tokens(ones, (3, 2))).values.flatten().tolist() == [4, 4, 6, 6, 4, 4]

    def test_it_agrees_with_a_sum_over_neighbours(self):
        projector, (h, w) = Projector(3, 2, ProjectorSettings(type="conv", kernel=5)), (4, 6)
        tokens = torch.randn(2, h * w, 3)
        weight, bias = (p.detach().double().numpy() for p in (projector.net.conv.weight, projector.net.conv.bias))
        maps = np.pad(tokens.double().numpy().reshape(2, h, w, 3), ((0, 0), (2, 2), (2, 2), (0, 0)))
        expected = np.zeros((2, h, w, 2)) + bias
        for y, x in np.ndindex(h, w):
            expected[:, y, x] += np.einsum("bijc,ocij->bo", maps[:, y : y + 5, x : x + 5], weight)
        found = projector(Tokens(tokens, (h, w))).values.detach().numpy()
        expected = expected.reshape(2, h * w, 2)
        np.testing.assert_allclose(found, expected, rtol=0, atol=rounding(expected, (1, 75)))

    def test_a_kernel_of_1_is_a_linear_map(self):
        projector, tokens = Projector(6, 4, ProjectorSettings(type="conv", kernel=1)), torch.randn(2, 5, 6)
        conv = projector.net.conv
        expected = tokens @ conv.weight[:, :, 0, 0].T + conv.bias
        torch.testing.assert_close(project(projector, tokens), expected.detach())

    def test_its_parameter_count(self):
        with torch.device("meta"):
            projector = Projector(1152, 768, ProjectorSettings(type="conv"))
        assert sum(p.numel() for p in projector.parameters()) == 9 * 1152 * 768 + 768  # iREPA: 7.96 M

    @pytest.mark.parametrize("kernel", [0, 2, 4, -1])
    def test_even_kernels_are_refused(self, kernel):
        message = f"kernel must be odd, .*; got {kernel}" if kernel > 0 else "greater than or equal to 1"
        with pytest.raises(ValidationError, match=message):
            ProjectorSettings(type="conv", kernel=kernel)


@pytest.mark.parametrize("kind", ["mlp", "linear", "conv"])
def test_half_precision_tokens_meet_float32_parameters(kind):
    projector, tokens = Projector(6, 4, ProjectorSettings(width=8, type=kind)), torch.randn(2, 5, 6).bfloat16()
    projected = project(projector, tokens)
    assert projected.dtype == torch.float32
    assert torch.equal(projected, project(projector, tokens.float()))


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValidationError, match="Input should be 'mlp', 'linear' or 'conv'"):
        ProjectorSettings(type="cnn")
