from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from repa_lab.align import Projector, Tokens


@pytest.mark.parametrize("in_dim, count", [(768, 7_344_896), (1024, 7_869_184), (1152, 8_131_328)])
def test_the_papers_parameter_counts(in_dim, count):
    with torch.device("meta"):
        projector = Projector(in_dim, 768)
    assert sum(p.numel() for p in projector.parameters()) == count


def test_the_mlp_is_three_linear_maps_with_silu_between():
    projector = Projector(5, 7, width=11)
    tokens = torch.randn(2, 3, 5)
    x = tokens.double().numpy()
    layers = [module for module in projector.net if isinstance(module, torch.nn.Linear)]
    for position, layer in enumerate(layers):
        bias = torch.randn_like(layer.bias)
        with torch.no_grad():
            layer.bias.copy_(bias)
        x = x @ layer.weight.detach().double().numpy().T + bias.double().numpy()
        if position < 2:
            x = x / (1 + np.exp(-x))
    np.testing.assert_allclose(projector(tokens).detach().numpy(), x, atol=1e-5)


def test_xavier_uniform_weights_and_no_bias_at_the_start():
    projector = Projector(300, 200, width=400)
    layers = [module for module in projector.net if isinstance(module, torch.nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in layers] == [(300, 400), (400, 400), (400, 200)]
    for layer in layers:
        bound = math.sqrt(6 / (layer.in_features + layer.out_features))
        assert layer.weight.abs().max() <= bound
        assert layer.weight.abs().max() > 0.999 * bound
        assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
        assert torch.equal(layer.bias, torch.zeros_like(layer.bias))


def test_linear_is_a_norm_and_one_map():
    projector = Projector(6, 4, kind="linear")
    tokens = torch.randn(2, 3, 6)
    x = tokens.double().numpy()
    normed = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    layer = projector.net[1]
    expected = normed @ layer.weight.detach().double().numpy().T + layer.bias.detach().double().numpy()
    np.testing.assert_allclose(projector(tokens).detach().numpy(), expected, atol=1e-5)


def test_every_token_is_projected_alone():
    projector, tokens = Projector(6, 4, width=8), torch.randn(2, 5, 6)
    torch.testing.assert_close(projector(tokens)[:, 2:3], projector(tokens[:, 2:3]))
    assert projector.project(Tokens(tokens, (1, 5))).grid == (1, 5)


@pytest.mark.parametrize("kind", ["mlp", "linear"])
def test_half_precision_tokens_meet_float32_parameters(kind):
    projector, tokens = Projector(6, 4, width=8, kind=kind), torch.randn(2, 5, 6).bfloat16()
    projected = projector(tokens)
    assert projected.dtype == torch.float32
    assert torch.equal(projected, projector(tokens.float()))


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="unknown projector 'conv'; allowed: mlp, linear"):
        Projector(4, 4, kind="conv")
