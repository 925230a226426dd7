"""What a training step costs, as ratios of things measured in turn in one run. Prints; asserts nothing about time."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits
from torch.utils.flop_counter import FlopCounterMode

from repa_lab.align import REPA, Signals, Tokens
from repa_lab.data.sources import split
from repa_lab.models.families import FAMILIES
from repa_lab.models.sit import SiT
from repa_lab.models.tap import Tap
from repa_lab.models.tiny import write_tiny_pipeline
from repa_lab.orchestration.plan import identify_run
from repa_lab.spec import Machine, RunConfig, RunOptions, load_spec
from repa_lab.training.batches import Order, generator
from repa_lab.training.costs import cost_of
from repa_lab.training.trainer import Trainer
from tests.benchmarks.ratios import in_turn, ratios, show, spread
from tests.training.pretrained import make_pretrained_run, open_pretrained, write_clips

pytestmark = pytest.mark.bench


def test_regularised_step_against_plain_step_with_cached_features():
    """(a) SiT-B/2 at 256 px (256 tokens), DINOv2-B's width, batch 8, AdamW."""
    torch.manual_seed(0)
    denoiser = SiT.from_size("B/2")
    regularizer = REPA(768, 768)
    tap = Tap(denoiser.blocks[3], lambda output: Tokens(output, (16, 16)))
    x, t, y = torch.randn(8, 4, 32, 32), torch.rand(8), torch.arange(8)
    features = torch.randn(8, 256, 768).half()  # as the cache keeps them
    plain = torch.optim.AdamW([p for p in denoiser.parameters() if p.requires_grad])
    both = torch.optim.AdamW([p for m in (denoiser, regularizer) for p in m.parameters() if p.requires_grad])

    def step(optimizer, aligned):
        loss = F.mse_loss(denoiser(x, t, y), x)
        tokens = tap.take()
        if aligned:
            signals = Signals(taps=(tokens,), encoders=(Tokens(features.float(), (16, 16)),))
            loss = loss + regularizer.weight_at(0) * regularizer(signals).value
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    # The projector's share of multiply-adds, forward and backward alike: 256 tokens an image through 7.34 M weights.
    projector, backbone = 256 * 7_342_080 / 1e9, 23.00
    show(
        "regularised step / plain step, SiT-B/2, batch 8",
        ratios(lambda: step(both, True), lambda: step(plain, False), rounds=5),
        f"; the projector's FLOPs alone predict {1 + projector / backbone:.3f}",
    )


@pytest.mark.parametrize(("batch", "rounds"), [(1, 75), (64, 15)])
def test_lab_loop_against_a_bare_loop(batch, rounds, tmp_path):
    """(b) `Trainer` with its streams, EMA, clipping and row-keeping against the shortest loop that computes the same.

    Both loops train the same tensors, since two copies of a model differ by more than the loops do. At batch 1 the
    difference is seen best, because a step is short.
    """
    settings = {"train.batch_size": batch, "train.steps": 10_000}
    spec = load_spec(Path(__file__).parents[2] / "experiments/quickstart.yaml", settings)
    config = spec.arms[0].config
    trainer = Trainer(identify_run(config, 0), RunOptions(device="cpu"), tmp_path)
    trainer.save(tmp_path)
    batches, step, steps = trainer.batches(), 0, 20

    bunch = load_digits()
    pixels = torch.tensor(np.rint(bunch.images * (255 / 16)), dtype=torch.float32).unsqueeze(1) / 127.5 - 1
    labels = torch.tensor(bunch.target)
    denoiser, optimizer, average = trainer.state.denoiser, trainer.state.optimizer, trainer.state.ema.average
    parameters = [p for p in denoiser.parameters() if p.requires_grad]
    averages = [*average.values()]
    order = Order(split(len(labels), config.data.held_out(len(labels))).train, 0)

    def bare():
        nonlocal step
        for _ in range(steps):
            ids, draw = order.take(step * batch, batch), generator(0, "noise", step * batch)
            step += 1
            t, dropped = torch.rand(batch, generator=draw), torch.rand(batch, generator=draw) < 0.1
            x, noise, time = pixels[ids], torch.randn(batch, 1, 8, 8, generator=draw), t.view(-1, 1, 1, 1)
            velocity = denoiser((1 - time) * x + time * noise, t, labels[ids].masked_fill(dropped, 10))
            F.mse_loss(velocity, noise - x).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            torch._foreach_lerp_(averages, [p.detach() for p in parameters], 0.01)

    def lab():
        for _ in range(steps):
            outcome = trainer.step(next(batches))
        outcome.row()

    def trained() -> dict[str, torch.Tensor]:
        return {name: p.clone() for name, p in {**denoiser.state_dict(), **average}.items()}

    lab()
    expected = trained()
    trainer.resume(tmp_path)
    bare()
    assert all(torch.equal(values, expected[name]) for name, values in trained().items())
    seconds = in_turn(lab, bare, rounds)
    added, lowest, highest = spread(1e6 * (one - other) / steps for one, other in seconds)
    bare_step = 1e3 * spread(other for _, other in seconds)[0] / steps
    note = f"; {added:.0f} microseconds more ({lowest:.0f} to {highest:.0f}) than {bare_step:.1f} ms; the aim is 1.02"
    show(f"lab loop / bare loop, SiT-nano/2, batch {batch}", spread(one / other for one, other in seconds), note)


