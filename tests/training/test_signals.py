"""What a regularizer asks for reaches it in a real training step, and nothing else is computed."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from typing import ClassVar

import pytest
import torch
from torch import nn

from repa_lab.align import Loss, Needs, Regularizer, RegularizerSettings, Signals
from repa_lab.align.settings import REGULARIZERS, EncoderSettings, regularizer
from repa_lab.encoders.encoder import load_encoder
from repa_lab.models.tap import TapError
from repa_lab.training.batches import Batch
from repa_lab.training.checkpoint import PREFIX
from repa_lab.training.trainer import Trainer
from tests.rounding import LITE0, MEAN, SIT, rounding
from tests.training.conftest import ENCODER, PASS, PLAIN_DESCENT, make_options, make_run

TAPPED, AVERAGED = (2, 0), (0, 3)


class Everything(Regularizer):
    """Asks for all there is, keeps what it is given, and pulls the first tap toward 0."""

    seen: ClassVar[list[Signals]] = []

    class Settings(RegularizerSettings):
        encoder: EncoderSettings = EncoderSettings()
        taps: tuple[int, ...] = TAPPED
        ema_taps: tuple[int, ...] = AVERAGED

    @classmethod
    def needs(cls, settings) -> Needs:
        return Needs(settings.taps, settings.encoders, settings.ema_taps, latents=True, prediction=True)

    def __init__(self, settings, shapes) -> None:
        super().__init__(settings, shapes)
        self.scale = nn.Linear(shapes.taps[0], 1)

    def forward(self, signals: Signals, step: int) -> Loss:
        self.seen.append(signals)
        return Loss(self.scale(signals.taps[0].values.float()).square().mean())


class PredictionAlone(Everything):
    """Asks for the denoiser's output and its target, as contrastive flow matching does."""

    class Settings(RegularizerSettings):
        pass

    @classmethod
    def needs(cls, settings) -> Needs:
        return Needs(prediction=True)

    def __init__(self, settings, shapes) -> None:
        Regularizer.__init__(self, settings, shapes)

    def forward(self, signals: Signals, step: int) -> Loss:
        self.seen.append(signals)
        output, target = signals.prediction
        return Loss(-(output.float() - target.roll(1, dims=0)).square().mean())


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    regularizer("everything")(Everything)
    regularizer("prediction_alone")(PredictionAlone)
    Everything.seen.clear()
    yield
    REGULARIZERS.drop(__file__)


def trainer_of(cache, kind: str = "everything", ema: float = 0.0, compile: bool = False, **settings) -> Trainer:
    section = {"type": kind, "weight": 0.5, **({"encoder": ENCODER} if kind == "everything" else {})}
    run = make_run(**{"regularizer": section, "train.ema": ema, "train.lr": 1e-2, **settings})
    trainer = Trainer(run, make_options(compile=compile), cache)
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():  # a fresh denoiser predicts 0, and its blocks pass on what they are given
        for name, parameter in trainer.model.denoiser.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.05)
                trainer.state.ema.average[f"{PREFIX}{name}"].copy_(parameter)
    return trainer


def tokens_of(denoiser: nn.Module, batch: Batch, trainer: Trainer, block: int) -> torch.Tensor:
    """What comes out of a block of a copy of the denoiser for a batch's noisy images."""
    captured: list[torch.Tensor] = []
    handle = denoiser.blocks[block].register_forward_hook(
        lambda module, inputs, output: captured.append(output.detach())
    )
    x_t, _ = trainer.model.process.corrupt(batch.x, batch.noise, batch.t)
    with torch.no_grad():
        denoiser(x_t, batch.t, **batch.condition)
    handle.remove()
    return captured[0]


def bare(denoiser: nn.Module) -> nn.Module:
    """A copy of a denoiser as it is now, without the hooks that were set on it."""
    copied = copy.deepcopy(denoiser)
    for block in copied.blocks:
        block._forward_hooks.clear()
    return copied


