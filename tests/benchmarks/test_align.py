"""What the losses cost against the obvious ways to write them. Prints ratios; asserts that the numbers agree, nothing of time."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from repa_lab.align import alignment_loss, manifold_loss
from tests.benchmarks.ratios import ratios, show

pytestmark = pytest.mark.bench


def per_sample(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """One image after the other, as the papers' code loops."""
    total = torch.zeros(())
    for s, t in zip(student, teacher, strict=True):
        total = total - (F.normalize(s, dim=-1) * F.normalize(t, dim=-1)).sum(-1).mean()
    return total / len(student)


def torchs(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return -F.cosine_similarity(student, teacher, dim=-1).mean()


def gram(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Both N x N matrices, whole."""
    s, t = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
    return (s @ s.mT - t @ t.mT).square().mean()


def pair(batch: int, count: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch, count, width, requires_grad=True), torch.randn(batch, count, width)


def forward_and_backward(loss, student, teacher):
    def work() -> None:
        student.grad = None
        loss(student, teacher).backward()

    return work


@pytest.mark.parametrize("other", [per_sample, torchs], ids=["a loop over samples", "F.cosine_similarity"])
def test_alignment(other):
    student, teacher = pair(64, 256, 768)
    assert alignment_loss(student, teacher).item() == pytest.approx(other(student, teacher).item(), abs=1e-6)
    measured = ratios(*(forward_and_backward(loss, student, teacher) for loss in (other, alignment_loss)), rounds=41)
    show(f"{other.__name__} / alignment_loss, forward and backward, B 64, N 256, D 768", measured)


SHAPES = [(64, 256, 768), (8, 1369, 768), (8, 1369, 1536)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


@shapes
def test_manifold_time(shape):
    student, teacher = pair(*shape)
    assert manifold_loss(student, teacher).item() == pytest.approx(gram(student, teacher).item(), rel=1e-5)
    measured = ratios(*(forward_and_backward(loss, student, teacher) for loss in (gram, manifold_loss)), rounds=5)
    show(f"whole matrices / manifold_loss, time, B, N, D = {shape}", measured)


PEAK = """
import sys
from pathlib import Path
from tests.benchmarks import test_align as bench
loss = {"gram": bench.gram, "ours": bench.manifold_loss}[sys.argv[1]]
student, teacher = bench.pair(*map(int, sys.argv[2:]))
bench.forward_and_backward(loss, *(tokens[:, :2].detach().requires_grad_(i == 0) for i, tokens in enumerate((student, teacher))))()
memory = lambda: {k: int(v.split()[0]) for k, _, v in (line.partition(":") for line in Path("/proc/self/status").open()) if "Vm" in k}
before = memory()["VmRSS"]
bench.forward_and_backward(loss, student, teacher)()
print(memory()["VmHWM"] - before)
"""


@shapes
def test_manifold_memory(shape):
    mib = []
    for which in ("gram", "ours"):
        command = [sys.executable, "-c", PEAK, which, *map(str, shape)]
        mib.append(int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) / 1024)
    print(
        f"\npeak memory beyond the inputs, B, N, D = {shape}: whole matrices {mib[0]:.0f} MiB, manifold_loss {mib[1]:.0f} MiB"
    )
