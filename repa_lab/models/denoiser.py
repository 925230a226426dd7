"""A diffusers model as a denoiser: latents and conditioning in, a prediction out, and the place where it is tapped."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from repa_lab.align.tokens import Grid, Tokens, flatten_map
from repa_lab.models.facts import BlockIndex, Family, network_of
from repa_lab.models.network import Blocks, Network
from repa_lab.models.tap import Tap, TapError


class Denoiser(nn.Module):
    """A model of a family of diffusers.

    Args:
        net: the model.
        family: its facts.
    """

    def __init__(self, net: nn.Module, family: Family) -> None:
        super().__init__()
        self.net, self.family = net, family
        self.grid: Grid = (0, 0)
        self.text_lengths: torch.Tensor | None = None

    def forward(self, latents: torch.Tensor, time: torch.Tensor, **condition: torch.Tensor) -> torch.Tensor:
        """What the family predicts for noisy latents ``(B, C, H, W)`` at times ``(B,)`` in [0, 1], 1 being noise; the
        conditioning is that of :attr:`Network.condition`.

        Raises:
            ValueError: the family takes no images of that shape.
        """
        network, untyped = network_of(self.family), self.net
        stride = self.family.shapes[""].stride
        self.grid = (latents.shape[-2] // stride, latents.shape[-1] // stride)
        _check_grid(self.family.name, network, self.grid)
        self.text_lengths = network.lengths(condition) if network.lengths else None
        config: Any = untyped.config
        output = untyped(**network.inputs(config, latents, time, condition), return_dict=False)
        return network.output(output[0] if isinstance(output, tuple) else output, latents)

    def enable_gradient_checkpointing(self) -> None:
        """Have the blocks computed again in backward, for less memory."""
        checkpointed: Any = self.net
        checkpointed.enable_gradient_checkpointing()


def build_net(family: Family, config: Mapping[str, Any]) -> nn.Module:
    """A freshly initialised model of a family from arguments of its constructor."""
    import diffusers

    net: nn.Module = getattr(diffusers, network_of(family).model)(**config)
    return net


def uncheckpointed(denoiser: Denoiser) -> str:
    """Why the blocks of a denoiser cannot be checkpointed; empty if they can."""
    if not getattr(denoiser.net, "_supports_gradient_checkpointing", False):
        return f"diffusers' {type(denoiser.net).__name__} has no gradient checkpointing"
    return network_of(denoiser.family).uncheckpointed


def tap_block(denoiser: Denoiser, block_index: BlockIndex) -> Tap:
    """Hook a block of a denoiser: its image tokens ``(B, N, D)`` with their grid, and no token of the text.

    Args:
        denoiser: not yet compiled.
        block_index: 0-based, running through all lists of blocks in order; ``mid`` for a UNet.

    Raises:
        TapError: there is no such block.
    """
    family = denoiser.family
    found = _find(denoiser.net, network_of(family).blocks, block_index)
    if found is None:
        shape = family.shapes[""]
        allowed = "'mid'" if shape.block == "mid" else f"0 to {_depth(denoiser.net, network_of(family).blocks) - 1}"
        raise TapError(f"{family.name}: block_index must be {allowed}, got {block_index!r}")
    block, blocks = found
    return Tap(block, lambda output: _image_tokens(output, blocks, denoiser))


def _check_grid(name: str, network: Network, grid: Grid) -> None:
    if network.square and grid[0] != grid[1]:
        raise ValueError(f"{name} takes square images only, got a grid of {grid[0]}x{grid[1]} tokens")


def _find(net: nn.Module, lists: tuple[Blocks, ...], index: BlockIndex) -> tuple[nn.Module, Blocks] | None:
    if index == "mid":
        return (net.get_submodule(lists[0].path), lists[0]) if lists[0].place == "map" else None
    if not isinstance(index, int) or index < 0 or lists[0].place == "map":
        return None
    for blocks in lists:
        layers = _layers(net, blocks)
        if index < len(layers):
            return layers[index], blocks
        index -= len(layers)
    return None


def _layers(net: nn.Module, blocks: Blocks) -> nn.ModuleList:
    layers = net.get_submodule(blocks.path)
    assert isinstance(layers, nn.ModuleList)
    return layers


def _depth(net: nn.Module, lists: tuple[Blocks, ...]) -> int:
    return sum(len(_layers(net, blocks)) for blocks in lists)


def _image_tokens(output: Any, blocks: Blocks, denoiser: Denoiser) -> Tokens:
    values: torch.Tensor = output if blocks.item is None else output[blocks.item]
    values = values.transpose(0, blocks.samples)
    if blocks.place == "map":
        return flatten_map(values)
    height, width = denoiser.grid
    return Tokens(_PLACES[blocks.place](values, height * width, denoiser.text_lengths), denoiser.grid)


def _after_text(values: torch.Tensor, count: int, lengths: torch.Tensor | None) -> torch.Tensor:
    assert lengths is not None
    rows = lengths.to(values.device).unsqueeze(1) + torch.arange(count, device=values.device)
    return values.gather(1, rows.unsqueeze(2).expand(-1, -1, values.shape[2]))


# Of a sequence (B, M, D), the image's tokens, given how many they are and how many each sample's text has.
_PLACES: dict[str, Callable[[torch.Tensor, int, torch.Tensor | None], torch.Tensor]] = {
    "all": lambda values, count, lengths: values,
    "head": lambda values, count, lengths: values[:, :count],
    "tail": lambda values, count, lengths: values[:, -count:],
    "after_text": _after_text,
}
