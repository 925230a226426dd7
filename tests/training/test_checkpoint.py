"""The state of a run in a checkpoint, and the average of its weights."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from repa_lab.align import REPA, Tokens
from repa_lab.models.scratch import Input, build
from repa_lab.spec.train import EmaConfig
from repa_lab.training.checkpoint import EMA, Progress, TrainState
from tests.rounding import UNIT, rounding

GIVEN = Input(1, (8, 8), 10)
SIZES = {"sit": "nano/2", "sit_down": "nano/2", "unet": "nano"}


def make(seed: int, family: str = "sit", regularized: bool = True, scaler: object = None) -> TrainState:
    torch.manual_seed(seed)
    denoiser = build(family, SIZES[family], GIVEN)
    for parameter in denoiser.parameters():  # else adaLN-Zero passes no gradient to most of it
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    regularizer = REPA(64, 12, projector={"width": 16}) if regularized else None
    modules = {"denoiser": denoiser} | ({"regularizer": regularizer} if regularizer else {})
    parameters = [p for module in modules.values() for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)
    return TrainState(denoiser, regularizer, optimizer, EMA(modules, EmaConfig(decay=0.9)), scaler)


def step(trained: TrainState, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    x, t = torch.randn(4, 1, 8, 8, generator=draw), torch.rand(4, generator=draw)
    loss = trained.denoiser(x, t, torch.arange(4)).square().mean()
    if trained.regularizer is not None:
        tokens = Tokens(torch.randn(2, 3, 64, generator=draw), (1, 3))
        loss = loss + trained.regularizer.projectors[0](tokens).values.square().mean()
    loss.backward()
    trained.optimizer.step()
    trained.optimizer.zero_grad(set_to_none=True)
    trained.ema.update(0)


def tensors(trained: TrainState) -> dict[str, torch.Tensor]:
    found = {f"denoiser.{name}": value for name, value in trained.denoiser.state_dict().items()}
    if trained.regularizer is not None:
        found |= {f"regularizer.{name}": value for name, value in trained.regularizer.state_dict().items()}
    found |= {f"ema.{name}": value for name, value in trained.ema.average.items()}
    for number, entry in trained.optimizer.state_dict()["state"].items():
        found |= {f"optimizer.{number}.{key}": value for key, value in entry.items()}
    return {name: value.clone() for name, value in found.items()}


def assert_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value.dtype == second[name].dtype
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("family, regularized", [("sit", True), ("sit", False), ("sit_down", True), ("unet", False)])
def test_what_is_loaded_is_what_was_saved_and_goes_on_alike(tmp_path, family, regularized):
    first = make(0, family, regularized)
    for number in range(3):
        step(first, number)
    saved = tensors(first)
    first.save(tmp_path, Progress(3, 18, 1.5))
    second, progress = make(1, family, regularized), Progress()
    second.load(tmp_path, progress)
    assert progress == Progress(3, 18, 1.5)
    assert_equal(tensors(second), saved)
    assert any(name.startswith("optimizer.0.exp_avg_sq") for name in saved)
    for trained in (first, second):
        step(trained, 7)
    assert_equal(tensors(second), tensors(first))


def test_channels_last_comes_back_in_the_moments(tmp_path):
    first, second = make(0, "unet", False), make(1, "unet", False)
    for trained in (first, second):
        trained.denoiser.to(memory_format=torch.channels_last)
    step(first, 0)
    first.save(tmp_path, Progress())
    second.load(tmp_path, Progress())
    weight = second.denoiser.net.down_blocks[0].resnets[0].conv1.weight
    assert not weight.is_contiguous()
    for parameter, entry in second.optimizer.state.items():
        assert entry["exp_avg"].stride() == entry["exp_avg_sq"].stride() == parameter.stride()
    for trained in (first, second):
        step(trained, 1)
    assert_equal(tensors(second), tensors(first))


def test_saving_changes_nothing(tmp_path):
    trained = make(0)
    step(trained, 0)
    before = tensors(trained)
    trained.save(tmp_path, Progress())
    assert_equal(tensors(trained), before)


def test_an_optimizer_that_has_taken_no_step_is_saved_too(tmp_path):
    make(0).save(tmp_path, Progress())
    second = make(1)
    second.load(tmp_path, Progress())
    assert second.optimizer.state_dict()["state"] == {}


def test_moments_of_parameters_without_gradients_keep_their_number(tmp_path):
    # A weight that becomes positive late leaves the projector without moments until then.
    first = make(0)
    x, t = torch.randn(2, 1, 8, 8), torch.rand(2)
    first.denoiser(x, t, torch.arange(2)).square().mean().backward()
    first.optimizer.step()
    first.save(tmp_path, Progress())
    count = len(first.optimizer.param_groups[0]["params"])
    second = make(1)
    second.load(tmp_path, Progress())
    assert 0 < len(second.optimizer.state_dict()["state"]) < count
    assert_equal(tensors(second), tensors(first))


def test_the_files_are_safetensors_and_json_only(tmp_path):
    trained = make(0)
    step(trained, 0)
    trained.save(tmp_path, Progress(1, 4, 0.0))
    names = {path.name for path in tmp_path.iterdir()}
    kinds = ("denoiser", "regularizer", "ema", "optimizer")
    assert names == {*(f"{kind}.safetensors" for kind in kinds), "state.json"}
    for kind in kinds:
        with safe_open(tmp_path / f"{kind}.safetensors", framework="pt") as file:
            assert file.keys()
    assert json.loads((tmp_path / "state.json").read_text())["progress"] == {
        "step": 1,
        "images": 4,
        "seconds": 0.0,
        "evaluation_seconds": 0.0,
        "encoder_seconds": 0.0,
        "data_seconds": 0.0,
    }


def test_the_gradient_scaler_comes_back(tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    scaler.scale(torch.ones(()))  # it makes its state when it is first used
    make(0, scaler=scaler).save(tmp_path, Progress())
    other = torch.amp.GradScaler("cpu", init_scale=7.0)
    make(1, scaler=other).load(tmp_path, Progress())
    assert other.state_dict() == scaler.state_dict()
    assert other.state_dict()["scale"] == 1024.0


def test_weights_of_another_shape_are_refused(tmp_path):
    make(0).save(tmp_path, Progress())
    other = make(0)
    other.denoiser.final_layer.linear = nn.Linear(64, 8)
    with pytest.raises(RuntimeError, match=r"final_layer\.linear"):
        other.load(tmp_path, Progress())


FIXED = {"sit": {"pos_embed"}, "sit_down": set(), "unet": set()}


@pytest.mark.parametrize("family", FIXED)
def test_the_weights_that_train_are_kept_and_no_others(tmp_path, family):
    trained = make(0, family)
    trained.save(tmp_path, Progress())
    kept = load_file(tmp_path / "denoiser.safetensors")
    assert kept.keys() == trained.denoiser.state_dict().keys() - FIXED[family]
    assert not {name for name in load_file(tmp_path / "ema.safetensors") if "pos_embed" in name}


def test_a_checkpoint_that_holds_fixed_weights_too_is_taken_up(tmp_path):
    """As those of earlier versions do."""
    first = make(0)
    step(first, 0)
    first.save(tmp_path, Progress())
    save_file(first.denoiser.state_dict(), tmp_path / "denoiser.safetensors")
    second = make(1)
    second.load(tmp_path, Progress())
    assert_equal(tensors(second), tensors(first))


def test_a_checkpoint_that_lacks_a_weight_is_refused(tmp_path):
    first = make(0)
    first.save(tmp_path, Progress())
    kept = load_file(tmp_path / "denoiser.safetensors")
    del kept["final_layer.linear.bias"], kept["blocks.0.attn.qkv.weight"]
    save_file(kept, tmp_path / "denoiser.safetensors")
    with pytest.raises(KeyError, match=r"the checkpoint lacks 2 weights, such as blocks\.0\.attn\.qkv\.weight"):
        make(1).load(tmp_path, Progress())


def test_frozen_weights_are_left_as_they_were_built(tmp_path):
    """As under LoRA: what does not train is not in the checkpoint, and stays what the run was built with."""
    first, second = make(0), make(1)
    for trained in (first, second):
        trained.denoiser.blocks[1].requires_grad_(False)
    before = {name: value.clone() for name, value in second.denoiser.blocks[1].state_dict().items()}
    first.save(tmp_path, Progress())
    assert not [name for name in load_file(tmp_path / "denoiser.safetensors") if name.startswith("blocks.1.")]
    second.load(tmp_path, Progress())
    assert all(torch.equal(value, before[name]) for name, value in second.denoiser.blocks[1].state_dict().items())
    assert torch.equal(second.denoiser.blocks[0].attn.qkv.weight, first.denoiser.blocks[0].attn.qkv.weight)


def test_progress_is_the_head_of_a_row():
    assert Progress(3, 18, 1.23456).row() == {"step": 3, "images": 18, "seconds": 1.235}


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
        # Each update rounds its increment and the sum.
        np.testing.assert_allclose(value.numpy(), 1 - 0.9999**steps, rtol=2 * (steps + 1) * UNIT)


def test_agrees_with_the_recursion_in_float64():
    module = nn.Linear(5, 4)
    ema = EMA({"denoiser": module}, EmaConfig(decay=0.9))
    expected = module.weight.detach().double().numpy().copy()
    for n in range(20):
        nn.init.normal_(module.weight)
        ema.update(n)
        expected = 0.9 * expected + 0.1 * module.weight.detach().double().numpy()
    # An update is off by two units, of which the next ones keep nine tenths: 2 / (1 - 0.9) in all.
    error = rounding(expected, (20, 1))
    np.testing.assert_allclose(ema.average["denoiser.weight"].numpy(), expected, rtol=0, atol=error)


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
    error = rounding(expected, (4, 1))  # two units an update, of which the next ones keep 0.4: 2 / (1 - 0.4)
    np.testing.assert_allclose(ema.average["denoiser.weight"].numpy(), expected, rtol=0, atol=error)


@pytest.mark.parametrize("config", [EmaConfig(decay=0.9), EmaConfig(decay=0.3, warmup=True)])
def test_the_share_of_the_initial_weights_is_what_is_left_of_them(config):
    module = make_module(1.0)
    ema = EMA({"denoiser": module}, config)
    nn.init.zeros_(module.weight)
    for n in range(7):
        ema.update(n)
    error = 7 * 2 * 10 * UNIT  # two units an update, ten times as much of what is left where a tenth is kept
    np.testing.assert_allclose(ema.average["denoiser.weight"].numpy(), config.initial_share(7), rtol=error)
