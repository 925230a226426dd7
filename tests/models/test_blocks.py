"""All blocks at once are what single taps and the next blocks see."""

from __future__ import annotations

import weakref

import pytest
import torch

from repa_lab.models.tap import TapError
from tests.models.test_tap import batch, build, wake


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
