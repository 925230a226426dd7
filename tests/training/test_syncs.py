"""A step between log points never waits for the device.

The device here is torch's meta device, from which nothing can be read: a step that asks for a value, or for sizes that
depend on values, raises. What waits although nothing is read is counted: copies between devices without
`non_blocking`, and tensors made on the device from Python's numbers.
"""

from __future__ import annotations

import functools
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from repa_lab.align import regularizer as regularizer_module
from repa_lab.models.family import TEXT_LENGTHS, network_of
from repa_lab.training import trainer as trainer_module
from repa_lab.training.batches import Batch
from repa_lab.training.trainer import Trainer
from tests.models.test_families import blocks_of, families, given, make
from tests.training.conftest import SIT_DOWN, UNET, make_options, make_run

META = torch.device("meta")
REPOSITORY = str(Path(__file__).parents[2] / "repa_lab")
# Their models in diffusers read from the device themselves: lengths of texts, and which tokens an expert takes.
READING = {"hidream", "lumina2"}
# Theirs copy small tables to the device in every step, or once.
COPYING = {"chroma", "qwen_image", "z_image", "cogview4", "kandinsky5"}


def caller() -> str:
    """The innermost place that is neither torch's nor this file's."""
    frames = [frame for frame in traceback.extract_stack() if "/torch/" not in frame.filename]
    frame = next(frame for frame in reversed(frames) if frame.filename != __file__)
    return f"{frame.filename}:{frame.lineno}: {frame.line}"


class Copies(TorchDispatchMode):
    """Notes copies between devices that wait and, if asked, values that are read from the CPU as they would be from a GPU."""

    def __init__(self, seen: list[str], with_reads: bool) -> None:
        super().__init__()
        self.seen, self.with_reads = seen, with_reads

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if self.with_reads and name in ("_local_scalar_dense", "nonzero"):
            self.seen.append(f"{name} in {caller()}")
        if name == "_to_copy" and kwargs.get("device") not in (None, args[0].device) and not kwargs.get("non_blocking"):
            self.seen.append(f"blocking copy to {kwargs['device']} in {caller()}")
        if name == "copy_" and args[0].device != args[1].device and not (args[2:] or [kwargs.get("non_blocking")])[0]:
            self.seen.append(f"blocking copy to {args[0].device} in {caller()}")
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
            self.seen.append(f"{func.__name__} of numbers in {caller()}")
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
    monkeypatch.setattr(Accelerator, "device", META)
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())  # it knows no meta device


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


def test_a_scaled_step_waits_for_nothing(filled, monkeypatch):
    """On a CPU, with the fused optimizer that a GPU gets; torch's other ones read whether a gradient overflowed."""
    make_accelerator = trainer_module._accelerator

    def with_scaler(*args: Any) -> Accelerator:
        accelerator = make_accelerator(*args)
        accelerator.scaler = torch.amp.GradScaler("cpu")
        return accelerator

    monkeypatch.setattr(trainer_module, "_accelerator", with_scaler)
    monkeypatch.setattr(torch.optim, "AdamW", functools.partial(torch.optim.AdamW, fused=True))
    trainer = Trainer(make_run(**{"train.grad_clip": 1.0}), make_options(), filled)
    batches = trainer.batches()
    trainer.step(next(batches))
    batch = next(batches)
    with watched(with_reads=True) as seen:
        trainer.step(batch)
    assert seen == []
    assert trainer.state.scaler.get_scale() == 2.0**16


@pytest.mark.usefixtures("on_meta")
@families
def test_a_pretrained_denoiser_waits_for_nothing_of_ours(family):
    """And says whether parameters get no gradient; models of diffusers may wait in code of their own."""
    denoiser = make(family).train()
    latents, time, condition = given(family, denoiser)
    on_device = {name: values.to(META) for name, values in condition.items()}
    if lengths := network_of(family).lengths:
        on_device[TEXT_LENGTHS] = lengths(condition)
    denoiser.to(META)
    tap = denoiser.tap(blocks_of(family, denoiser)[0])
    latents, time = latents.to(META), time.to(META)
    with watched() as seen:
        try:
            loss = denoiser(latents, time, **on_device).sum() + tap.take().values.sum()
        except NotImplementedError:
            assert family.name in READING
            assert not traceback.extract_tb(sys.exc_info()[2])[-1].filename.startswith(REPOSITORY)
            return
        loss.backward()
    assert family.name not in READING
    assert [wait for wait in seen if REPOSITORY in wait] == []
    assert bool(seen) == (family.name in COPYING)
    unused = [name for name, parameter in denoiser.named_parameters() if parameter.grad is None]
    assert bool(unused) == network_of(family).unused
