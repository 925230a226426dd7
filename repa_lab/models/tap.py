"""Capture of the tapped block's output with a forward hook."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from repa_lab.align.tokens import Tokens, flatten_map


class TapError(RuntimeError):
    """The tap captured nothing, or something that is not tokens of an image."""


class Tap:
    """A forward hook on one block; :meth:`take` yields what the latest forward pass left there.

    One slot, which every pass overwrites: what sampling, or gradient checkpointing when it runs the block again in
    backward, left there since is never taken for the next step's. Set the tap before compiling the denoiser.
    """

    def __init__(self, block: nn.Module, to_tokens: Callable[[Any], Tokens]) -> None:
        self._to_tokens = to_tokens
        self._use: Callable[[Tokens], None] | None = None
        self._output: Any = None
        self._handle = block.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if self._use is None:
            self._output = output
        else:
            self._use(self._to_tokens(output))

    def hand_to(self, use: Callable[[Tokens], None]) -> None:
        """Keep nothing from now on: hand the tokens ``(B, N, D)`` of every pass to ``use`` as soon as the block has run."""
        self._output, self._use = None, use

    def take(self) -> Tokens:
        """The captured tokens ``(B, N, D)`` with their grid; empties the slot.

        Raises:
            TapError: no forward pass went through the block since the last call.
        """
        output, self._output = self._output, None
        if output is None:
            raise TapError("the tapped block did not run; was the tap set after torch.compile?")
        return self._to_tokens(output)

    def clear(self) -> None:
        """Empty the slot without using it."""
        self._output = None

    def remove(self) -> None:
        """Take the hook off the block."""
        self._handle.remove()


@contextmanager
def capture(block: nn.Module, to_tokens: Callable[[torch.Tensor], Tokens] = flatten_map) -> Iterator[Tap]:
    """Tap a block for the length of a with-statement; by default its output is a map ``(B, C, H, W)``."""
    tap = Tap(block, to_tokens)
    try:
        yield tap
    finally:
        tap.remove()
