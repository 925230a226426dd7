"""All of a denoiser's blocks at once, for whoever asks what each of them knows."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from repa_lab.align.tokens import Tokens, flatten_map
from repa_lab.models.facts import BlockIndex
from repa_lab.models.tap import Tap, TapError

# Below the model of a UNet in diffusers: what stands before its mid block, and what after it.
_MODEL, _DOWN, _UP = "net", "down_blocks", "up_blocks"

# A ``block_index``, or the name of a UNet's stage, such as ``down_blocks.0``.
BlockName = int | str


def tap_every_block(denoiser: nn.Module, tap: Callable[[BlockIndex], Tap]) -> dict[BlockName, Tap]:
    """Hook every block that ``block_index`` counts; of a UNet its ``mid`` and the stages around it by diffusers' names.

    Args:
        denoiser: not yet compiled.
        tap: hooks one block of it.

    Returns:
        The taps in the order in which a forward pass meets them.
    """
    counted: dict[BlockName, Tap] = dict(_counted(tap))
    if counted:
        return counted
    net = denoiser.get_submodule(_MODEL)
    return {**dict(_stages(net, _DOWN)), "mid": tap("mid"), **dict(_stages(net, _UP))}


def _counted(tap: Callable[[BlockIndex], Tap]) -> Iterator[tuple[int, Tap]]:
    for index in itertools.count():
        try:
            yield index, tap(index)
        except TapError:
            return


def _stages(net: nn.Module, path: str) -> Iterator[tuple[str, Tap]]:
    for number, stage in enumerate(net.get_submodule(path).children()):
        yield f"{path}.{number}", Tap(stage, _map_of)


def _map_of(output: Any) -> Tokens:
    """The tokens of a stage's map; a down stage returns it before the maps that skip to the up stages."""
    tokens: Tokens = flatten_map(output[0] if isinstance(output, tuple) else output)
    return tokens
