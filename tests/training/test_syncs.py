"""A step between log points never waits for the device.

The device here is torch's meta device, from which nothing can be read: a step that asks for a value, or for sizes that
depend on values, raises. What waits although nothing is read is counted: copies between devices without
`non_blocking`, and tensors made on the device from Python's numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from repa_lab.align import regularizer as regularizer_module
from repa_lab.models.family import network_of
from repa_lab.training.batches import Batch
from repa_lab.training.trainer import Trainer
from tests.models.test_families import blocks_of, families, given, make
from tests.training.conftest import SIT_DOWN, UNET, make_options, make_run

META = torch.device("meta")
# Their models in diffusers read from the device themselves: lengths of texts, and which tokens an expert takes.
WAITING = {"hidream", "lumina2"}


class Copies(TorchDispatchMode):
    """Notes copies between devices that wait and, if asked, values that are read from the CPU as they would be from a GPU."""

    def __init__(self, seen: list[str], with_reads: bool) -> None:
        super().__init__()
        self.seen, self.with_reads = seen, with_reads

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if self.with_reads and name in ("_local_scalar_dense", "nonzero"):
            self.seen.append(name)
        if name == "_to_copy" and kwargs.get("device") not in (None, args[0].device) and not kwargs.get("non_blocking"):
            self.seen.append(f"blocking copy from {args[0].device} to {kwargs['device']}")
        if name == "copy_" and args[0].device != args[1].device and not (args[2:] or [kwargs.get("non_blocking")])[0]:
            self.seen.append(f"blocking copy from {args[1].device} to {args[0].device}")
        return func(*args, **kwargs)


class Factories(TorchFunctionMode):
    """Notes tensors that are made on the device from Python's numbers."""

    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        is_from_numbers = func in (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor)
        if is_from_numbers and made.device == META:
            self.seen.append(f"{func.__name__} of numbers")
        return made


@contextmanager
def watched(with_reads: bool = False) -> Iterator[list[str]]:
    """A list of what waits for the device within a with-statement."""
    seen: list[str] = []
    with Copies(seen, with_reads), Factories(seen):
        yield seen


READS: list[Callable[[torch.Tensor], Any]] = [
    torch.Tensor.item,
    torch.Tensor.tolist,
    torch.Tensor.cpu,
    torch.nonzero,
    bool,
    lambda value: value[value > 0],
    lambda value: value.repeat_interleave(value.long()),
]


@pytest.mark.parametrize("read", READS)
def test_what_reads_from_the_device_raises(read):
    with pytest.raises((RuntimeError, NotImplementedError), match=r"meta|unimplemented"):
        read(torch.ones(1, device=META))


def test_what_waits_without_reading_is_seen_and_nothing_else():
    with watched() as seen:
        torch.ones(3).to(META)
        torch.empty(3, device=META).copy_(torch.ones(3))
        torch.tensor([1.0, 2.0], device=META)
        torch.empty(2, device=META).new_tensor([1.0, 2.0])
    assert len(seen) == 4
    with watched() as seen:
        torch.ones(3).to(META, non_blocking=True).add(1)
        torch.empty(3, device=META).copy_(torch.ones(3), non_blocking=True)
        torch.tensor([1.0])
    assert seen == []


@pytest.fixture(scope="module")
def filled(cache) -> Path:
    """The cache with what the tiny runs need of it."""
    Trainer(make_run(), make_options(), cache)
    return cache


@pytest.fixture
def on_meta(monkeypatch) -> None:
    """The meta device in the place of a GPU."""
    dtype_of = torch.get_autocast_dtype
    monkeypatch.setattr(Accelerator, "device", META)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda kind: torch.bfloat16 if kind == "meta" else dtype_of(kind))


def on_device(batch: Batch) -> Batch:
    """A batch as it arrives on the device: all but its numbers."""
    condition = {name: values.to(META) for name, values in batch.condition.items()}
    loaded = tuple(values.to(META) for values in batch.loaded)
    x, noise, t = (values.to(META) for values in (batch.x, batch.noise, batch.t))
    return Batch(batch.ids, x, noise, t, condition, loaded)


