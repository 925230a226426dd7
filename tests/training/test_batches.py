"""The batch of every step, and the random streams that it is drawn from."""

from __future__ import annotations

import hashlib
import itertools
import os
import pickle
import re
import signal
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats

from repa_lab.data import DataError
from repa_lab.data.crop import Buckets
from repa_lab.data.latents import PixelSpace
from repa_lab.data.sources import Digits, Flips, split
from repa_lab.training.batches import Batch, BatchOrder, Images, Order, generator, seeded, stream_seed
from repa_lab.training.diffusion import LOGIT_NORMAL, UNIFORM, Flow, denoising_loss
from tests.data.conftest import image_folder, noise_image
from tests.rounding import MEAN, UNIT, rounding
from tests.training.conftest import OFF, UNET, make_steps


def equal(first, second) -> bool:
    assert not first.loaded
    assert not second.loaded
    assert first.condition.keys() == second.condition.keys() == {"y"}
    assert first.draws == second.draws == {}  # no regularizer asks for more
    assert len(first) == len(second) == 7
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
            torch.testing.assert_close(x_t[i].double(), expected, rtol=0, atol=rounding(noise, (2, 2)))
        # The velocity is the derivative of the path.
        ahead, _ = Flow().corrupt(x.double(), noise.double(), t.double() + 0.5)
        behind, _ = Flow().corrupt(x.double(), noise.double(), t.double() - 0.5)
        torch.testing.assert_close(velocity.double(), ahead - behind, rtol=0, atol=rounding(velocity, (1, 1)))


class TestLoss:
    def test_is_the_mean_square(self):
        assert denoising_loss(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 0.0, 0.0])).item() == pytest.approx(
            13 / 3
        )

    def test_is_the_mean_over_images_of_their_means(self):
        velocity, target = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8)
        squares = (velocity.double().numpy() - target.double().numpy()) ** 2
        expected = np.mean([image.mean() for image in squares])
        assert denoising_loss(velocity, target).item() == pytest.approx(expected, rel=MEAN)

    def test_is_float32_whatever_comes_in(self):
        velocity, target = torch.randn(64, 64).bfloat16(), torch.randn(64, 64)
        loss = denoising_loss(velocity, target)
        assert loss.dtype == torch.float32
        expected = np.mean((velocity.double().numpy() - target.double().numpy()) ** 2)
        assert loss.item() == pytest.approx(expected, rel=MEAN)


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
        torch.testing.assert_close(t, z.exp() / (1 + z.exp()), rtol=0, atol=4 * UNIT)


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
        loaded = list(steps.steps.load(range(1, 4), torch.device("cpu"), 2))
        assert len(loaded) == 3
        for i, batch in enumerate(loaded, start=1):
            assert equal(batch, steps[i])
            assert batch._fields == Batch._fields


def end_the_process() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def refuse() -> None:
    raise DataError("path", "cannot read the image 'a.png': it is gone")


class Failing(Digits):
    """Digits whose third batch cannot be read."""

    def __init__(self, fail: Callable[[], None]) -> None:
        super().__init__()
        self.fail, self.reads = fail, 0

    def read(self, index) -> torch.Tensor:
        self.reads += 1
        if self.reads == 3:
            self.fail()
        return super().read(index)


class TestFailures:
    def load(self, fail: Callable[[], None], workers: int) -> DataError:
        source = Failing(fail)
        steps = make_steps(Images(source, split(len(source), 97), PixelSpace(source))).steps
        with pytest.raises(DataError) as caught:
            list(steps.load(range(9), torch.device("cpu"), workers))
        return caught.value

    @pytest.mark.parametrize("workers", [0, 1])
    def test_what_is_wrong_with_the_data_is_the_same_line_in_any_process(self, workers):
        error = self.load(refuse, workers)
        assert (error.field, str(error)) == ("path", "cannot read the image 'a.png': it is gone")

    def test_a_process_of_the_loader_that_dies_is_one_line(self):
        error = self.load(end_the_process, 1)
        assert error.field == "data_workers"
        assert re.fullmatch(
            r"a process that loads data has ended \(.+\): if memory or shared memory \(/dev/shm\) is "
            r"short, lower run.data_workers; start again, and the run goes on",
            str(error),
        )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
