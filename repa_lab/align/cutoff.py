"""Switching the regularizer off once the tokens have become similar enough."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from repa_lab.align.ranks import mean_over_ranks
from repa_lab.align.settings import ScheduleSettings


class SimilarityCutoff(nn.Module):
    """Whether the mean token cosine, smoothed over steps, has reached a threshold; then the weight is 0.

    The average is exponential and bias-corrected, so that it is a true mean of what was seen from the first step on,
    and it is not judged before ``similarity_min_count`` steps: an early spike switches nothing off. One step counts
    once, as the mean over its micro-batches and processes, so all processes decide alike. A step is judged by the steps
    before it: its own mean is not known before its last micro-batch, and reading it would wait for the device. The
    state travels in the regularizer's ``state_dict``.

    Args:
        settings: ``similarity_threshold`` and the fields beside it.

    Raises:
        ValueError: there is no threshold.
    """

    def __init__(self, settings: ScheduleSettings) -> None:
        super().__init__()
        if settings.similarity_threshold is None:
            raise ValueError("a similarity cutoff needs a similarity_threshold")
        self.settings, self.threshold = settings, settings.similarity_threshold
        self._sum, self._count, self._latched = 0.0, 0, False
        self._step, self._waiting = -1, list[torch.Tensor]()

    @property
    def similarity(self) -> float | None:
        """The smoothed cosine of the steps taken in so far; None before the first."""
        return self._sum / (1 - self.settings.similarity_ema_decay**self._count) if self._count else None

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # its state is Python's
    def observe(self, step: int, cosine: torch.Tensor) -> None:
        """Note the mean cosine, a scalar, of one micro-batch of ``step``; every process must call it equally often."""
        if step != self._step:
            self._take_in()
        self._step = step
        self._waiting.append(mean_over_ranks(cosine))

    def retract(self, step: int) -> None:
        """Forget what was noted of ``step``, which is about to be taken again."""
        if step == self._step:
            self._waiting = []

    def is_cut(self, step: int) -> bool:
        """Whether the weight is 0 at ``step``, judged by the steps before it."""
        if step > self._step:
            self._take_in()
        return self._latched or self._is_above()

    def probes(self, step: int) -> bool:
        """Whether the encoder should look at ``step`` although the weight is 0."""
        return self.settings.threshold_mode == "recoverable" and step % self.settings.probe_every == 0

    def get_extra_state(self) -> torch.Tensor:
        """What a checkpoint keeps: ``(3,)``, the running sum, the count, and whether it is off for good."""
        self._take_in()
        return torch.tensor([self._sum, self._count, self._latched], dtype=torch.float64)

    def set_extra_state(self, state: Any) -> None:
        """Take up what :meth:`get_extra_state` gave."""
        self._sum, count, latched = state.tolist()
        self._count, self._latched = int(count), bool(latched)
        self._step, self._waiting = -1, []

    def _take_in(self) -> None:
        if not self._waiting:
            return
        # Reading the value waits for the device: a step late, when it has long been computed.
        seen = torch.stack(self._waiting).double().mean().item()
        self._waiting = []
        if not math.isfinite(seen):  # a step that fp16's gradient scaler is about to skip
            return
        decay = self.settings.similarity_ema_decay
        self._sum = decay * self._sum + (1 - decay) * seen
        self._count += 1
        self._latched |= self.settings.threshold_mode == "permanent" and self._is_above()

    def _is_above(self) -> bool:
        similarity, is_counted = self.similarity, self._count >= self.settings.similarity_min_count
        return is_counted and similarity is not None and similarity >= self.threshold
