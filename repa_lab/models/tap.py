"""Taps, which capture the output of a denoiser's block, and the base class of all denoisers that repa-lab trains."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from repa_lab.align.regularizer import Attention
from repa_lab.align.tokens import Grid, Tokens, flatten_map
from repa_lab.errors import StateError
from repa_lab.models.family import BlockIndex

# A ``block_index``, or the name of a UNet's stage in diffusers, such as ``down_blocks.0``.
BlockName = int | str


class TapError(StateError):
    """A block cannot be tapped, or its tap captured nothing."""


class Tap:
    """A forward hook on one block; :meth:`take` returns the tokens of the latest forward pass.

    There is one slot, which every pass overwrites: the output of a sampling pass, or of the second pass that gradient
    checkpointing makes during backward, is never taken for the output of the next step. Set the tap before
    compiling the denoiser.

    Args:
        to_tokens: makes tokens from the block's output.
    """

    def __init__(self, block: nn.Module, to_tokens: Callable[[Any], Tokens]) -> None:
        self._to_tokens = to_tokens
        self._use: Callable[[Tokens], None] | None = None
        self._output: Any = None
        self._handle = block.register_forward_hook(self._capture)

    def _capture(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if self._use is None:
            self._output = output
        else:
            self._use(self._to_tokens(output))

    def hand_to(self, use: Callable[[Tokens], None]) -> None:
        """Pass the tokens ``(B, N, D)`` of every later forward pass to ``use`` at once, and keep none."""
        self._output, self._use = None, use

    def take(self) -> Tokens:
        """Return the captured tokens ``(B, N, D)`` and empty the slot; a TapError if the block has not run since."""
        output, self._output = self._output, None
        if output is None:
            raise TapError("the tapped block did not run; was the tap set after torch.compile?")
        return self._to_tokens(output)

    def clear(self) -> None:
        """Empty the slot."""
        self._output = None

    def remove(self) -> None:
        """Remove the hook from the block."""
        self._handle.remove()


class AttentionTap:
    """Taps on the norms of queries and keys of one block, whose outputs are ``(B, heads, N, D / heads)``.

    Args:
        grid: returns the grid of the tokens.
    """

    def __init__(self, query: nn.Module, key: nn.Module, grid: Callable[[], Grid]) -> None:
        def unchanged(output: Any) -> Any:
            return output

        self._taps, self._grid = [Tap(module, unchanged) for module in (query, key)], grid

    def take(self) -> Attention:
        """Return the captured queries and keys, and empty the slots; see :meth:`Tap.take`."""
        outputs: Any = [tap.take() for tap in self._taps]
        query, key = outputs
        return Attention(query, key, self._grid())

    def clear(self) -> None:
        """Empty the slots."""
        for tap in self._taps:
            tap.clear()

    def remove(self) -> None:
        """Remove the hooks from the block."""
        for tap in self._taps:
            tap.remove()


@contextmanager
def capture(block: nn.Module, to_tokens: Callable[[torch.Tensor], Tokens] = flatten_map) -> Iterator[Tap]:
    """Tap a block within a with-statement; by default its output is a map ``(B, C, H, W)``."""
    tap = Tap(block, to_tokens)
    try:
        yield tap
    finally:
        tap.remove()


class Denoiser(nn.Module):
    """A network that predicts from noisy inputs ``(B, C, H, W)``, times ``(B,)`` in [0, 1] and conditioning.

    Attributes:
        net: the model of diffusers, if it is one.
        depth: number of blocks that ``block_index`` counts; 0 for a UNet, which is tapped at ``mid``.
        input_grid: the grid of the input tokens, if each may have a time of its own; else None.
    """

    net: Any
    depth: int = 0
    input_grid: Grid | None = None

    def tap(self, block_index: BlockIndex) -> Tap:
        """Tap a block: its image tokens ``(B, N, D)`` with their grid. Do it before compiling the denoiser.

        Blocks count from 0, and a UNet's is ``mid``. A TapError is raised if there is no such block.
        """
        raise NotImplementedError

    def tap_attention(self, block_index: BlockIndex) -> AttentionTap:
        """Tap queries and keys ``(B, heads, N, D / heads)`` of a block's attention; see :meth:`tap`."""
        raise TapError(f"the attention of {type(self).__name__} cannot be tapped")

    def tap_all(self) -> dict[BlockName, Tap]:
        """Tap every block that ``block_index`` counts, in order; for a UNet, ``mid`` between the stages around it."""
        if self.depth:
            return {index: self.tap(index) for index in range(self.depth)}
        return {**self._tap_stages("down_blocks"), "mid": self.tap("mid"), **self._tap_stages("up_blocks")}

    def export(self, folder: Path) -> None:
        """Write the denoiser, and nothing else, into a folder."""
        self.net.save_pretrained(folder)

    def enable_gradient_checkpointing(self) -> None:
        """Keep only the inputs of the blocks for the backward pass, which runs each block again."""
        self.net.enable_gradient_checkpointing()

    def _tap_stages(self, path: str) -> dict[BlockName, Tap]:
        def tokens_of(output: Any) -> Tokens:  # a down stage returns its map first, then those for skip connections
            return flatten_map(output[0] if isinstance(output, tuple) else output)

        stages = self.get_submodule(f"net.{path}").children()
        return {f"{path}.{number}": Tap(stage, tokens_of) for number, stage in enumerate(stages)}
