"""What CKNNA costs against the obvious way to write it. Prints ratios; asserts that the numbers agree, nothing of time."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from threadpoolctl import threadpool_limits

from repa_lab.metrics import cka, cknna
from tests.benchmarks.ratios import ratios, show

pytestmark = pytest.mark.bench


def direct(x: torch.Tensor, y: torch.Tensor, k: int = 10) -> float:
    """The paper's form with whole n x n kernels and masks, in float32."""

    def kernel(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        products = features @ features.T
        near = products.clone().fill_diagonal_(-torch.inf).topk(k, dim=1).indices
        return products - products.mean(dim=1, keepdim=True), torch.zeros_like(products).scatter_(1, near, 1)

    (of_x, near_x), (of_y, near_y) = kernel(x), kernel(y)
    across = (of_x * of_y * near_x * near_y).sum()
    return float(across / ((of_x.square() * near_x).sum() * (of_y.square() * near_y).sum()).sqrt())


def direct_cka(x: torch.Tensor, y: torch.Tensor) -> float:
    """Unbiased CKA with whole n x n kernels, in float32."""

    def kernel(features: torch.Tensor) -> torch.Tensor:
        features = features - features.mean(dim=0)
        return (features @ features.T).fill_diagonal_(0)

    def hsic(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        n = len(a)
        total = a.sum() * b.sum() / ((n - 1) * (n - 2))
        return (a * b).sum() + total - 2 * (a.sum(dim=0) @ b.sum(dim=1)) / (n - 2)

    of_x, of_y = kernel(x), kernel(y)
    return float(hsic(of_x, of_y) / (hsic(of_x, of_x) * hsic(of_y, of_y)).sqrt())


def pair(count: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features that share most of a few strong directions, as those of two layers do."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(count, 16, generator=generator)
    sides = [shared @ torch.randn(16, width, generator=generator) for _ in range(2)]
    return tuple(side + torch.randn(count, width, generator=generator) for side in sides)  # type: ignore[return-value]


FORMS: dict[str, tuple[Callable[..., float], Callable[..., float]]] = {
    "cknna": (direct, cknna),
    "cka": (direct_cka, cka),
}
SHAPES = [(2000, 768), (10_000, 768)]
forms = pytest.mark.parametrize("form", FORMS)
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


@forms
@shapes
def test_time(form, shape):
    x, y = pair(*shape)
    whole, ours = FORMS[form]
    assert ours(x, y) == pytest.approx(whole(x, y), abs=1e-3)
    with threadpool_limits(1):  # NumPy's products have threads of their own; torch has one here
        measured = ratios(lambda: whole(x, y), lambda: ours(x, y), rounds=3)
    show(f"whole matrices in torch / {form}, time, n, d = {shape}", measured, f"({form} {ours(x, y):.3f})")


PEAK = """
import sys
from pathlib import Path
from tests.benchmarks import test_metrics_alignment as bench
work = bench.FORMS[sys.argv[1]][int(sys.argv[2])]
x, y = bench.pair(*map(int, sys.argv[3:]))
work(x[:64].clone(), y[:64].clone())
memory = lambda: {k: int(v.split()[0]) for k, _, v in (line.partition(":") for line in Path("/proc/self/status").open()) if "Vm" in k}
Path("/proc/self/clear_refs").write_text("5")
before = memory()["VmRSS"]
work(x, y)
print(memory()["VmHWM"] - before)
"""


@forms
@shapes
def test_memory(form, shape):
    mib = []
    for which in ("0", "1"):
        command = [sys.executable, "-c", PEAK, form, which, *map(str, shape)]
        one_thread = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=one_thread)
        mib.append(int(done.stdout) / 1024)
    print(
        f"\npeak memory beyond the inputs, {form}, n, d = {shape}: whole matrices {mib[0]:.0f} MiB, ours {mib[1]:.0f} MiB"
    )