def test_prediction_and_latents_are_those_of_the_batch(cache):
    trainer = trainer_of(cache)
    for batch in list(trainer.batches())[:2]:
        before = bare(trainer.model.denoiser)
        outcome = trainer.step(batch)
        signals = Everything.seen[-1]
        assert torch.equal(signals.latents, batch.x)
        assert torch.equal(signals.prediction.target, batch.noise - batch.x)
        noisy = (1 - batch.t.view(-1, 1, 1, 1)) * batch.x + batch.t.view(-1, 1, 1, 1) * batch.noise
        assert torch.equal(signals.prediction.output, before(noisy, batch.t, **batch.condition))
        by_hand = (signals.prediction.output - signals.prediction.target).square().mean()
        assert outcome.values["loss/denoise"].item() == pytest.approx(by_hand.item(), rel=MEAN)
        assert by_hand.item() != 0


def test_taps_and_encoders_come_in_the_order_in_which_they_were_asked_for(cache):
    trainer = trainer_of(cache)
    batch = next(trainer.batches())
    before = bare(trainer.model.denoiser)
    trainer.step(batch)
    (signals,) = Everything.seen
    for tapped, block in zip(signals.taps, TAPPED, strict=True):
        assert (tapped.grid, tapped.values.shape) == ((4, 4), (6, 16, 64))
        assert torch.equal(tapped.values, tokens_of(before, batch, trainer, block))
        assert tapped.values.requires_grad
    (teacher,) = signals.encoders
    fresh = load_encoder("efficientnet_lite0", image_size=32, resolution=8)
    images = ((batch.x + 1) * 127.5).round().to(torch.uint8)
    expected = fresh(images).values
    torch.testing.assert_close(teacher.values, expected, rtol=2.0**-11, atol=rounding(expected, LITE0))  # in float16
    shapes = trainer.aligner.terms[0].regularizer.shapes
    assert (shapes.taps, shapes.encoders, shapes.ema_taps) == ((64, 64), (112,), (64, 64))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_taps_of_a_denoiser_that_is_compiled_in_place_capture_the_same(cache, backend, monkeypatch):
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    plain, compiled = (trainer_of(cache, ema=0.5, compile=compile, **PLAIN_DESCENT) for compile in (False, True))
    assert list(compiled.state.denoiser.state_dict()) == list(plain.state.denoiser.state_dict())
    assert compiled.state.denoiser._compiled_call_impl is not None
    for batch in list(plain.batches())[:3]:
        expected, found = plain.step(batch).row(), compiled.step(batch).row()
        assert found == pytest.approx(expected, rel=PASS, abs=PASS)
        theirs, ours = Everything.seen[-2:]
        for one, other in zip((*ours.taps, *ours.ema_taps), (*theirs.taps, *theirs.ema_taps), strict=True):
            error = rounding(other.values.detach(), SIT)
            torch.testing.assert_close(one.values, other.values, rtol=0, atol=error)
            assert one.values.requires_grad == other.values.requires_grad


def test_at_decay_0_the_averaged_models_tokens_are_the_students(cache):
    """A step ends with the average of its weights, so the next step's student and the averaged model agree to the bit."""
    trainer = trainer_of(cache, ema=0.0, **{"train.steps": 3})
    for batch in list(trainer.batches()):
        before = bare(trainer.model.denoiser)
        trainer.step(batch)
        signals = Everything.seen[-1]
        for averaged, block in zip(signals.ema_taps, AVERAGED, strict=True):
            assert torch.equal(averaged.values, tokens_of(before, batch, trainer, block))
        assert torch.equal(signals.ema_taps[0].values, signals.taps[1].values)  # block 0 of both
        assert not any(averaged.values.requires_grad for averaged in signals.ema_taps)
        assert signals.ema_taps[0].grid == (4, 4)


def test_the_averaged_model_is_the_average(cache):
    trainer = trainer_of(cache, ema=0.75, **{"train.steps": 3})
    average = {name: value.clone() for name, value in trainer.model.denoiser.state_dict().items()}
    for batch in list(trainer.batches()):
        student = bare(trainer.model.denoiser)
        model = bare(student)
        model.load_state_dict(average)
        trainer.step(batch)
        signals = Everything.seen[-1]
        for averaged, block in zip(signals.ema_taps, AVERAGED, strict=True):
            expected = tokens_of(model, batch, trainer, block)
            torch.testing.assert_close(averaged.values, expected, rtol=0, atol=rounding(expected, SIT))
        after = trainer.model.denoiser.state_dict()
        average = {
            name: 0.75 * average[name] + 0.25 * after[name] if value.is_floating_point() else value
            for name, value in after.items()
        }
    assert (signals.ema_taps[0].values - signals.taps[1].values).abs().max() > 1e-3


