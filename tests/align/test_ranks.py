"""The core under DistributedDataParallel: two real processes, gloo, and weights of 0 where they hurt others."""

from __future__ import annotations

import itertools
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from repa_lab.align import (
    REPA,
    UREPA,
    ManifoldSettings,
    ScheduleSettings,
    Signals,
    SimilarityCutoff,
    Tokens,
    manifold_loss,
)
from repa_lab.align.losses import gather, mean_over_ranks
from repa_lab.models.tap import Tap

WORLD = 2
GRID = (2, 3)
CUTOFF = {
    "similarity_threshold": -0.9,
    "similarity_ema_decay": 0.5,
    "threshold_mode": "recoverable",
    "similarity_min_count": 3,
    "probe_every": 2,
}


def _enter(work: Callable[..., Any], rank: int, folder: Path, settings: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    torch.save(work(rank, **settings), folder / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture
def in_two(tmp_path) -> Callable[..., list[Any]]:
    """Runs a function of this module in two processes that train together; what each of them returned."""
    numbers = itertools.count()

    def run(work: Callable[..., Any], **settings: Any) -> list[Any]:
        folder = tmp_path / str(next(numbers))
        folder.mkdir()
        context = multiprocessing.get_context("fork")  # this process has torch imported
        processes = [context.Process(target=_enter, args=(work, rank, folder, settings)) for rank in range(WORLD)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert [process.exitcode for process in processes] == [0, 0]
        return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]

    return run


class Denoiser(nn.Module):
    """Two blocks, of which the first is tapped."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.last(self.first(x).tanh())
        return out


def batches(steps: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    draw = torch.Generator().manual_seed(3)
    return [(torch.randn(4, 6, 4, generator=draw), torch.randn(4, 6, 5, generator=draw)) for _ in range(steps)]


def build(kind: str, schedule: dict[str, Any], manifold: str, cutoff: bool) -> tuple[Denoiser, REPA]:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"weight": schedule.get("weight", 0.5), "projector": {"width": 8}}
    settings["schedule"] = {name: value for name, value in schedule.items() if name != "weight"} | (
        CUTOFF if cutoff else {}
    )
    denoiser = Denoiser()
    if kind == "repa":
        return denoiser, REPA(8, 5, **settings)
    return denoiser, UREPA(8, 5, manifold_weight=3.0, manifold={"scope": manifold}, **settings)


def train(
    rank: int,
    kind: str,
    schedule: dict[str, Any],
    world: int = WORLD,
    manifold: str = "intra",
    always: bool = False,
    unused: bool = False,
    micro: int = 1,
    cutoff: bool = False,
) -> dict[str, torch.Tensor]:
    """Eight steps with AdamW and weight decay; the state of both modules at the end, and what was seen on the way."""
    denoiser, regularizer = build(kind, schedule, manifold, cutoff)
    tap = Tap(denoiser.first, lambda output: Tokens(output, GRID))
    wrapped, loss_of = (denoiser, regularizer) if world == 1 else (
        DistributedDataParallel(denoiser, find_unused_parameters=unused), DistributedDataParallel(regularizer),
    )  # fmt: skip
    optimizer = torch.optim.AdamW([*denoiser.parameters(), *regularizer.parameters()], lr=1e-2, weight_decay=0.1)
    weights = []
    for step, (x, teacher) in enumerate(batches(8)):
        parts = [part.chunk(world)[rank] for part in (x, teacher)]
        weights.append(regularizer.weight_at(step))
        for number, (some, tokens) in enumerate(zip(*(part.chunk(micro) for part in parts), strict=True), start=1):
            quiet = [module.no_sync() for module in (wrapped, loss_of)] if world > 1 and number < micro else []
            for one in quiet:
                one.__enter__()
            loss = wrapped(some).square().mean()
            if always or regularizer.is_active(step):
                alignment = loss_of(Signals(taps=(tap.take(),), encoders=(Tokens(tokens, GRID),)), step)
                regularizer.observe(step, alignment)
                loss = loss + regularizer.weight_at(step) * alignment.value
            (loss / micro).backward()
            for one in quiet:
                one.__exit__(None, None, None)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    state = {f"denoiser.{k}": v for k, v in denoiser.state_dict().items()}
    state |= {f"regularizer.{k}": v for k, v in regularizer.state_dict().items()}
    return {**state, "weights": torch.tensor(weights, dtype=torch.float64)}


SCHEDULES = {
    "warm-up": {"warmup_steps": 3},
    "decay end": {"type": "linear", "decay_steps": 4},
    "cutoff": {"cutoff_step": 4},
    "all of it": {"type": "cosine", "warmup_steps": 2, "decay_steps": 6, "cutoff_step": 7},
    "never": {"weight": 0.0},
}


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-4, atol=2e-6, msg=lambda message, name=name: f"{name}: {message}"
        )


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_weight_0_neither_crashes_nor_parts_the_processes(in_two, schedule):
    first, second = in_two(train, kind="urepa", schedule=schedule)
    assert 0.0 in first["weights"]
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert_close(first, train(0, "urepa", schedule, world=1))


@pytest.mark.parametrize(
    "settings",
    [
        {"always": True},  # who calls the module at weight 0 as well must not be punished
        {"unused": True},
        {"micro": 2},
        {"kind": "repa"},
    ],
    ids=str,
)
def test_other_ways_to_train_agree_with_one_process(in_two, settings):
    settings = {"kind": "urepa", "schedule": SCHEDULES["all of it"], **settings}
    first, second = in_two(train, **settings)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert_close(first, train(0, world=1, **{**settings, "unused": False}))


@pytest.mark.parametrize("scope", ["batch_pooled", "batch_tokens"])
def test_relations_across_the_batch_reach_across_processes(in_two, scope):
    settings = {"kind": "urepa", "schedule": {}, "manifold": scope}
    first, second = in_two(train, **settings)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert_close(first, train(0, world=1, **settings))


def relations(rank: int, scope: str) -> dict[str, torch.Tensor]:
    ((student, teacher),) = batches(1)
    student, teacher = (side.chunk(WORLD)[rank].clone() for side in (student, teacher))
    student.requires_grad_()
    value = manifold_loss(student, teacher, ManifoldSettings(scope=scope))
    value.backward()
    return {"value": value.detach(), "gradient": student.grad, "rows": gather(student[:, 0].detach())}


@pytest.mark.parametrize("scope", ["batch_pooled", "batch_tokens"])
def test_gathered_gradients_are_those_of_one_process(in_two, scope):
    found = in_two(relations, scope=scope)
    ((student, teacher),) = batches(1)
    assert torch.equal(found[0]["rows"], student[:, 0])
    student.requires_grad_()
    value = manifold_loss(student, teacher, ManifoldSettings(scope=scope))
    value.backward()
    for one in found:
        torch.testing.assert_close(one["value"], value.detach())
    # DistributedDataParallel divides the sum of what the processes find by their number.
    joined = torch.cat([one["gradient"] for one in found]) / WORLD
    torch.testing.assert_close(joined, student.grad, rtol=1e-5, atol=1e-7)


AT_ONCE = {"similarity_threshold": 0.5, "similarity_ema_decay": 0.0, "similarity_min_count": 1}


def decide(rank: int) -> dict[str, torch.Tensor]:
    cutoff, cut = SimilarityCutoff(ScheduleSettings(**AT_ONCE)), []
    for step, seen in enumerate([(0.9, 0.0), (0.2, 0.7), (0.9, 0.2), (0.0, 0.0)]):
        cutoff.observe(step, torch.tensor(seen[rank]))
        cut.append(cutoff.is_cut(step + 1))
    mean = mean_over_ranks(torch.tensor([1.0 + rank, 4.0]))
    return {"cut": torch.tensor(cut), "state": cutoff.get_extra_state(), "mean": mean}


def test_processes_that_see_different_similarities_decide_alike(in_two):
    found = in_two(decide)
    # Means 0.45, 0.45, 0.55, 0: alone, the first process would cut at once and the second a step later.
    for one in found:
        assert one["cut"].tolist() == [False, False, True, True]
        assert one["mean"].tolist() == [1.5, 4.0]
    assert torch.equal(found[0]["state"], found[1]["state"])


def test_a_cutoff_that_comes_and_goes_keeps_them_together(in_two):
    settings = {"kind": "repa", "schedule": {}, "cutoff": True}
    first, second = in_two(train, **settings)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert first["weights"].tolist() == [0.5, 0.5, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert_close(first, train(0, world=1, **settings))


def test_alone_nothing_is_exchanged():
    assert not distributed.is_initialized()
    rows = torch.randn(3, 2)
    assert gather(rows) is rows
    assert mean_over_ranks(rows[0, 0]) == rows[0, 0]
