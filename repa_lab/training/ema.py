"""The exponential moving average of the weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from repa_lab.spec.schema import EmaConfig


class EMA:
    """Averages ``decay * average + (1 - decay) * weights`` after every step, from the initial weights on.

    At decay 0.9999 the half-life is 6,931 steps. Covers the trainable parameters of the given modules.

    Args:
        modules: by the prefix of their parameters' names.
        config: the decay at every step.
    """

    def __init__(self, modules: Mapping[str, nn.Module], config: EmaConfig) -> None:
        self._live = {
            f"{prefix}.{name}": parameter
            for prefix, module in modules.items()
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        }
        self._config = config
        self.average = {name: parameter.detach().clone() for name, parameter in self._live.items()}

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Take in the weights after a step.

        Args:
            updates: earlier updates of the run, those before it was resumed included.
        """
        live = [parameter.detach() for parameter in self._live.values()]
        torch._foreach_lerp_(list(self.average.values()), live, 1 - self._config.decay_at(updates))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The modules with averaged weights for the length of a with-statement."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def load(self, average: Mapping[str, torch.Tensor]) -> None:
        """Take up a saved average.

        Raises:
            KeyError: a parameter is missing from it.
        """
        for name, value in self.average.items():
            value.copy_(average[name])

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self._live.items():
            kept = parameter.detach().clone()
            parameter.copy_(self.average[name])
            self.average[name].copy_(kept)