def test_asking_for_more_changes_nothing_that_is_trained_without_it(cache):
    """The averaged model's pass takes no gradient, draws nothing, and leaves the taps of the student alone."""

    def trained(**settings) -> dict[str, torch.Tensor]:
        trainer = trainer_of(cache, ema=0.5, **settings)
        for batch in list(trainer.batches())[:3]:
            trainer.step(batch)
        return trainer.model.denoiser.state_dict()

    much, little = trained(), trained(**{"regularizer.ema_taps": ()})
    assert all(torch.equal(much[name], value) for name, value in little.items())


def test_what_is_not_asked_for_is_not_there(cache, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("no encoder was asked for")

    monkeypatch.setattr("repa_lab.training.aligner.open_targets", never)
    trainer = trainer_of(cache, "prediction_alone")
    assert trainer.aligner.taps == {}
    trainer.step(next(trainer.batches()))
    (signals,) = Everything.seen
    assert (signals.taps, signals.encoders, signals.ema_taps, signals.latents) == ((), (), (), None)
    assert signals.prediction.output.requires_grad


def test_the_step_is_the_denoising_loss_plus_the_weighted_loss(cache):
    trainer = trainer_of(cache, "prediction_alone", **{"regularizer.schedule": {"warmup_steps": 2}})
    for step, batch in enumerate(list(trainer.batches())[:3]):
        before = bare(trainer.model.denoiser)
        outcome = trainer.step(batch)
        weight = 0.5 * min(step / 2, 1)
        assert outcome.numbers["align/weight"] == weight
        target = batch.noise - batch.x
        x_t, _ = trainer.model.process.corrupt(batch.x, batch.noise, batch.t)
        output = before(x_t, batch.t, **batch.condition).double()
        denoise, apart = (output - target).square().mean(), (output - target.roll(1, dims=0)).square().mean()
        total = denoise - weight * apart
        error = MEAN * (denoise + weight * apart).item()
        assert outcome.values["loss/total"].item() == pytest.approx(total.item(), abs=error)
        assert outcome.values.get("loss/aligned", torch.zeros(())).item() == pytest.approx(
            -(weight * apart).item(), rel=MEAN
        )
    assert len(Everything.seen) == 2  # the first step's weight is 0


def test_micro_batches_have_their_own_part_of_everything(cache):
    trainer = trainer_of(cache)
    trainer._micro_batch = 4
    batch = next(trainer.batches())
    trainer.step(batch)
    first, second = Everything.seen
    for signals, rows in ((first, slice(0, 4)), (second, slice(4, 6))):
        assert torch.equal(signals.latents, batch.x[rows])
        assert torch.equal(signals.prediction.target, (batch.noise - batch.x)[rows])
        assert {len(one.values) for one in (*signals.taps, *signals.ema_taps, *signals.encoders)} == {
            rows.stop - rows.start
        }


@pytest.mark.parametrize("weight, schedule", [(0.0, {}), (0.5, {"cutoff_step": 1})])
def test_at_weight_0_nothing_is_computed_and_nothing_is_kept(cache, weight, schedule):
    trainer = trainer_of(cache, **{"regularizer.weight": weight, "regularizer.schedule": schedule})
    batches = list(trainer.batches())[:3]
    passes = []
    trainer.model.denoiser.register_forward_hook(lambda module, inputs, output: passes.append(module.training))
    for batch in batches:
        trainer.step(batch)
    active = 1 if weight else 0
    assert len(Everything.seen) == active
    assert len(passes) == 3 + active  # the averaged model runs where it is asked for
    for tap in trainer.aligner.taps.values():
        with pytest.raises(TapError):
            tap.take()


def test_no_tap_keeps_activations_beyond_its_step(cache):
    trainer = trainer_of(cache)
    trainer.step(next(trainer.batches()))
    for tap in trainer.aligner.taps.values():
        with pytest.raises(TapError):
            tap.take()
