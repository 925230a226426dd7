from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from repa_lab.align import Tokens
from repa_lab.models.families import FAMILIES
from repa_lab.models.scratch import Input
from repa_lab.models.scratch import build as build_scratch
from repa_lab.models.sit import SiT, SiTConfig
from repa_lab.models.tap import Tap, TapError, capture

LINE = (1, 3)


def build(family: str, side: tuple[int, int] = (8, 8)) -> nn.Module:
    """A SiT of six blocks, or the smallest UNet."""
    if family == "sit":
        return SiT(SiTConfig(6, 32, 4, 2, 3, side, 5))
    return build_scratch("unet", "nano", Input(3, side, 5))


def wake(denoiser: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return denoiser


def batch(size: int = 2, side: tuple[int, int] = (8, 8)) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(size, 3, *side), torch.rand(size), torch.arange(size)


@pytest.mark.parametrize("block", range(6))
def test_a_sits_tap_is_the_output_of_the_block(block):
    denoiser = wake(build("sit", (4, 8)))
    tap = denoiser.tap(block)
    inputs: list[torch.Tensor] = []
    following = denoiser.blocks[block + 1] if block < 5 else denoiser.final_layer
    following.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    denoiser(*batch(side=(4, 8)))
    tokens = tap.take()
    assert (tokens.grid, tokens.dim) == ((2, 4), 32)
    assert torch.equal(tokens.values, inputs[0])


def test_a_unets_tap_is_the_map_of_its_mid_block_row_by_row():
    denoiser = build("unet", (4, 12))
    tap = denoiser.tap("mid")
    maps: list[torch.Tensor] = []
    denoiser.net.up_blocks[0].register_forward_pre_hook(
        lambda module, args, kwargs: maps.append(kwargs.get("hidden_states", args[0] if args else None)),
        with_kwargs=True,
    )
    denoiser(*batch(side=(4, 12)))
    tokens = tap.take()
    assert tokens.grid == (2, 6)
    for k in range(12):
        assert torch.equal(tokens.values[:, k], maps[0][:, :, k // 6, k % 6])


@pytest.mark.parametrize("family, block", [("sit", 2), ("unet", "mid")])
def test_gradients_reach_the_blocks_up_to_the_tap_and_none_beyond(family, block):
    denoiser = wake(build(family))
    tap = denoiser.tap(block)
    denoiser(*batch())
    tap.take().values.square().sum().backward()
    before, after = (
        (list(denoiser.blocks[:3]), [*denoiser.blocks[3:], denoiser.final_layer])
        if family == "sit"
        else ([*denoiser.net.down_blocks, denoiser.net.mid_block], list(denoiser.net.up_blocks))
    )
    assert all(p.grad is not None and p.grad.any() for module in before for p in module.parameters())
    assert all(p.grad is None for module in after for p in module.parameters())


class TestTheSlot:
    def test_a_capture_is_taken_once(self):
        block = nn.Linear(2, 2)
        tap = Tap(block, lambda output: Tokens(output, LINE))
        with pytest.raises(TapError, match="the tapped block did not run"):
            tap.take()
        out = block(torch.randn(1, 3, 2))
        assert torch.equal(tap.take().values, out)
        with pytest.raises(TapError, match="the tapped block did not run"):
            tap.take()

    def test_what_sampling_left_is_not_taken_for_the_next_step(self):
        block = nn.Linear(2, 2)
        tap = Tap(block, lambda output: Tokens(output, LINE))
        with torch.no_grad():
            block(torch.randn(5, 3, 2))
        out = block(torch.randn(1, 3, 2))
        tokens = tap.take()
        assert torch.equal(tokens.values, out)
        assert tokens.values.requires_grad

    def test_clear_and_remove(self):
        block = nn.Linear(2, 2)
        with capture(block, lambda output: Tokens(output, LINE)) as tap:
            block(torch.randn(1, 3, 2))
            tap.clear()
            with pytest.raises(TapError):
                tap.take()
        block(torch.randn(1, 3, 2))
        with pytest.raises(TapError):
            tap.take()

    def test_two_taps_on_one_block_do_not_meet(self):
        block = nn.Linear(2, 2)
        first, second = (Tap(block, lambda output: Tokens(output, LINE)) for _ in range(2))
        out = block(torch.randn(1, 3, 2))
        assert torch.equal(first.take().values, out)
        assert torch.equal(second.take().values, out)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_neither_tokens_nor_gradients(reentrant):
    """Backward runs the checkpointed block a second time, after the tokens were taken; the next step must not see that."""
    block = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4), nn.GELU())
    tap = Tap(block, lambda output: Tokens(output, LINE))
    runs = []
    block.register_forward_hook(lambda *_: runs.append(1))
    steps = [torch.randn(1, 3, 4) for _ in range(3)]

    def gradients(x: torch.Tensor, checkpointed: bool) -> list[torch.Tensor]:
        block.zero_grad()
        x = x.clone().requires_grad_()
        out = checkpoint(block, x, use_reentrant=reentrant) if checkpointed else block(x)
        taken = tap.take().values
        assert torch.equal(taken, out)
        (out.sum() + taken.square().sum()).backward()
        return [x.grad, *(p.grad.clone() for p in block.parameters())]

    for x in steps:
        got, expected = gradients(x, True), gradients(x, False)
        tap.clear()
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert not reentrant or len(runs) == 3 * len(steps)


def test_gradient_checkpointing_of_consecutive_steps_without_clearing():
    block = nn.Sequential(nn.Linear(4, 4), nn.GELU())
    tap = Tap(block, lambda output: Tokens(output, LINE))
    for _ in range(3):
        x = torch.randn(1, 3, 4, requires_grad=True)
        out = checkpoint(block, x, use_reentrant=True)
        assert torch.equal(tap.take().values, out)
        out.sum().backward()


def test_a_tap_set_before_compiling_captures_every_pass():
    denoiser = wake(build("sit"))
    tap = denoiser.tap(1)
    compiled = torch.compile(denoiser, backend="eager")
    for _ in range(3):
        given = batch()
        denoiser(*given)
        expected = tap.take().values
        compiled(*given)
        torch.testing.assert_close(tap.take().values, expected)
    with pytest.raises(TapError):
        tap.take()


@pytest.mark.parametrize("block", [6, -1, "mid", 100])
def test_a_block_that_does_not_exist_is_refused_by_name_and_count(block):
    with pytest.raises(TapError) as caught:
        build("sit").tap(block)
    assert str(caught.value) == f"sit has 6 blocks: block_index must be 0 to 5, got {block!r}"


def test_a_unet_is_tapped_at_its_mid_block_only():
    with pytest.raises(TapError) as caught:
        build("unet").tap(0)
    assert str(caught.value) == "unet is tapped at its mid block: block_index must be 'mid', got 0"


def test_the_papers_depth_is_the_block_index_plus_one():
    """`depth=4` of the papers' code taps where the fourth block is done: `block_index` 3."""
    denoiser = wake(build("sit"))
    tap = denoiser.tap(3)
    x, t, y = batch()
    denoiser(x, t, y)
    tokens = denoiser.x_embedder(x) + denoiser.pos_embed
    condition = denoiser.t_embedder(t) + denoiser.y_embedder(y)
    for number, block in enumerate(denoiser.blocks, start=1):
        tokens = block(tokens, condition, None)
        if number == 4:
            break
    assert torch.equal(tap.take().values, tokens)


@pytest.mark.parametrize(("name", "side", "grid"), [("sd15", 64, (8, 8)), ("sdxl", 128, (32, 32))])
def test_stable_diffusions_mid_blocks_are_captured_without_the_lab(name, side, grid):
    """As released, with the bare hook; the guide's table says 16x16 for SDXL at 1,024 px."""
    from diffusers import UNet2DConditionModel

    plain = {"addition_embed_type": None}  # whose inputs stand beside the point
    with torch.device("meta"):
        unet = UNet2DConditionModel(**{**FAMILIES[name].network.config, **plain})
        with capture(unet.mid_block) as tap:
            unet(torch.empty(1, 4, side, side), torch.tensor([1]), torch.empty(1, 77, unet.config.cross_attention_dim))
            tokens = tap.take()
    assert (tokens.grid, tokens.dim) == (grid, 1280)


def test_a_sits_blocks_are_those_that_block_index_counts():
    denoiser = wake(build("sit", (4, 8)))
    given, taps = batch(side=(4, 8)), denoiser.tap_all()
    assert list(taps) == [0, 1, 2, 3, 4, 5]
    denoiser(*given)
    together = {name: tap.take() for name, tap in taps.items()}
    for name, found in together.items():
        tap = denoiser.tap(name)
        denoiser(*given)
        assert torch.equal(found.values, tap.take().values)
        assert found.grid == (2, 4)


def test_a_unets_stages_stand_around_its_mid_block_in_the_order_of_the_pass():
    denoiser = wake(build("unet", (4, 12)))
    taps, order = denoiser.tap_all(), []
    assert list(taps) == ["down_blocks.0", "down_blocks.1", "mid", "up_blocks.0", "up_blocks.1"]
    seen: dict[str, torch.Tensor] = {}
    net = denoiser.net
    for name, following in (
        ("down_blocks.0", net.down_blocks[1]),
        ("down_blocks.1", net.mid_block),
        ("mid", net.up_blocks[0]),
        ("up_blocks.0", net.up_blocks[1]),
        ("up_blocks.1", net.conv_norm_out),
    ):
        following.register_forward_pre_hook(
            lambda module, args, kwargs, name=name: seen.__setitem__(
                name, kwargs.get("hidden_states", args[0] if args else None)
            ),
            with_kwargs=True,
        )
    for name, tap in taps.items():
        tap.hand_to(lambda tokens, name=name: order.append((name, tokens)))
    denoiser(*batch(side=(4, 12)))
    assert [name for name, _ in order] == list(taps)
    assert [tokens.grid for _, tokens in order] == [(2, 6), (2, 6), (2, 6), (4, 12), (4, 12)]
    for name, tokens in order:
        assert torch.equal(tokens.to_map(), seen[name]), name


def test_what_is_handed_on_is_not_kept():
    """When the last block has run, the output of no other is alive: a profile needs no more memory than a forward pass."""
    denoiser = wake(build("sit")).requires_grad_(False)
    alive: list[weakref.ref] = []
    for block in denoiser.blocks:
        block.register_forward_hook(lambda module, args, output: alive.append(weakref.ref(output)))
    taps, found = denoiser.tap_all(), []
    for tap in taps.values():
        tap.hand_to(lambda tokens: found.append(tokens.values.mean().item()))
    at_the_end: list[bool] = []
    denoiser.final_layer.register_forward_pre_hook(lambda *_: at_the_end.extend(one() is not None for one in alive))
    denoiser(*batch())
    assert at_the_end == [False] * 5 + [True]
    assert len(found) == 6
    with pytest.raises(TapError):
        taps[0].take()


def test_removed_taps_hear_nothing():
    denoiser = build("unet")
    taps, heard = denoiser.tap_all(), []
    for tap in taps.values():
        tap.hand_to(lambda tokens: heard.append(1))
        tap.remove()
    denoiser(*batch())
    assert heard == []
