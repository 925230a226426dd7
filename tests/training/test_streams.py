from __future__ import annotations

import hashlib
import itertools
import pickle

import numpy as np
import pytest
import torch
from scipy import stats

from repa_lab.training.batches import BatchOrder, Order, generator, seeded, stream_seed


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
