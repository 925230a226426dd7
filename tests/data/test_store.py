from __future__ import annotations

import json
import threading
import time

import pytest
import torch

from repa_lab.data import store
from repa_lab.data.store import is_built, open_or_build

IDENTITY = {"kind": "test/1", "data": "abc"}
COUNT = 11


class KilledError(Exception):
    """Stands for the end of the process."""


class Square:
    """Computes (i, i**2) as a 1x2 array and remembers for which images it was asked."""

    def __init__(self, dtype: torch.dtype = torch.float32, die_after: int | None = None) -> None:
        self.asked: list[int] = []
        self._dtype, self._die_after = dtype, die_after

    def __call__(self, index: torch.Tensor) -> torch.Tensor:
        if self._die_after is not None and len(self.asked) >= self._die_after:
            raise KilledError
        self.asked += index.tolist()
        return torch.stack([index, index**2], dim=1).unsqueeze(1).to(self._dtype)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(store, "_SHARD", 4)  # 11 images in shards of 4, 4 and 3


@pytest.fixture
def build(tmp_path):
    def build(compute, identity=IDENTITY, **options):
        return open_or_build(tmp_path, identity, COUNT, compute, batch_size=3, **options)

    return build


def shards(tmp_path) -> list:
    return sorted(tmp_path.glob("*/values-*.safetensors"))


def test_holds_what_was_computed_in_the_order_of_the_index(build):
    opened = build(Square())
    index = torch.tensor([10, 0, 4, 4, 3])
    assert opened[index].tolist() == [[[i, i**2]] for i in index.tolist()]
    assert (tuple(opened.shape), opened.dtype) == ((1, 2), torch.float32)


def test_every_image_is_computed_once_for_good(build, tmp_path):
    first, second = Square(), Square()
    assert not is_built(tmp_path, IDENTITY, COUNT)
    build(first)
    assert sorted(first.asked) == list(range(COUNT))
    assert is_built(tmp_path, IDENTITY, COUNT)
    assert build(second)[torch.arange(COUNT)].tolist() == [[[i, i**2]] for i in range(COUNT)]
    assert second.asked == []


def test_asking_whether_it_is_built_creates_nothing(tmp_path):
    assert not is_built(tmp_path / "cache", IDENTITY, COUNT)
    assert not (tmp_path / "cache").exists()


def test_a_kill_loses_one_shard(build, tmp_path):
    with pytest.raises(KilledError):
        build(Square(die_after=7))  # the first shard and one batch of the second
    assert len(shards(tmp_path)) == 1
    assert not is_built(tmp_path, IDENTITY, COUNT)
    rest = Square()
    opened = build(rest)
    assert rest.asked == list(range(4, COUNT))
    assert opened[torch.arange(COUNT)][:, 0, 1].tolist() == [i**2 for i in range(COUNT)]


@pytest.mark.parametrize("keep", [0, 5, 40, -1], ids=["empty", "no header", "half a header", "one byte short"])
def test_a_truncated_shard_is_computed_again(build, tmp_path, keep):
    build(Square())
    path = shards(tmp_path)[1]
    path.write_bytes(path.read_bytes()[:keep])
    assert not is_built(tmp_path, IDENTITY, COUNT)
    again = Square()
    assert build(again)[torch.tensor([7])].tolist() == [[[7, 49]]]
    assert again.asked == [4, 5, 6, 7]


def test_shards_of_another_size_are_not_taken_for_these(build, tmp_path, monkeypatch):
    build(Square())
    monkeypatch.setattr(store, "_SHARD", 3)
    again = Square()
    opened = open_or_build(tmp_path, IDENTITY, COUNT, again, batch_size=3)
    assert opened[torch.arange(COUNT)][:, 0, 0].tolist() == list(range(COUNT))
    assert sorted(again.asked) == list(range(COUNT))


def test_what_a_kill_left_of_a_file_being_written_is_no_shard(build, tmp_path):
    build(Square())
    path = shards(tmp_path)[0]
    path.rename(path.with_suffix(".tmp"))
    assert not is_built(tmp_path, IDENTITY, COUNT)
    again = Square()
    build(again)
    assert again.asked == [0, 1, 2, 3]
    assert not list(tmp_path.glob("*/*.tmp"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.int64])
def test_slices_from_disk_equal_reads_from_memory(build, monkeypatch, dtype):
    in_memory = build(Square(dtype))
    monkeypatch.setattr(store, "_IN_MEMORY_BYTES", 0)
    on_disk = build(Square(dtype))
    assert on_disk._values is None and in_memory._values is not None
    for index in (torch.arange(COUNT), torch.tensor([9, 2, 2, 10, 0]), torch.tensor([4])):
        assert torch.equal(on_disk[index], in_memory[index])
        assert on_disk[index].dtype == dtype


def test_the_limit_of_memory_is_that_of_the_whole_store(build, monkeypatch):
    size = COUNT * 2 * 4
    monkeypatch.setattr(store, "_IN_MEMORY_BYTES", size)
    assert build(Square())._values is not None
    monkeypatch.setattr(store, "_IN_MEMORY_BYTES", size - 1)
    assert build(Square())._values is None


def test_another_identity_is_another_store(build, tmp_path):
    build(Square())
    other = Square()
    build(other, {**IDENTITY, "data": "abd"})
    assert len(other.asked) == COUNT
    assert len(list(tmp_path.iterdir())) == 2


def test_the_manifest_says_what_the_store_is(build, tmp_path):
    build(Square())
    assert [json.loads(path.read_text()) for path in tmp_path.glob("*/manifest.json")] == [IDENTITY]


def test_progress_counts_images_up_to_all(build):
    heard: list[tuple[int, int]] = []
    build(Square(), progress=lambda done, total: heard.append((done, total)))
    assert heard == [(3, 11), (4, 11), (7, 11), (8, 11), (11, 11)]


def test_two_that_want_the_same_build_it_once(build):
    asked: list[int] = []

    def slowly(index: torch.Tensor) -> torch.Tensor:
        asked.extend(index.tolist())
        time.sleep(0.01)
        return index.float().unsqueeze(1)

    opened: list[store.ArrayStore] = []
    threads = [threading.Thread(target=lambda: opened.append(build(slowly))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(asked) == list(range(COUNT))
    assert [one[torch.tensor([10])].item() for one in opened] == [10, 10]
