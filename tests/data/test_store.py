from __future__ import annotations

import json
import shutil
import threading
import time
import zlib

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from repa_lab.data import store
from repa_lab.data.errors import DataError
from repa_lab.data.store import open_or_build
from repa_lab.files import digest

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
    monkeypatch.setattr(store, "_SHARD_ROWS", 4)  # 11 images in shards of 4, 4 and 3


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
    build(first)
    assert first.asked == list(range(COUNT))
    assert build(second)[torch.arange(COUNT)].tolist() == [[[i, i**2]] for i in range(COUNT)]
    assert second.asked == []


def test_a_kill_loses_one_shard(build, tmp_path):
    with pytest.raises(KilledError):
        build(Square(die_after=7))  # the first shard and one batch of the second
    assert len(shards(tmp_path)) == 1
    rest = Square()
    opened = build(rest)
    assert rest.asked == list(range(4, COUNT))
    assert opened[torch.arange(COUNT)][:, 0, 1].tolist() == [i**2 for i in range(COUNT)]


@pytest.mark.parametrize("keep", [0, 5, 40, -1], ids=["empty", "no header", "half a header", "one byte short"])
def test_a_truncated_shard_is_computed_again(build, tmp_path, keep):
    build(Square())
    path = shards(tmp_path)[1]
    path.write_bytes(path.read_bytes()[:keep])
    again = Square()
    assert build(again)[torch.tensor([7])].tolist() == [[[7, 49]]]
    assert again.asked == [4, 5, 6, 7]


def test_shards_are_cut_as_the_manifest_says_not_as_one_would_today(build, tmp_path, monkeypatch):
    build(Square())
    monkeypatch.setattr(store, "_SHARD_ROWS", 3)
    again = Square()
    opened = build(again)
    assert opened[torch.arange(COUNT)][:, 0, 0].tolist() == list(range(COUNT))
    assert again.asked == []


@pytest.mark.parametrize("limit, rows", [(80, 10), (16, 2), (15, 1), (1, 1)])
def test_shards_are_cut_by_bytes_and_hold_at_least_one_row(build, tmp_path, monkeypatch, limit, rows):
    monkeypatch.setattr(store, "_SHARD_ROWS", 1024)
    monkeypatch.setattr(store, "_SHARD_BYTES", limit)  # a row of two float32 has 8 bytes
    opened = build(Square())
    assert [len(load_file(path)["values"]) for path in shards(tmp_path)][:2] == [rows, min(rows, COUNT - rows)]
    assert opened[torch.arange(COUNT)][:, 0, 1].tolist() == [i**2 for i in range(COUNT)]


def test_what_a_kill_left_of_a_file_being_written_is_no_shard(build, tmp_path):
    build(Square())
    path = shards(tmp_path)[0]
    path.rename(path.with_suffix(".tmp"))
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


def manifest_of(tmp_path):
    (path,) = tmp_path.glob("*/manifest.json")
    return path


def test_the_manifest_says_what_the_store_is(build, tmp_path):
    build(Square())
    held = json.loads(manifest_of(tmp_path).read_text())
    assert held.pop("checksum") == digest(held)
    assert held == {"identity": IDENTITY, "dtype": "float32", "shape": [1, 2], "count": COUNT, "rows": 4}


def test_a_copied_folder_is_refused_by_its_manifest(build, tmp_path):
    build(Square())
    other = {**IDENTITY, "data": "abd", "weights": None}
    folder = tmp_path / digest(other)[:16]
    shutil.copytree(manifest_of(tmp_path).parent, folder)
    with pytest.raises(DataError) as caught:
        build(Square(), other)
    assert str(caught.value) == (
        f"'{folder}' is not the cache of these images and settings, but perhaps a copy of another: data, weights differ; delete it"
    )


def test_a_store_of_another_count_or_dtype_is_refused(build, tmp_path):
    build(Square())
    with pytest.raises(DataError, match="another: count differ"):
        open_or_build(tmp_path, IDENTITY, COUNT + 1, Square())
    with pytest.raises(DataError, match="another: dtype differ"):
        build(Square(), dtype=torch.float16)


def other_rows(held):
    return held.replace('"rows": 4', '"rows": 3')


@pytest.mark.parametrize("damage", [lambda held: "", lambda held: held[:60], lambda held: "[]", other_rows])
def test_a_damaged_manifest_is_written_anew_and_whole_shards_are_kept(build, tmp_path, damage):
    build(Square())
    manifest = manifest_of(tmp_path)
    before = manifest.read_text()
    manifest.write_text(damage(before))
    again = Square()
    opened = build(again)
    assert manifest.read_text() == before
    assert again.asked == [0, 1, 2]  # by which it learns what one tensor is like
    assert opened[torch.arange(COUNT)][:, 0, 1].tolist() == [i**2 for i in range(COUNT)]


