from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from repa_lab.spec.schema import EmaConfig
from repa_lab.training.checkpoint import EMA


def make_module(value: float = 0.0) -> nn.Linear:
    module = nn.Linear(3, 2)
    for parameter in module.parameters():
        nn.init.constant_(parameter, value)
    return module


@pytest.mark.parametrize("steps", [1, 10, 1000])
def test_rises_to_a_constant_as_one_minus_a_power(steps):
    module = make_module()
    ema = EMA({"denoiser": module}, EmaConfig(decay=0.9999))
    for parameter in module.parameters():
        nn.init.ones_(parameter)
    for n in range(steps):
        ema.update(n)
    for value in ema.average.values():
        np.testing.assert_allclose(value.numpy(), 1 - 0.9999**steps, rtol=1e-4)


def test_agrees_with_the_recursion_in_float64():
    module = nn.Linear(5, 4)
    ema = EMA({"denoiser": module}, EmaConfig(decay=0.9))
    expected = module.weight.detach().double().numpy().copy()
    for n in range(20):
        nn.init.normal_(module.weight)
        ema.update(n)
        expected = 0.9 * expected + 0.1 * module.weight.detach().double().numpy()
    np.testing.assert_allclose(ema.average["denoiser.weight"].numpy(), expected, atol=1e-6)


def test_begins_at_the_initial_weights_and_is_a_copy():
    module = nn.Linear(3, 2)
    ema = EMA({"denoiser": module}, EmaConfig(decay=0.5))
    before = module.weight.detach().clone()
    nn.init.zeros_(module.weight)
    assert torch.equal(ema.average["denoiser.weight"], before)


def test_decay_0_is_the_latest_weights():
    module = nn.Linear(3, 2)
    ema = EMA({"denoiser": module}, EmaConfig(decay=0.0))
    nn.init.normal_(module.weight)
    ema.update(0)
    assert torch.equal(ema.average["denoiser.weight"], module.weight)


def test_covers_all_modules_and_leaves_frozen_weights_out():
    first, second = make_module(1), make_module(2)
    first.bias.requires_grad_(False)
    assert list(EMA({"a": first, "b": second}, EmaConfig(decay=0.5)).average) == ["a.weight", "b.weight", "b.bias"]


def test_swapping_gives_the_average_and_then_both_back_bit_by_bit():
    module = nn.Linear(5, 4)
    ema = EMA({"denoiser": module}, EmaConfig(decay=0.9))
    nn.init.normal_(module.weight)
    ema.update(0)
    live = {name: value.detach().clone() for name, value in module.named_parameters()}
    average = {name: value.clone() for name, value in ema.average.items()}
    same = module.weight
    with ema.applied():
        assert module.weight is same
        for name, value in module.named_parameters():
            assert torch.equal(value, average[f"denoiser.{name}"])
        assert not torch.equal(module.weight, live["weight"])
    for name, value in module.named_parameters():
        assert torch.equal(value, live[name])
        assert torch.equal(ema.average[f"denoiser.{name}"], average[f"denoiser.{name}"])


def test_weights_come_back_after_an_error():
    module = nn.Linear(3, 2)
    ema = EMA({"denoiser": module}, EmaConfig(decay=0.9))
    nn.init.normal_(module.weight)
    live = module.weight.detach().clone()
    with pytest.raises(ZeroDivisionError), ema.applied():
        raise ZeroDivisionError
    assert torch.equal(module.weight, live)


def test_a_saved_average_is_taken_up_whole_or_refused():
    module = nn.Linear(3, 2)
    ema = EMA({"denoiser": module}, EmaConfig(decay=0.9))
    saved = {name: torch.randn_like(value) for name, value in ema.average.items()}
    ema.load(saved)
    assert all(torch.equal(value, saved[name]) for name, value in ema.average.items())
    with pytest.raises(KeyError, match=r"denoiser\.bias"):
        ema.load({"denoiser.weight": saved["denoiser.weight"]})


def test_passes_no_gradient():
    module = nn.Linear(3, 2)
    ema = EMA({"denoiser": module}, EmaConfig(decay=0.9))
    ema.update(0)
    assert not any(value.requires_grad for value in ema.average.values())


def test_a_warmup_follows_the_rule_in_float64_from_any_update():
    """``min(decay, (1 + n) / (10 + n))`` after ``n`` updates, whether they were made here or before a resume."""
    module, decay = nn.Linear(5, 4), 0.4
    ema = EMA({"denoiser": module}, EmaConfig(decay=decay, warmup=True))
    expected = module.weight.detach().double().numpy().copy()
    for n in range(12):
        if n == 6:
            resumed = EMA({"denoiser": module}, EmaConfig(decay=decay, warmup=True))
            resumed.load(ema.average)
            ema = resumed
        nn.init.normal_(module.weight)
        ema.update(n)
        kept = min(decay, (1 + n) / (10 + n))
        expected = kept * expected + (1 - kept) * module.weight.detach().double().numpy()
    np.testing.assert_allclose(ema.average["denoiser.weight"].numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("config", [EmaConfig(decay=0.9), EmaConfig(decay=0.3, warmup=True)])
def test_the_share_of_the_initial_weights_is_what_is_left_of_them(config):
    module = make_module(1.0)
    ema = EMA({"denoiser": module}, config)
    nn.init.zeros_(module.weight)
    for n in range(7):
        ema.update(n)
    np.testing.assert_allclose(ema.average["denoiser.weight"].numpy(), config.initial_share(7), rtol=1e-5)
