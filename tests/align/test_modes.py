"""The core in the modes that people train in: compiled, checkpointed, accumulated, in half precision."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from repa_lab.align import REPA, UREPA, Tokens
from repa_lab.models.tap import Tap
from tests.align.references import align

GRID, FINER, SMALL = (3, 4), (4, 5), {"width": 8}
KINDS: dict[str, Callable[..., REPA]] = {
    "repa": REPA,
    "urepa": UREPA,
    "conv": lambda *args, **settings: REPA(*args, **{**settings, "projector": {"type": "conv"}}),
    "nt_xent": lambda *args, **settings: REPA(*args, **settings, loss="nt_xent"),
    "l1_margin": lambda *args, **settings: UREPA(
        *args, **settings, manifold={"scope": "batch_tokens", "distance": "l1_margin"}
    ),
}
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())


def tokens(dim: int, grid: tuple[int, int], batch: int = 4) -> Tokens:
    return Tokens(torch.randn(batch, grid[0] * grid[1], dim), grid)


def gradients(
    regularizer: REPA, call: Callable[..., object], student: Tokens, teacher: Tokens, step: int
) -> list[torch.Tensor]:
    """The loss and the gradients of student and projector."""
    leaf = Tokens(student.values.detach().requires_grad_(), student.grid)
    regularizer.zero_grad(set_to_none=False)
    loss = align(regularizer, leaf, teacher, step, call).loss
    loss.backward()
    return [loss.detach(), leaf.values.grad, *(p.grad.clone() for p in regularizer.parameters())]


@kinds
def test_compiling_changes_no_number_and_happens_once_a_phase_of_the_schedule(kind):
    torch.compiler.reset()
    graphs: list[torch.fx.GraphModule] = []

    def count(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    schedule = {"type": "cosine", "warmup_steps": 3, "decay_steps": 40}
    regularizer = kind(6, 5, weight=0.5, schedule=schedule, projector=SMALL)
    compiled = torch.compile(regularizer, backend=count, fullgraph=True)
    for step in range(25):
        student, teacher = tokens(6, GRID), tokens(5, FINER)
        found, expected = (gradients(regularizer, call, student, teacher, step) for call in (compiled, regularizer))
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert len(graphs) <= 3  # the first step, the other steps of the warm-up, and all that follow


@pytest.mark.parametrize(
    "name", [name for name in KINDS if name != "l1_margin"]
)  # whose relations reach across the batch
def test_micro_batches_add_up_to_the_batch(name):
    regularizer, student, teacher = KINDS[name](6, 5, projector=SMALL), tokens(6, GRID), tokens(5, FINER)
    whole = gradients(regularizer, regularizer, student, teacher, 0)
    parts = [
        gradients(regularizer, regularizer, Tokens(s, GRID), Tokens(t, FINER), 0)
        for s, t in zip(student.values.split(1), teacher.values.split(1), strict=True)
    ]
    for number, expected in enumerate(whole):
        found = [part[number] for part in parts]
        together = torch.cat(found) / 4 if number == 1 else torch.stack(found).mean(0)
        torch.testing.assert_close(together, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_the_tapped_block_changes_no_gradient(reentrant):
    torch.manual_seed(1)
    blocks, regularizer = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)]), UREPA(6, 5, projector=SMALL)
    tap = Tap(blocks[0], lambda output: Tokens(output, GRID))
    x, teacher = torch.randn(2, 12, 6), tokens(5, GRID, batch=2)

    def step(checkpointed: bool) -> list[torch.Tensor]:
        hidden = x.clone().requires_grad_()
        for block in blocks:
            hidden = (checkpoint(block, hidden, use_reentrant=reentrant) if checkpointed else block(hidden)).tanh()
        (hidden.square().mean() + align(regularizer, tap.take(), teacher).loss).backward()
        found = [p.grad.clone() for module in (blocks, regularizer) for p in module.parameters()]
        for module in (blocks, regularizer):
            module.zero_grad()
        return found

    plain = step(checkpointed=False)
    for _ in range(2):  # the second time, what the first left in the tap would be seen
        assert all(torch.equal(a, b) for a, b in zip(plain, step(checkpointed=True), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@kinds
def test_half_precision_trains_with_a_gradient_scaler(kind, dtype):
    torch.manual_seed(2)
    block, regularizer = nn.Linear(6, 6), kind(6, 5, weight=1.0, projector=SMALL)
    optimizer = torch.optim.Adam([*block.parameters(), *regularizer.parameters()], lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, enabled=dtype == torch.float16)
    x, teacher, losses = torch.randn(4, 12, 6), tokens(5, GRID), []
    for step in range(40):
        with torch.autocast("cpu", dtype=dtype):
            outcome = align(regularizer, Tokens(block(x), GRID), teacher, step)
        assert outcome.loss.dtype == torch.float32
        losses.append(outcome.loss.item())
        scaler.scale(outcome.loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.1
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in regularizer.parameters())