def test_steps_of_weight_0_cost_what_plain_steps_do(tmp_path):
    """(c) After the cutoff, with an encoder that is not cached: it must not be asked, and nothing else must be left over."""
    from repa_lab.encoders.encoder import Encoder

    file = Path(__file__).parents[2] / "experiments/quickstart.yaml"
    online = {"name": "efficientnet_lite0", "image_size": 64, "cache": False, "standardize": False}
    cut = {"regularizer.encoder": online, "regularizer.schedule": {"cutoff_step": 1}, "evaluate.encoder": None}
    trainers = []
    for arm, settings in (("sit, aligned", cut), ("sit, baseline", {"evaluate.encoder": None})):
        chosen = next(one for one in load_spec(file).arms if one.label == arm)
        trainers.append(
            Trainer(identify_run(chosen.with_settings(settings).config, 0), RunOptions(device="cpu"), tmp_path)
        )
    batches = [trainer.batches() for trainer in trainers]
    calls: list[int] = []
    forward = Encoder.forward

    def counting(self, pixels):
        calls.append(len(pixels))
        return forward(self, pixels)

    Encoder.forward = counting
    try:
        trainers[0].step(next(batches[0]))
        trainers[1].step(next(batches[1]))
        assert len(calls) == 1  # the one step before the cutoff

        def steps(number):
            for _ in range(20):
                trainers[number].step(next(batches[number]))

        measured = ratios(lambda: steps(0), lambda: steps(1), rounds=11)
    finally:
        Encoder.forward = forward
    assert len(calls) == 1
    show(
        "step after the cutoff / plain step",
        measured,
        f"; encoder passes in {12 * 20} steps after it: {len(calls) - 1}",
    )


ENCODER = {"name": "tiny-dinov2_vits14", "image_size": 224}  # 16x16 tokens, as the denoiser's, and hardly any cost
METHODS = {
    "repa": {"type": "repa", "encoder": ENCODER},
    "irepa": {"type": "repa", "encoder": ENCODER, "projector": "conv", "spatial_norm": 0.6},
    "relation": {"type": "relation", "encoder": ENCODER},
    "haste": {"type": "haste", "encoder": {**ENCODER, "cache": False}, "layers": 2},  # as many as the tiny encoder has
    "dispersive": {"type": "dispersive"},
    "layersync": {"type": "layersync"},
    "sra": {"type": "sra"},
    "sra2": {"type": "sra2"},
    "self_flow": {"type": "self_flow"},
    "self_transcendence": {"type": "self_transcendence", "weights": "model.safetensors"},
}


def stepping(trainer: Trainer) -> Callable[[], object]:
    batches = trainer.batches()
    return lambda: trainer.step(next(batches))


@pytest.mark.parametrize("name", METHODS)
def test_a_methods_step_against_the_plain_step(name, tmp_path, monkeypatch):
    """(d) SiT-S/2 with 256 tokens at batch 2, through `Trainer`; the projectors are REPA's, of width 2,048."""
    monkeypatch.chdir(tmp_path)
    options, draw = RunOptions(device="cpu"), np.random.default_rng(0)
    for number in range(64):
        folder = tmp_path / "images" / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{number}.png")

    def config_of(section: Mapping[str, Any]) -> RunConfig:
        spec = {
            "name": "methods",
            "model": {"family": "sit", "size": "S/2"},
            "regularizer": section,
            "data": {"source": "imagefolder", "path": "images", "resolution": 32},
            "train": {"steps": 100, "batch_size": 2},
            "evaluate": {"every": 100, "samples": 16, "extractor": {"name": "efficientnet_lite0"}},
        }
        return load_spec(spec).arms[0].config

    def flops_of(config: RunConfig) -> float:
        return cost_of(config, options.resolved(Machine())).image_flops

    without, config = config_of({"type": "none"}), config_of(METHODS[name])
    plain = Trainer(identify_run(without, 0), options, tmp_path)
    plain.model.denoiser.export(tmp_path)
    trainer = Trainer(identify_run(config, 0), options, tmp_path)
    measured, predicted = ratios(stepping(trainer), stepping(plain), rounds=7), flops_of(config) / flops_of(without)
    note = f"; FLOPs predict {predicted:.3f}, so {measured[0] / predicted:.3f} x that; the aim is 1.05"
    show(f"step with {name} / plain step, SiT-S/2, batch 2", measured, note)


def test_crepas_step_against_the_plain_step(tmp_path):
    """(e) A wan of SiT-S's width and depth, all of it trained, on clips of three latent frames of 64 tokens at batch 2.

    FLOPs are those that torch counts in both steps, because the formulas know only the released size.
    """
    width = {"num_attention_heads": 6, "attention_head_dim": 64, "ffn_dim": 1536, "num_layers": 12}
    write_tiny_pipeline(FAMILIES["wan"], tmp_path / "wan", width)
    write_clips(tmp_path / "clips")
    encoder = {"name": "tiny-dinov2_vits14", "image_size": 112}
    settings = {"model.train": "full", "data.resolution": 128, "train.batch_size": 2, "train.steps": 1000}

    steps, flops = [], []
    for section in ({"type": "crepa", "encoder": encoder}, {"type": "none"}):
        run = make_pretrained_run("wan", tmp_path / "wan", tmp_path / "clips", **settings, regularizer=section)
        open_pretrained(run, tmp_path)  # encodes the captions
        steps.append(stepping(Trainer(run, RunOptions(device="cpu"), tmp_path)))
        with FlopCounterMode(display=False) as counter:
            steps[-1]()
        flops.append(counter.get_total_flops())
    measured, predicted = ratios(*steps, rounds=7), flops[0] / flops[1]
    note = f"; FLOPs predict {predicted:.3f}, so {measured[0] / predicted:.3f} x that; the aim is 1.05"
    show("step with crepa / plain step, wan of width 384, batch 2", measured, note)
