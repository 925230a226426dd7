from __future__ import annotations

import hashlib
import itertools
import pickle

import pytest
import torch

from repa_lab.training.streams import Order, generator, seeded, stream_seed


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
