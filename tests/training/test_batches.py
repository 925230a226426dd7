from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from scipy import stats
from torch.utils.data import DataLoader

from repa_lab.data.crop import Buckets
from repa_lab.data.sources import Flips, ImageFolder, split
from repa_lab.data.space import PixelSpace
from repa_lab.training.batches import Batch, Order, generator
from repa_lab.training.data import Images
from repa_lab.training.diffusion import LOGIT_NORMAL, UNIFORM, Flow, denoising_loss
from tests.data.conftest import noise_image
from tests.training.conftest import OFF, UNET, make_steps


def equal(first, second) -> bool:
    assert not first.loaded
    assert not second.loaded
    assert first.condition.keys() == second.condition.keys() == {"y"}
    assert len(first) == len(second) == 6
    pairs = [*zip(first[:4], second[:4], strict=True), (first.condition["y"], second.condition["y"])]
    return all(torch.equal(a, b) for a, b in pairs)


class TestPath:
    def test_by_hand(self):
        x, noise = torch.full((1, 1, 1, 1), 2.0), torch.full((1, 1, 1, 1), -1.0)
        x_t, velocity = Flow().corrupt(x, noise, torch.tensor([0.25]))
        assert (x_t.item(), velocity.item()) == (1.25, -3.0)

    def test_t_0_is_data_and_t_1_is_noise(self):
        x, noise = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
        x_t, velocity = Flow().corrupt(x, noise, torch.tensor([0.0, 1.0]))
        assert torch.equal(x_t[0], x[0])
        assert torch.equal(x_t[1], noise[1])
        assert torch.equal(velocity, noise - x)

    def test_every_image_has_its_own_time(self):
        x, noise, t = torch.randn(5, 3, 2, 4), torch.randn(5, 3, 2, 4), torch.rand(5)
        x_t, velocity = Flow().corrupt(x, noise, t)
        for i in range(5):
            expected = (1 - t[i].double()) * x[i].double() + t[i].double() * noise[i].double()
            torch.testing.assert_close(x_t[i].double(), expected, rtol=0, atol=1e-6)
        # The velocity is the derivative of the path.
        ahead, _ = Flow().corrupt(x.double(), noise.double(), t.double() + 0.5)
        behind, _ = Flow().corrupt(x.double(), noise.double(), t.double() - 0.5)
        torch.testing.assert_close(velocity.double(), ahead - behind, rtol=0, atol=1e-6)


class TestLoss:
    def test_is_the_mean_square(self):
        assert denoising_loss(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 0.0, 0.0])).item() == pytest.approx(
            13 / 3
        )

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
        t = Flow().times(UNIFORM, 20_000, generator(0, "t"))
        assert stats.kstest(t.numpy(), "uniform").pvalue > 1e-3

    def test_logit_normal_has_a_standard_normal_logit(self):
        t = Flow().times(LOGIT_NORMAL, 20_000, generator(0, "t")).double()
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
        assert torch.equal(batch.condition["y"], images.source.labels[batch.ids])
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
        dropped = batch.condition["y"] == images.source.num_classes
        bound = 3.3 * (0.1 * 0.9 / count) ** 0.5
        assert dropped.float().mean().item() == pytest.approx(0.1, abs=bound)
        assert torch.equal(batch.condition["y"][~dropped], images.source.labels[batch.ids[~dropped]])
        # Dropping is independent of the class and of the time.
        assert stats.ks_2samp(batch.t[dropped], batch.t[~dropped]).pvalue > 1e-3
        by_class = [dropped[images.source.labels[batch.ids] == label].float().mean().item() for label in range(10)]
        assert max(by_class) - min(by_class) < 0.02

    @pytest.mark.parametrize("rate, dropped", [(0.0, 0), (1.0, 6)])
    def test_none_or_all_may_be_dropped(self, images, rate, dropped):
        assert (make_steps(images, **{"train.label_dropout": rate})[0].condition["y"] == 10).sum() == dropped

    def test_noise_is_standard_normal_and_its_own_for_every_image(self, images):
        noise = make_steps(images, **{"train.batch_size": 300})[0].noise
        assert stats.kstest(noise.flatten().numpy(), "norm").pvalue > 1e-3
        assert torch.corrcoef(noise.flatten(1)).sub(torch.eye(300)).abs().max() < 6 / 64**0.5

    def test_loader_processes_change_nothing(self, images):
        steps = make_steps(images)
        # Spawned, so that the steps are pickled, and so that a worker inherits no threads of the tests before.
        loader = DataLoader(steps, batch_size=None, sampler=range(1, 4), num_workers=2, multiprocessing_context="spawn")
        loaded = list(loader)
        assert len(loaded) == 3
        for i, batch in enumerate(loaded, start=1):
            assert equal(batch, steps[i])
            assert batch._fields == Batch._fields


