from __future__ import annotations

import multiprocessing
import pickle

import numpy as np
import pytest
import torch
from scipy import stats
from torch.utils.data import DataLoader

from repa_lab.training.objective import Batch, Steps, denoising_loss, interpolate, sample_times
from repa_lab.training.streams import Order, generator
from tests.training.conftest import OFF, UNET, make_run


def make_steps(images, seed: int = 0, **settings) -> Steps:
    run = make_run(seed, **settings)
    return Steps(run.config, run.seed, images)


def equal(first, second) -> bool:
    assert not first.loaded
    assert not second.loaded
    return all(torch.equal(a, b) for a, b in zip(first[:5], second[:5], strict=True))


class TestPath:
    def test_by_hand(self):
        x, noise = torch.full((1, 1, 1, 1), 2.0), torch.full((1, 1, 1, 1), -1.0)
        x_t, velocity = interpolate(x, noise, torch.tensor([0.25]))
        assert (x_t.item(), velocity.item()) == (1.25, -3.0)

    def test_t_0_is_data_and_t_1_is_noise(self):
        x, noise = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
        x_t, velocity = interpolate(x, noise, torch.tensor([0.0, 1.0]))
        assert torch.equal(x_t[0], x[0])
        assert torch.equal(x_t[1], noise[1])
        assert torch.equal(velocity, noise - x)

    def test_every_image_has_its_own_time(self):
        x, noise, t = torch.randn(5, 3, 2, 4), torch.randn(5, 3, 2, 4), torch.rand(5)
        x_t, velocity = interpolate(x, noise, t)
        for i in range(5):
            expected = (1 - t[i].double()) * x[i].double() + t[i].double() * noise[i].double()
            torch.testing.assert_close(x_t[i].double(), expected, rtol=0, atol=1e-6)
        # The velocity is the derivative of the path.
        ahead, _ = interpolate(x.double(), noise.double(), t.double() + 0.5)
        behind, _ = interpolate(x.double(), noise.double(), t.double() - 0.5)
        torch.testing.assert_close(velocity.double(), ahead - behind, rtol=0, atol=1e-6)


class TestLoss:
    def test_is_the_mean_square(self):
        assert denoising_loss(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 0.0, 0.0])).item() == pytest.approx(13 / 3)

    def test_is_the_mean_over_images_of_their_means(self):
        velocity, target = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8)
        squares = (velocity.double().numpy() - target.double().numpy()) ** 2
        expected = np.mean([image.mean() for image in squares])
        assert denoising_loss(velocity, target).item() == pytest.approx(expected, rel=1e-6)

    def test_is_float32_whatever_comes_in(self):
        velocity, target = torch.randn(64, 64).bfloat16(), torch.randn(64, 64)
        loss = denoising_loss(velocity, target)
        assert loss.dtype == torch.float32
        expected = np.mean((velocity.double().numpy() - target.double().numpy()) ** 2)
        assert loss.item() == pytest.approx(expected, rel=1e-6)


class TestTimes:
    def test_uniform(self):
        t = sample_times("uniform", 20_000, generator(0, "t"))
        assert stats.kstest(t.numpy(), "uniform").pvalue > 1e-3

    def test_lognormal_has_a_standard_normal_logit(self):
        t = sample_times("lognormal", 20_000, generator(0, "t")).double()
        assert stats.kstest(torch.logit(t).numpy(), "norm").pvalue > 1e-3
        assert t.median().item() == pytest.approx(0.5, abs=4 * 1.2533 / 4 / 20_000**0.5)  # median's error, times dt/dz
        # sigma = exp(z) on the linear path is t = sigma / (1 + sigma).
        z = torch.randn(20_000, generator=generator(0, "t")).double()
        torch.testing.assert_close(t, z.exp() / (1 + z.exp()), rtol=0, atol=1e-6)