class TestGPU:
    """Times and noise are drawn on the GPU, from the same streams."""

    GPU = torch.device("cuda", 0)

    def load(self, images, part=(0, 1), workers=0) -> list[Batch]:
        return list(make_steps(images, part=part).steps.load(range(2, 5), self.GPU, workers))

    def test_what_is_read_is_what_a_cpu_reads_and_all_else_is_on_the_gpu(self, images):
        on_cpu = make_steps(images)
        for step, batch in enumerate(self.load(images), start=2):
            expected = on_cpu[step]
            assert torch.equal(batch.ids, expected.ids)
            torch.testing.assert_close(batch.x.cpu(), expected.x, rtol=0, atol=1e-6)  # a GPU divides otherwise
            assert torch.equal(batch.condition["y"].cpu(), expected.condition["y"])
            assert {values.device for values in (batch.x, batch.noise, batch.t, batch.condition["y"])} == {self.GPU}

    @pytest.mark.parametrize("workers", [0, 2])
    def test_neither_processes_nor_workers_change_a_draw(self, images, workers):
        whole = self.load(images)
        parts = [self.load(images, (number, 3), workers) for number in range(3)]
        for step, batch in enumerate(whole):
            for field in range(4):
                assert torch.equal(torch.cat([part[step][field] for part in parts]), batch[field])


class TestSizes:
    """Images that keep their aspects: each batch is of one size, and all that is said above holds."""

    @pytest.fixture
    def mixed(self, tmp_path) -> Images:
        # Height x width: 16x16, 12x20, 16x16, 20x12 and 12x20 in turn.
        shapes = [(16, 16), (20, 12), (16, 16), (12, 20), (20, 12)]
        (tmp_path / "images").mkdir()
        for i in range(30):
            noise_image(i, shapes[i % 5]).save(tmp_path / "images" / f"{i:02}.png")
        source = image_folder(tmp_path / "images", 16, Buckets(16, 4, 2.0))
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


class TestStreamSeed:
    def test_is_the_head_of_a_hash_of_the_name(self):
        # Pinned: if it changes, every run that was ever interrupted goes on with other numbers.
        digest = int(hashlib.sha256(b"3/noise/64/2").hexdigest()[:16], 16)
        assert stream_seed(3, "noise", 64, 2) == digest // 2
        assert stream_seed(0, "init") == int(hashlib.sha256(b"0/init/").hexdigest()[:16], 16) // 2

    def test_names_and_counters_do_not_run_together(self):
        keys = [(1, "a", 1, 2), (1, "a", 12), (11, "a", 2), (1, "a"), (1, "a", 1), (1, "a/1"), (1, "b", 1), (2, "a", 1)]
        keys += [(seed, "sampling", i) for seed in range(30) for i in range(30)]
        assert len({stream_seed(*key) for key in keys}) == len(keys)

    def test_is_what_torch_takes_as_a_seed(self):
        assert all(0 <= stream_seed(seed, "x") < 2**63 for seed in range(1000))


def test_a_generator_is_a_function_of_its_name():
    draws = [torch.randn(5, generator=generator(1, "noise", 7)) for _ in range(2)]
    assert torch.equal(*draws)
    for other in (generator(2, "noise", 7), generator(1, "data", 7), generator(1, "noise", 8)):
        assert not torch.equal(draws[0], torch.randn(5, generator=other))


def test_neighbouring_seeds_are_independent():
    draws = torch.stack([torch.randn(20_000, generator=generator(seed, "noise", 0)) for seed in range(8)])
    correlation = torch.corrcoef(draws) - torch.eye(8)
    assert correlation.abs().max() < 4.5 / 20_000**0.5


def test_seeded_leaves_torchs_own_generator_alone():
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    with seeded(0, "init"):
        first = torch.randn(3)
    assert torch.equal(torch.randn(3), expected)
    with seeded(0, "init"):
        assert torch.equal(torch.randn(3), first)
    with seeded(1, "init"):
        assert not torch.equal(torch.randn(3), first)


