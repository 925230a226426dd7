"""The taps of diffusers' families in the modes that people train in."""

from __future__ import annotations

import torch

from repa_lab.align import REPA, UREPA, Signals
from tests.models.test_families import blocks_of, families, given, make


@families
def test_a_tap_set_before_compiling_captures_the_same(family):
    torch.compiler.reset()
    denoiser = make(family)
    latents, time, condition = given(family, denoiser)
    taps = [denoiser.tap(block) for block in {blocks_of(family, denoiser)[0], blocks_of(family, denoiser)[-1]}]
    with torch.no_grad():
        expected = denoiser(latents, time, **condition), *(tap.take().values for tap in taps)
        found = (
            torch.compile(denoiser, backend="eager")(latents, time, **condition),
            *(tap.take().values for tap in taps),
        )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@families
def test_one_step_with_its_regularizer_reaches_what_lies_before_the_tap_and_nothing_behind(family):
    denoiser = make(family).train()
    latents, time, condition = given(family, denoiser)
    block = blocks_of(family, denoiser)[0]
    tap = denoiser.tap(block)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        denoiser(latents, time, **condition)
    student = tap.take()
    kind = UREPA if family.regularizer == "urepa" else REPA
    regularizer = kind(student.dim, 5, projector={"width": 8})
    teacher = type(student)(torch.randn(2, 20, 5), (5, 4))
    loss = regularizer(Signals(taps=(student,), encoders=(teacher,)), 0)
    loss.value.backward()
    assert loss.value.dtype == torch.float32
    reached = {name for name, p in denoiser.net.named_parameters() if p.grad is not None and p.grad.any()}
    lists = [blocks.path for blocks in family.network.blocks]
    behind = [
        n
        for n in reached
        if any(n.startswith(f"{path}.1.") for path in lists) or n.startswith(("up_blocks", "proj_out"))
    ]
    assert reached
    assert behind == []
    assert all(p.grad.isfinite().all() for name, p in denoiser.net.named_parameters() if name in reached)