class TestSteps:
    def test_a_batch_is_a_function_of_its_step(self, images):
        steps = make_steps(images)
        forward = [steps[i] for i in range(4)]
        again = make_steps(images)
        for i in (3, 1, 0, 2, 1):
            assert equal(again[i], forward[i])
        for name in ("ids", "x", "noise", "t"):
            assert not torch.equal(getattr(forward[0], name), getattr(forward[1], name))

    def test_a_batch_holds_what_its_ids_say(self, images):
        batch = make_steps(images, **{"train.label_dropout": 0.0})[2]
        assert torch.equal(batch.ids, Order(images.split.train, 0).take(2 * 6, 6))
        assert torch.equal(batch.x, images.source.read(batch.ids).float() / 127.5 - 1)
        assert torch.equal(batch.y, images.source.labels[batch.ids])
        assert (batch.noise.shape, batch.t.shape) == ((6, 1, 8, 8), (6,))

    def test_an_epoch_sees_every_training_image_once_and_no_other(self, images):
        steps = make_steps(images, **{"train.batch_size": 100})
        seen = torch.cat([steps[i].ids for i in range(17)])
        assert seen.sort().values.tolist() == images.split.train.tolist()

    def test_a_batch_may_be_larger_than_the_data(self, images):
        ids = make_steps(images, **{"train.batch_size": 4000})[0].ids
        assert len(ids) == 4000
        assert ids.unique(return_counts=True)[1].unique().tolist() == [2, 3]

    @pytest.mark.parametrize(
        "other",
        [OFF, {"regularizer.weight": 0.1}, {"train.lr": 1.0}, {"train.steps": 900}, UNET, {"evaluate.every": 3}],
        ids=["off", "weight", "lr", "steps", "family", "evaluate"],
    )
    def test_arms_with_one_seed_are_paired(self, images, other):
        assert equal(make_steps(images)[7], make_steps(images, **other)[7])

    def test_seeds_are_not(self, images):
        first, second = make_steps(images, 0)[0], make_steps(images, 1)[0]
        assert not any(torch.equal(a, b) for a, b in zip(first[:4], second[:4], strict=True))

    def test_a_tenth_of_the_labels_is_dropped(self, images):
        count = 100_000
        batch = make_steps(images, **{"train.batch_size": count})[0]
        dropped = batch.y == images.source.num_classes
        bound = 3.3 * (0.1 * 0.9 / count) ** 0.5
        assert dropped.float().mean().item() == pytest.approx(0.1, abs=bound)
        assert torch.equal(batch.y[~dropped], images.source.labels[batch.ids[~dropped]])
        # Dropping is independent of the class and of the time.
        assert stats.ks_2samp(batch.t[dropped], batch.t[~dropped]).pvalue > 1e-3
        by_class = [dropped[images.source.labels[batch.ids] == label].float().mean().item() for label in range(10)]
        assert max(by_class) - min(by_class) < 0.02

    @pytest.mark.parametrize("rate, dropped", [(0.0, 0), (1.0, 6)])
    def test_none_or_all_may_be_dropped(self, images, rate, dropped):
        assert (make_steps(images, **{"train.label_dropout": rate})[0].y == 10).sum() == dropped

    def test_noise_is_standard_normal_and_its_own_for_every_image(self, images):
        noise = make_steps(images, **{"train.batch_size": 300})[0].noise
        assert stats.kstest(noise.flatten().numpy(), "norm").pvalue > 1e-3
        assert torch.corrcoef(noise.flatten(1)).sub(torch.eye(300)).abs().max() < 6 / 64**0.5

    def test_loader_processes_change_nothing(self, images):
        steps = make_steps(images)
        context = multiprocessing.get_context("fork")
        loader = DataLoader(steps, batch_size=None, sampler=range(1, 4), num_workers=2, multiprocessing_context=context)
        loaded = list(loader)
        assert len(loaded) == 3
        for i, batch in enumerate(loaded, start=1):
            assert equal(batch, steps[i])
            assert batch._fields == Batch._fields

    def test_goes_to_processes_that_are_not_forked(self, images):
        steps = make_steps(images)
        assert equal(pickle.loads(pickle.dumps(steps))[2], steps[2])