def test_seeded_gives_the_generator_back_after_an_error():
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    with pytest.raises(ZeroDivisionError), seeded(0, "init"):
        torch.randn(3)
        raise ZeroDivisionError
    assert torch.equal(torch.randn(3), expected)


class TestOrder:
    index = torch.tensor([2, 3, 5, 7, 11, 13, 17])

    def test_every_epoch_shows_every_image_once(self):
        seen = Order(self.index, 0).take(0, 70).view(10, 7)
        for epoch in seen:
            assert epoch.sort().values.tolist() == self.index.tolist()
        assert len({tuple(epoch.tolist()) for epoch in seen}) > 8

    def test_any_cut_gives_the_same_order(self):
        whole = Order(self.index, 3).take(0, 60)
        for sizes in ((1,) * 60, (7,) * 8 + (4,), (10, 3, 30, 17), (60,)):
            order, starts = Order(self.index, 3), [0, *itertools.accumulate(sizes)][:-1]
            assert torch.equal(torch.cat([order.take(s, n) for s, n in zip(starts, sizes, strict=True)]), whole)

    def test_may_be_asked_in_any_order(self):
        whole, order = Order(self.index, 3).take(0, 60), Order(self.index, 3)
        for start in (40, 0, 13, 59, 13):
            assert order.take(start, 1).item() == whole[start]

    def test_seeds_have_orders_of_their_own(self):
        index = torch.arange(1000)
        first, second = Order(index, 0).take(0, 1000), Order(index, 1).take(0, 1000)
        # Two independent permutations agree in one place on average, in a Poisson-distributed number of them.
        assert (first == second).sum() < 8
        assert torch.corrcoef(torch.stack([first, second]).float())[0, 1].abs() < 4.5 / 1000**0.5

    def test_is_a_function_of_the_seed(self):
        assert torch.equal(Order(self.index, 4).take(5, 20), Order(self.index, 4).take(5, 20))

    def test_goes_to_other_processes(self):
        # Loader workers get it pickled wherever processes are not forked: macOS, and Linux from Python 3.14 on.
        order = Order(self.index, 3)
        order.take(0, 3)
        assert torch.equal(pickle.loads(pickle.dumps(order)).take(3, 9), order.take(3, 9))


