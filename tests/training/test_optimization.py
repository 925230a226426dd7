"""The optimizer, the learning rate over steps, and the weight of a sample's loss."""

from __future__ import annotations

import inspect
import math

import numpy as np
import pytest
import torch

from repa_lab.spec import SpecError, load_spec
from repa_lab.spec.train import OPTIMIZERS, LearningRateSettings, OptimizerSettings, TimeSettings, TrainConfig
from repa_lab.training.diffusion import Diffusion, Flow, denoising_loss
from tests.rounding import MEAN
from tests.spec.examples import mapping


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_table_says_what_torch_takes(name):
    takes = inspect.signature(getattr(torch.optim, name)).parameters
    known = tuple(field for field in ("betas", "eps", "momentum") if field in takes and name != "Adafactor")
    assert OPTIMIZERS[name] == known
    assert {"lr", "weight_decay"} <= set(takes)


def test_a_field_that_the_class_does_not_take_is_refused():
    with pytest.raises(
        SpecError, match=r"train\.optimizer: SGD has no betas; of betas, eps and momentum it takes momentum"
    ):
        load_spec(mapping(train={"steps": 1, "optimizer": {"type": "SGD", "betas": [0.9, 0.95]}}))
    assert OptimizerSettings(type="AdamW", betas=(0.9, 0.95)).arguments == {"betas": (0.9, 0.95)}
    assert OptimizerSettings().arguments == {}


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ({}, {0: 2.0, 99: 2.0}),
        ({"warmup_steps": 3}, {0: 0.5, 1: 1.0, 2: 1.5, 3: 2.0, 99: 2.0}),
        ({"type": "linear"}, {0: 2.0, 50: 1.0, 75: 0.5}),
        ({"type": "cosine", "decay_steps": 50, "end": 0.1}, {0: 2.0, 25: 1.1, 50: 0.2, 99: 0.2}),
        ({"type": "cosine", "warmup_steps": 20}, {19: 40 / 21, 20: 2.0, 60: 1.0}),
    ],
)
def test_the_rate_by_hand(schedule, rates):
    train = TrainConfig(steps=100, lr=2.0, lr_schedule=LearningRateSettings(**schedule))
    assert {step: train.learning_rate(step) for step in rates} == pytest.approx(rates, abs=1e-12)


def test_only_a_decay_to_the_end_depends_on_the_length():
    assert LearningRateSettings(type="linear").depends_on_length()
    assert not LearningRateSettings(type="linear", decay_steps=5).depends_on_length()
    assert not LearningRateSettings(warmup_steps=5).depends_on_length()


@pytest.mark.parametrize(
    ("time", "kept"),
    [
        (None, None),
        ("logit_normal", "logit_normal"),
        ({"type": "logit_normal", "mean": 0.0, "std": 1.0}, "logit_normal"),
        ({"type": "uniform"}, "uniform"),
        ({"mean": -0.5}, TimeSettings(mean=-0.5)),
    ],
)
def test_the_distribution_of_times_is_a_word_or_a_section(time, kept):
    train = load_spec(mapping(train={"steps": 1, "time": time})).arms[0].config.train
    assert train.time == kept
    assert train.times == (TimeSettings(type=kept) if isinstance(kept, str) else kept)


@pytest.mark.parametrize(
    ("time", "message"),
    [
        (
            {"type": "uniform", "std": 2.0},
            r"train\.time: uniform has no mean and no std; they are settings of logit_normal",
        ),
        ({"std": 0}, r"train\.time\.std: expected a number of more than 0"),
        ({"type": "lognormal"}, r"train\.time\.type: expected one of uniform, logit_normal, got 'lognormal'"),
        ("lognormal", "expected one of uniform, logit_normal or a mapping, got 'lognormal'"),
    ],
)
def test_other_distributions_are_refused(time, message):
    with pytest.raises(SpecError, match=message):
        load_spec(mapping(train={"steps": 1, "time": time}))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_min_snr_is_the_clean_images_error_times_the_smaller_of_snr_and_gamma(prediction):
    """For any prediction, the weighted error of what is predicted equals the weighted error of the image it implies."""
    alphas = torch.linspace(0.99, 0.05, 10, dtype=torch.float64)
    process, gamma = Diffusion(alphas, prediction), 5.0
    for step, a in enumerate(alphas.tolist()):
        t, s, n = torch.tensor([step / 1000]), math.sqrt(a), math.sqrt(1 - a)
        x, noise, error = 0.3, -0.7, 0.01  # scalars: the image, the noise, and the error of the prediction
        x_t = s * x + n * noise
        implied = {
            "epsilon": (x_t - n * (noise + error)) / s,
            "v_prediction": s * x_t - n * (s * noise - n * x + error),
            "sample": x + error,
        }[prediction]
        expected = min(a / (1 - a), gamma) * (implied - x) ** 2
        assert process.min_snr(t, gamma).item() * error**2 == pytest.approx(expected, rel=1e-5)


def test_min_snr_of_a_flow():
    for time in (0.05, 0.3, 0.5, 0.9):
        error = 0.01  # of the velocity; the image that x_t and v imply is x_t - t v
        snr = ((1 - time) / time) ** 2
        expected = min(snr, 5.0) * (time * error) ** 2
        assert Flow().min_snr(torch.tensor([time]), 5.0).item() * error**2 == pytest.approx(expected, rel=1e-5)


def test_noise_alone_has_a_finite_weight():
    process = Diffusion(torch.tensor([0.5, 0.0], dtype=torch.float64), "epsilon")
    assert process.min_snr(torch.tensor([0.001]), 5.0).item() == 1.0


def test_the_weighted_loss_is_the_mean_of_weighted_squares():
    prediction, target = torch.randn(3, 1, 2, 2), torch.randn(3, 1, 2, 2)
    weight = torch.tensor([0.0, 1.0, 3.0]).view(3, 1, 1, 1)
    squares = (prediction.double() - target).numpy() ** 2
    expected = np.mean(squares * np.array([0.0, 1.0, 3.0]).reshape(3, 1, 1, 1))
    assert denoising_loss(prediction, target, weight).item() == pytest.approx(expected, rel=MEAN)
    assert denoising_loss(prediction, target).item() == pytest.approx(np.mean(squares), rel=MEAN)