def test_a_shard_of_another_store_is_not_taken_for_this_ones(build, tmp_path):
    build(Square())
    mine = shards(tmp_path)
    build(lambda index: -Square()(index), {**IDENTITY, "data": "abd"})
    (other,) = (path for path in shards(tmp_path) if path not in mine and path.name == mine[1].name)
    shutil.copy(other, mine[1])
    again = Square()
    assert build(again)[torch.tensor([5])].tolist() == [[[5, 25]]]
    assert again.asked == [4, 5, 6, 7]


def flip_bit(path, row, shape=(1, 2)):
    """Flip the lowest bit of the first byte of a row's values."""
    raw = bytearray(path.read_bytes())
    values = load_file(path)["values"]
    at = raw.index(values.numpy().tobytes()) + row * values[0].nbytes
    raw[at] ^= 1
    path.write_bytes(raw)


def test_every_row_has_its_crc(build, tmp_path):
    build(Square())
    held = load_file(shards(tmp_path)[1])
    rows = np.array([[i, i**2] for i in range(4, 8)], np.float32)
    assert held["crc32"].tolist() == [zlib.crc32(row.tobytes()) for row in rows]


def test_a_flipped_bit_is_found_when_a_store_is_opened_and_its_shard_computed_again(build, tmp_path):
    build(Square())
    flip_bit(shards(tmp_path)[1], row=2)
    again = Square()
    assert build(again)[torch.tensor([6])].tolist() == [[[6, 36]]]
    assert again.asked == [4, 5, 6, 7]


def test_a_flipped_bit_of_a_large_store_is_found_when_its_row_is_read(build, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "_IN_MEMORY_BYTES", 0)
    build(Square())
    path = shards(tmp_path)[1]
    flip_bit(path, row=2)
    opened = build(Square())
    assert opened[torch.tensor([4, 5, 7, 0])][:, 0, 1].tolist() == [16, 25, 49, 0]
    for index in ([6], [0, 6, 4]):
        with pytest.raises(DataError) as caught:
            opened[torch.tensor(index)]
        assert str(caught.value) == f"the cache file '{path}' is damaged; delete it, and it is computed again"
    path.unlink()
    assert build(Square())[torch.tensor([6])].tolist() == [[[6, 36]]]


def test_a_row_is_checked_once_in_a_process(build, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "_IN_MEMORY_BYTES", 0)
    opened = build(Square())
    checked: list[int] = []
    check = store.checksums
    monkeypatch.setattr(store, "checksums", lambda values: checked.append(len(values)) or check(values))
    for index in ([1, 5], [1, 2], [5], [1, 2, 5]):
        opened[torch.tensor(index)]
    assert checked == [1, 1, 1, 0, 0, 0]


def test_a_shard_that_goes_away_while_in_use_is_named(build, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "_IN_MEMORY_BYTES", 0)
    opened = build(Square())
    path = shards(tmp_path)[2]
    path.unlink()
    with pytest.raises(DataError, match=rf"'{path}' is damaged"):
        opened[torch.tensor([9])]


def test_half_precision_is_rounded_to_nearest(build, tmp_path):
    values = np.random.default_rng(0).normal(size=(COUNT, 3)).astype(np.float32)
    opened = build(lambda index: torch.from_numpy(values)[index], dtype=torch.float16)
    assert opened.dtype == torch.float16
    assert np.array_equal(opened[torch.arange(COUNT)].numpy(), values.astype(np.float16))
    assert json.loads(manifest_of(tmp_path).read_text())["dtype"] == "float16"


def test_what_half_precision_cannot_hold_is_refused(build, tmp_path):
    # 65520 is the least float32 that rounds to infinity.
    build(lambda index: torch.full((len(index), 1), 65519.0), dtype=torch.float16)
    with pytest.raises(DataError) as caught:
        build(lambda index: torch.full((len(index), 1), -65520.0), {"data": "large"}, dtype=torch.float16)
    assert str(caught.value) == (
        "a value of 65520 is too large to be kept as float16 (up to 65504); set run.encoder_storage: fp32"
    )
    assert caught.value.field == "encoder_storage"
    assert not list((tmp_path / digest({"data": "large"})[:16]).glob("values-*"))


def test_what_was_not_finite_before_is_no_fault_of_the_storage(build):
    opened = build(lambda index: torch.full((len(index), 1), torch.inf), dtype=torch.float16)
    assert opened[torch.tensor([0])].tolist() == [[torch.inf]]


def test_tensors_that_are_not_alike_are_refused(build):
    with pytest.raises(DataError, match="must be alike"):
        build(lambda index: torch.zeros(len(index), 2 if 0 in index else 1))


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