class TestSizes:
    """Images that keep their aspects: each batch is of one size, and all that is said above holds."""

    @pytest.fixture
    def mixed(self, tmp_path) -> Images:
        # Height x width: 16x16, 12x20, 16x16, 20x12 and 12x20 in turn.
        shapes = [(16, 16), (20, 12), (16, 16), (12, 20), (20, 12)]
        (tmp_path / "images").mkdir()
        for i in range(30):
            noise_image(i, shapes[i % 5]).save(tmp_path / "images" / f"{i:02}.png")
        source = ImageFolder(tmp_path / "images", 16, Buckets(16, 4, 2.0))
        return Images(source, split(30, 6), PixelSpace(source))

    def test_every_batch_is_of_one_size_and_holds_what_its_ids_say(self, mixed):
        steps, sizes = make_steps(mixed), set()
        for number in range(40):
            batch = steps[number]
            (size,) = mixed.source.sizes[batch.ids].unique(dim=0).tolist()
            sizes.add(tuple(size))
            assert torch.equal(batch.x, mixed.source.read(batch.ids.tolist()).float() / 127.5 - 1)
            assert batch.noise.shape == (6, 3, *size)
            assert torch.isin(batch.ids, mixed.split.train).all()
        assert sizes == {(16, 16), (12, 20), (20, 12)}

    def test_a_batch_is_a_function_of_its_step(self, mixed):
        forward = make_steps(mixed)
        expected = [forward[number] for number in range(12)]
        again = make_steps(mixed)
        for number in (11, 0, 5, 5, 3):
            assert equal(again[number], expected[number])
            assert equal(pickle.loads(pickle.dumps(again))[number], expected[number])

    @pytest.mark.parametrize("processes", [2, 3])
    def test_the_parts_of_a_batch_are_the_batch(self, mixed, processes):
        whole = make_steps(mixed)
        parts = [make_steps(mixed, part=(number, processes)) for number in range(processes)]
        for step in range(6):
            for field in range(4):
                assert torch.equal(torch.cat([part[step][field] for part in parts]), whole[step][field])

    def test_mirrored_images_are_of_the_size_too(self, mixed):
        source = Flips(mixed.source)
        flipped, plain = make_steps(Images(source, mixed.split, PixelSpace(source))), make_steps(mixed)
        for step in range(8):
            ours, theirs = flipped[step], plain[step]
            assert torch.equal(ours.ids % 30, theirs.ids)
            is_mirrored = (ours.ids >= 30).view(-1, 1, 1, 1)
            assert torch.equal(ours.x, torch.where(is_mirrored, theirs.x.flip(-1), theirs.x))

    def test_micro_batches_get_their_rows_of_everything(self, mixed):
        batch = make_steps(mixed)[2]
        frames = mixed.source.frames(batch.ids.tolist())
        batch = batch._replace(condition={**batch.condition, "sizes": frames}, loaded=(None, batch.x))
        parts = batch.split(4)
        assert [len(part.ids) for part in parts] == [4, 2]
        for name, value in batch.condition.items():
            assert torch.equal(torch.cat([part.condition[name] for part in parts]), value)
        assert [part.loaded[0] for part in parts] == [None, None]
        assert torch.equal(torch.cat([part.loaded[1] for part in parts]), batch.x)
        (whole,) = batch.split(None)
        assert torch.equal(whole.condition["sizes"], batch.condition["sizes"])