class TestBatchOrder:
    MEMBERS = (torch.arange(100, 130), torch.arange(7), torch.tensor([40, 50, 60]), torch.arange(200, 260))
    STEPS, SIZE = 3000, 4

    @pytest.fixture(scope="class")
    def taken(self) -> torch.Tensor:
        order = BatchOrder(self.MEMBERS, 5)
        return torch.stack([order.take(step, self.SIZE) for step in range(self.STEPS)])

    def kinds(self, batches: torch.Tensor) -> torch.Tensor:
        """Which size the first image of each batch has."""
        return torch.tensor([next(n for n, one in enumerate(self.MEMBERS) if batch[0] in one) for batch in batches])

    @pytest.mark.parametrize("size", [1, 4, 7, 20])
    def test_of_one_size_it_is_the_order_itself(self, size):
        """Bit for bit, for every run that was ever started follows it."""
        index = torch.tensor([2, 3, 5, 7, 11, 13, 17])
        batches = BatchOrder([index], 3)
        for step in (0, 1, 5, 2, 2000, 3):
            assert torch.equal(batches.take(step, size), Order(index, 3).take(step * size, size))

    def test_every_batch_is_of_one_size(self, taken):
        for batch, kind in zip(taken, self.kinds(taken), strict=True):
            assert torch.isin(batch, self.MEMBERS[kind]).all()

    def test_sizes_are_drawn_with_the_odds_of_their_images(self, taken):
        counts = torch.bincount(self.kinds(taken), minlength=4).double()
        share = torch.tensor([0.3, 0.07, 0.03, 0.6], dtype=torch.float64)
        error = (self.STEPS * share * (1 - share)).sqrt()
        assert ((counts - self.STEPS * share).abs() < 4 * error).all()
        assert stats.chisquare(counts.numpy(), (self.STEPS * share).numpy()).pvalue > 1e-3

    def test_sizes_do_not_depend_on_those_before(self, taken):
        kinds = self.kinds(taken).numpy()
        table = np.zeros((4, 4))
        np.add.at(table, (kinds[:-1], kinds[1:]), 1)
        assert stats.chi2_contingency(table).pvalue > 1e-3

    def test_every_image_of_a_size_is_seen_equally_often(self, taken):
        kinds = self.kinds(taken)
        for kind, index in enumerate(self.MEMBERS):
            seen = taken[kinds == kind].flatten()
            counts = torch.stack([(seen == image).sum() for image in index])
            assert counts.max() - counts.min() <= 1
            # They follow an order of their own: each epoch of the size shows all of them before any comes again.
            for epoch in seen[: len(seen) // len(index) * len(index)].view(-1, len(index)):
                assert epoch.sort().values.tolist() == index.tolist()

    def test_and_every_image_of_all_in_the_long_run(self, taken):
        counts = torch.bincount(taken.flatten(), minlength=260)[torch.cat(self.MEMBERS)].double()
        expected = self.STEPS * self.SIZE / 100
        # Within a size they are seen alike, so what is left is how often the size was drawn: for the smallest 3% of steps.
        assert counts.sum() == self.STEPS * self.SIZE
        assert (counts / expected - 1).abs().max() < 4 * (0.97 / 0.03 / self.STEPS) ** 0.5

    def test_a_step_is_a_function_of_the_seed_and_its_number(self, taken):
        for asked in ([2999, 0, 1024, 1023, 1025, 2048], [5], [1500, 1500], list(range(2040, 2060))):
            order = BatchOrder(self.MEMBERS, 5)
            for step in asked:
                assert torch.equal(order.take(step, self.SIZE), taken[step])

    def test_its_memory_does_not_grow_with_the_steps(self):
        order = BatchOrder(self.MEMBERS, 5)
        kept = []
        for step in (*range(5000, 5200), 200_000):  # all sizes have come by then
            taken = order.take(step, self.SIZE)
            kept.append(len(pickle.dumps(order)))
        assert kept[-1] - kept[-2] < 100  # counters have more digits
        # The definition: all draws up to the step, and the images of its size after those of the earlier steps.
        blocks = [
            torch.multinomial(order._shares, 1024, replacement=True, generator=generator(5, "sizes", block))
            for block in range(200_000 // 1024 + 1)
        ]
        sizes = torch.cat(blocks)[:200_001]
        size = int(sizes[-1])
        before = int((sizes[:-1] == size).sum())
        expected = Order(self.MEMBERS[size], 5, f"data/{size}").take(before * self.SIZE, self.SIZE)
        assert torch.equal(taken, expected)

    def test_seeds_have_orders_of_their_own(self, taken):
        order = BatchOrder(self.MEMBERS, 6)
        other = torch.stack([order.take(step, self.SIZE) for step in range(300)])
        share = torch.tensor([0.3, 0.07, 0.03, 0.6])
        alike = (self.kinds(other) == self.kinds(taken[:300])).double().mean().item()
        assert alike == pytest.approx(share.square().sum().item(), abs=4 * 0.5 / 300**0.5)

    def test_sizes_have_orders_of_their_own(self):
        """Two sizes with as many images are not shown in the same order."""
        order = BatchOrder([torch.arange(50), torch.arange(50, 100)], 0)
        batches = torch.stack([order.take(step, 50) for step in range(40)])
        first, second = (next(batch for batch in batches if (batch[0] >= 50) == upper) for upper in (False, True))
        assert ((second - 50) == first).sum() < 8

    def test_a_batch_may_be_larger_than_a_size(self):
        batch = BatchOrder([torch.tensor([3, 9]), torch.tensor([5])], 0).take(0, 11)
        assert len(batch) == 11
        assert batch.unique(return_counts=True)[1].max() - batch.unique(return_counts=True)[1].min() <= 1

    def test_goes_to_other_processes(self, taken):
        order = BatchOrder(self.MEMBERS, 5)
        order.take(1100, self.SIZE)
        assert torch.equal(pickle.loads(pickle.dumps(order)).take(1101, self.SIZE), taken[1101])
