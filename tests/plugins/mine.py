"""DESIGN's plugin with a spec, and what tests do with plugins."""

from __future__ import annotations

from pathlib import Path

import pytest

from repa_lab import plan
from repa_lab.align.settings import REGULARIZERS
from repa_lab.registry import drop_plugins, loaded_plugins
from repa_lab.spec import SpecError
from tests.spec.examples import write
from tests.test_cli import cli

# DESIGN's, to the letter.
MINE = '''\
import torch
from repa_lab.plugins import Loss, Needs, Regularizer, RegularizerSettings, Shapes, Signals, regularizer

@regularizer("spread")
class Spread(Regularizer):
    """Keeps the mean tokens of a batch apart; no encoder is asked."""

    class Settings(RegularizerSettings):            # has weight, schedule, block_index
        margin: float = 1.0
        """Distance below which two images repel each other."""

    @classmethod
    def needs(cls, settings) -> Needs:              # what must be captured or computed for it; taps are block indices
        return Needs(taps=(settings.block_index,))

    def __init__(self, settings, shapes: Shapes) -> None:
        super().__init__(settings, shapes)          # shapes.taps: widths of the asked taps; shapes.encoders: widths of the asked encoders

    def forward(self, signals: Signals, step: int) -> Loss:
        means = signals.taps[0].values.float().mean(1)             # Tokens: values (B, N, D), grid (h, w)
        closeness = (self.settings.margin - torch.pdist(means)).clamp_min(0).mean()
        return Loss(closeness, {"closeness": closeness})           # the trainer multiplies by the scheduled weight and logs the parts
'''
SPEC = """\
name: mine
plugins: [mine.py]
model: {family: sit, size: nano/2}
data: {source: digits, holdout: 64}
regularizer: {type: spread, weight: 0.1, margin: 0.5, schedule: {type: cosine, end: 0.0}}
train: {steps: 6, batch_size: 16, lr: 1e-3}
evaluate: {every: 6, samples: 16, sampler: {steps: 2}, extractor: {name: efficientnet_lite0}}
include: [{label: baseline, set: {regularizer.type: none}}]
run: {device: cpu, log_every: 1, wandb: {mode: disabled}}
"""
HEAD = "from repa_lab.plugins import Loss, Needs, Regularizer, RegularizerSettings, regularizer\n\n\n"
GOOD = "    def forward(self, signals, step):\n        return Loss(signals.taps[0].values.mean())\n"


def forget() -> None:
    """Take all plugins out of this process, as if it had just begun."""
    for origin in [origin for origin in map(REGULARIZERS.origin, REGULARIZERS.names) if origin]:
        REGULARIZERS.drop(origin.file)
    drop_plugins([Path(file) for file in loaded_plugins()])


def spec_of(folder: Path, plugin: str = MINE, spec: str = SPEC, name: str = "mine.py") -> Path:
    write(folder, plugin, name)
    return write(folder, spec, "mine.yaml")


def ids(file: Path) -> dict[str, str]:
    return {entry.arm.label: entry.run.run_id for entry in plan(file, file.parent / "runs").runs}


def refusal(file: Path) -> list[str]:
    """What planning says of a spec, without the folder."""
    with pytest.raises(SpecError) as caught:
        plan(file, file.parent / "runs")
    return str(caught.value).replace(f"{file.parent}/", "").splitlines()


def run_cli(*words: object, cwd: Path) -> tuple[int, list[str]]:
    """A command that knows no plugin yet: its status and what it says, without the folder."""
    forget()
    done = cli(*words, cwd=cwd)
    return done.returncode, (done.stdout + done.stderr).replace(f"{cwd}/", "").splitlines()