RUNS: dict[str, dict[str, Any]] = {
    "sit": {},
    "plain sit": {"regularizer": {"type": "none"}},
    "unet": {**UNET, "regularizer.type": "urepa"},
    "sit-down": {**SIT_DOWN, "regularizer.type": "urepa"},
    "min-SNR, clipped, standardised": {
        "train.loss_weight": {"type": "min_snr"},
        "train.grad_clip": 1.0,
        "regularizer.encoder.standardize": True,
    },
}


@pytest.mark.usefixtures("on_meta")
@pytest.mark.parametrize("settings", RUNS.values(), ids=RUNS.keys())
def test_a_step_waits_for_nothing(settings, filled):
    trainer = Trainer(make_run(**settings), make_options(micro_batch=4), filled)
    batches = trainer.batches()
    trainer.step(on_device(next(batches)))  # what is copied once
    for _ in range(2):
        batch = on_device(next(batches))
        with watched() as seen:
            outcome = trainer.step(batch)
        assert seen == []
    assert {value.device for value in outcome.values.values()} == {META}


CUTOFF = {"similarity_threshold": 0.5, "similarity_min_count": 1}


@pytest.mark.usefixtures("on_meta")
def test_a_similarity_is_read_one_step_after_its_copy_was_begun(filled, monkeypatch):
    """The copy itself is stood in for, since nothing can be copied from the meta device."""
    order: list[str] = []

    def start_reading(value: torch.Tensor) -> Callable[[], float]:
        assert value.device == META
        step = trainer.progress.step
        order.append(f"copy of {step}")
        return lambda: order.append(f"read of {step} in {trainer.progress.step}") or 0.0

    monkeypatch.setattr(regularizer_module, "start_reading", start_reading)
    run = make_run(**{"regularizer.schedule": CUTOFF})
    trainer = Trainer(run, make_options(), filled)
    batches = trainer.batches()
    for _ in range(3):
        trainer.step(on_device(next(batches)))
    assert order == ["copy of 0", "read of 0 in 1", "copy of 1", "read of 1 in 2", "copy of 2"]


def test_a_scaled_step_waits_for_nothing(filled):
    """On a CPU, with the fused optimizer that a GPU gets; torch's other ones read whether a gradient overflowed."""
    trainer = Trainer(make_run(**{"train.grad_clip": 1.0}), make_options(), filled)
    scaler, optimizer = torch.amp.GradScaler("cpu"), trainer.state.optimizer
    trainer.accelerator.scaler = optimizer.scaler = scaler
    for group in optimizer.param_groups:
        group["fused"] = True
    optimizer.optimizer._step_supports_amp_scaling = True
    batches = trainer.batches()
    trainer.step(next(batches))
    batch = next(batches)
    with watched(with_reads=True) as seen:
        trainer.step(batch)
    assert seen == []
    assert scaler.get_scale() == 2.0**16


@pytest.mark.usefixtures("on_meta")
@families
def test_a_pretrained_denoiser_waits_for_nothing_of_ours(family):
    denoiser = make(family).train()
    latents, time, condition = given(family, denoiser)
    denoiser.to(META)
    condition = {name: values if "mask" in name else values.to(META) for name, values in condition.items()}
    tap = denoiser.tap(blocks_of(family, denoiser)[0])
    latents, time = latents.to(META), time.to(META)
    with watched() as seen:
        if family.name in WAITING:
            with pytest.raises(NotImplementedError) as caught:
                denoiser(latents, time, **condition)
            ours = [str(entry.path) for entry in caught.traceback if "repa_lab" in str(entry.path)]
            assert ours[-1].endswith("models/pretrained.py")  # the call of the model, not the family's inputs
            return
        (denoiser(latents, time, **condition).sum() + tap.take().values.sum()).backward()
    assert seen == []
    unused = [name for name, parameter in denoiser.named_parameters() if parameter.grad is None]
    assert bool(unused) == network_of(family).unused
