"""The cache of a source's tensors: what is computed when, what a kill leaves, what damage does."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from repa_lab.data import DataError, cache
from repa_lab.data.cache import RECORD, ArrayCache, encode_batches, open_cache
from repa_lab.data.crop import Buckets
from repa_lab.data.sources import groups
from repa_lab.files import digest
from tests.data.conftest import image_folder, noise_image

IDENTITY = {"kind": "test/1", "data": "abc"}
COUNT = 11
EVERYTHING = torch.arange(COUNT)


class KilledError(Exception):
    """Stands for the end of the process."""


class Numbers:
    """A source of ``COUNT`` images, of which image i is one pixel of level i."""

    def __init__(self, count: int = COUNT) -> None:
        self.sizes = torch.ones(count, 2, dtype=torch.long)

    def __len__(self) -> int:
        return len(self.sizes)

    def read(self, index) -> torch.Tensor:
        return torch.tensor(index, dtype=torch.uint8).view(-1, 1, 1, 1)

    def frames(self, index) -> torch.Tensor:
        return torch.tensor([[9, i, 0, 0, 1, 1] for i in index])


class Square:
    """Encodes image i as the 1x2 tensor (i, i**2) and remembers the images that it was asked for."""

    def __init__(self, dtype: torch.dtype = torch.float32, die_after: int | None = None) -> None:
        self.asked: list[int] = []
        self._dtype, self._die_after = dtype, die_after

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        if self._die_after is not None and len(self.asked) >= self._die_after:
            raise KilledError
        index = pixels.long().flatten()
        self.asked += index.tolist()
        return torch.stack([index, index**2], dim=1).unsqueeze(1).to(self._dtype)


@pytest.fixture
def build(tmp_path):
    def build(encode, identity=IDENTITY, count=COUNT, **options) -> ArrayCache:
        return open_cache(tmp_path, identity, Numbers(count), encode, batch_size=3, **options)

    return build


@pytest.fixture
def file(tmp_path):
    """A file of the only cache."""

    def file(name: str) -> Path:
        (path,) = tmp_path.glob(f"*/{name}")
        return path

    return file


def squares(opened: ArrayCache) -> list[int]:
    return opened[EVERYTHING][:, 0, 1].tolist()


EXPECTED = [i**2 for i in range(COUNT)]


def flip_bit(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


class TestContent:
    @pytest.mark.parametrize(
        "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.int64, torch.bool]
    )
    def test_is_what_was_encoded_in_the_order_of_the_index(self, build, dtype):
        for opened in (build(Square(dtype)), build(Square(dtype))):
            for index in (EVERYTHING, torch.tensor([10, 0, 4, 4, 3]), torch.tensor([4])):
                found = opened[index]
                assert found.dtype == dtype and opened.shape(index) == (1, 2)
                assert torch.equal(found, Square(dtype)(index))

    def test_every_image_is_encoded_once_for_good(self, build):
        first, second = Square(), Square()
        build(first)
        assert first.asked == list(range(COUNT))
        assert squares(build(second)) == EXPECTED and second.asked == []

    def test_another_process_maps_the_same_files(self, build, file):
        opened = build(Square())
        sent = pickle.dumps(opened)
        assert len(sent) < 2000 and squares(pickle.loads(sent)) == EXPECTED
        maps = Path("/proc/self/maps").read_text()
        assert "r--s" in next(line for line in maps.splitlines() if line.endswith(str(file("values-1x1.bin"))))

    def test_what_is_read_may_be_changed_without_harm(self, build):
        opened = build(Square())
        opened[EVERYTHING].zero_()
        assert squares(opened) == squares(build(Square())) == EXPECTED

    def test_the_files_say_what_they_hold(self, build, file):
        build(Square(), about={"for": "people"})
        content = json.loads(file("manifest.json").read_text())
        assert content.pop("sha256") == digest(content)
        assert content == {
            "identity": IDENTITY, "dtype": "float32", "shapes": {"1x1": [1, 2]}, "count": COUNT, "format": 1,
            "about": {"for": "people"},
        }  # fmt: skip
        values = np.fromfile(file("values-1x1.bin"), np.float32).reshape(COUNT, 1, 2)
        assert values[:, 0, 1].tolist() == EXPECTED
        records = np.fromfile(file("images.bin"), RECORD)
        assert records["frame"].tolist() == Numbers().frames(range(COUNT)).tolist() and records["done"].all()
        start = zlib.crc32(f"{digest(IDENTITY)} float32 (1, 2)".encode())
        rows = [record["frame"].tobytes() + value.tobytes() for record, value in zip(records, values, strict=True)]
        assert records["crc32"].tolist() == [zlib.crc32(row, start) for row in rows]

    def test_progress_counts_images_up_to_all(self, build):
        heard: list[tuple[int, int]] = []
        build(Square(), progress=lambda done, total: heard.append((done, total)))
        assert heard == [(3, 11), (6, 11), (9, 11), (11, 11)]
        build(Square(), progress=lambda done, total: heard.append((done, total)))
        assert len(heard) == 4


class TestInterruptions:
    def test_a_kill_loses_one_batch(self, build):
        with pytest.raises(KilledError):
            build(Square(die_after=6))
        rest = Square()
        assert squares(build(rest)) == EXPECTED
        assert rest.asked == list(range(6, COUNT))

    def test_a_process_that_is_killed_leaves_a_cache_that_can_be_completed(self, build, tmp_path):
        processes = multiprocessing.get_context("fork")
        is_half_done = processes.Event()

        def until_half(pixels: torch.Tensor) -> torch.Tensor:
            if pixels.max() >= 100:
                is_half_done.set()
                signal.pause()
            return Square()(pixels)

        process = processes.Process(target=build, args=(until_half,), kwargs={"count": 200})
        process.start()
        is_half_done.wait()
        process.kill()
        process.join()
        rest = Square()
        opened = build(rest, count=200)
        assert 0 < len(rest.asked) < 200 and rest.asked == list(range(rest.asked[0], 200))
        assert torch.equal(opened[torch.arange(200)], Square()(torch.arange(200)))

    def test_two_that_want_the_same_encode_it_once(self, build):
        asked, opened = Square(), list[ArrayCache]()

        def slowly(pixels: torch.Tensor) -> torch.Tensor:
            time.sleep(0.01)
            return asked(pixels)

        threads = [threading.Thread(target=lambda: opened.append(build(slowly))) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(asked.asked) == list(range(COUNT))
        assert [squares(one) for one in opened] == [EXPECTED] * 2

    @pytest.mark.parametrize("name", ["values-1x1.bin", "images.bin", "manifest.json"])
    def test_a_full_disk_is_one_line_and_what_is_done_is_kept(self, build, tmp_path, monkeypatch, name):
        opened, full = Path.open, [False]

        def open_(path, mode="r", *args, **options):
            if name in path.name and mode not in ("r", "rb") and full[0]:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return opened(path, mode, *args, **options)

        with monkeypatch.context() as patched:
            patched.setattr(Path, "open", open_)
            encode = Square()
            with pytest.raises(DataError) as caught:
                full[0] = name == "manifest.json"
                build(encode, progress=lambda done, total: full.__setitem__(0, True))
        (folder,) = tmp_path.iterdir()
        assert str(caught.value) == (
            f"cannot write the cache '{folder}': No space left on device; mend this and start again, and what is done is kept"
        )
        rest = Square()
        assert squares(build(rest)) == EXPECTED
        # The second batch may be written before the first is reported.
        assert len(rest.asked) in ((COUNT,) if name == "manifest.json" else (COUNT - 3, COUNT - 6))


class TestDamage:
    @pytest.mark.parametrize("keep, again", [(0, list(range(COUNT))), (5 * 8, list(range(3, COUNT))), (-1, [9, 10])])
    def test_what_a_truncated_file_lacks_is_encoded_again(self, build, file, keep, again):
        build(Square())
        path = file("values-1x1.bin")
        path.write_bytes(path.read_bytes()[:keep])
        encode = Square()
        assert squares(build(encode)) == EXPECTED and encode.asked == again

    def test_a_file_that_has_grown_or_gone_is_mended(self, build, file):
        build(Square())
        path, encode = file("values-1x1.bin"), Square()
        path.write_bytes(path.read_bytes() + b"more")
        assert squares(build(encode)) == EXPECTED and encode.asked == []
        path.unlink()
        assert squares(build(encode)) == EXPECTED and encode.asked == list(range(COUNT))

    @pytest.mark.parametrize(
        "name, at",
        [("values-1x1.bin", 7 * 8 + 1), *(("images.bin", 7 * RECORD.itemsize + at) for at in (0, 17, 25, 28))],
    )
    def test_a_flipped_bit_is_found_when_the_cache_is_opened_and_its_batch_encoded_again(self, build, file, name, at):
        build(Square())
        before = file(name).read_bytes()
        flip_bit(file(name), at)
        encode = Square()
        assert squares(build(encode)) == EXPECTED and encode.asked == [6, 7, 8]
        assert file(name).read_bytes() == before

    def test_only_what_is_damaged_is_written_again(self, build, file):
        build(Square())
        flip_bit(file("values-1x1.bin"), 7 * 8)
        build(lambda pixels: Square()(pixels) + 100)  # as another device might round
        assert squares(build(Square())) == [*EXPECTED[:7], 149, *EXPECTED[8:]]

    def test_records_that_are_cut_short_are_made_again(self, build, file):
        build(Square())
        path, encode = file("images.bin"), Square()
        path.write_bytes(path.read_bytes()[:-1])
        assert squares(build(encode)) == EXPECTED and encode.asked == list(range(COUNT))

    @pytest.mark.parametrize("damage", [
        lambda text: "", lambda text: text[:60], lambda text: "[]", lambda text: text.replace('"count": 11', '"count": 12'),
    ])  # fmt: skip
    def test_a_damaged_manifest_is_written_anew_and_whole_tensors_are_kept(self, build, file, damage):
        build(Square())
        manifest, encode = file("manifest.json"), Square()
        before = manifest.read_text()
        manifest.write_text(damage(before))
        assert squares(build(encode)) == EXPECTED
        assert manifest.read_text() == before
        assert encode.asked == [0, 1, 2]  # which show the shape

    def test_tensors_of_another_cache_are_not_taken_for_this_ones(self, build, tmp_path, file):
        build(Square())
        mine = file("values-1x1.bin").parent
        build(lambda pixels: -Square()(pixels), {**IDENTITY, "data": "abd"})
        (other,) = (path for path in tmp_path.iterdir() if path != mine)
        for name in ("values-1x1.bin", "images.bin"):
            shutil.copy(other / name, mine / name)
        encode = Square()
        assert squares(build(encode)) == EXPECTED and encode.asked == list(range(COUNT))

    def test_a_large_cache_is_checked_whole_only_if_its_files_have_changed(self, build, file, monkeypatch):
        monkeypatch.setattr(cache, "_ALWAYS_CHECKED_BYTES", 0)
        build(Square())
        checked, check = [], cache.checksums
        monkeypatch.setattr(cache, "checksums", lambda *args: checked.append(args) or check(*args))
        assert squares(build(Square())) == EXPECTED and checked == []
        flip_bit(file("values-1x1.bin"), 7 * 8)
        encode = Square()
        assert squares(build(encode)) == EXPECTED and encode.asked == [6, 7, 8]
        assert len(checked) == 1
        checked.clear()
        build(Square())
        assert checked == []

    def test_reading_checks_nothing_but_the_length_of_the_file(self, build, file):
        opened = build(Square())
        path = file("values-1x1.bin")
        flip_bit(path, 7 * 8 + 4)
        assert squares(opened) != EXPECTED
        with path.open("r+b") as mapped:
            mapped.truncate(5 * 8)
        with pytest.raises(DataError) as caught:
            squares(opened)
        assert str(caught.value) == (
            f"'{path}' was cut short, from 88 to 40 bytes: start again, and what is missing is computed again"
        )
        assert squares(build(Square())) == EXPECTED

    def test_a_file_that_is_deleted_meanwhile_can_still_be_read(self, build, file):
        opened = build(Square())
        file("values-1x1.bin").unlink()
        assert squares(opened) == EXPECTED


class TestRefusals:
    def test_another_identity_is_another_folder(self, build, tmp_path):
        build(Square())
        other = Square()
        build(other, {**IDENTITY, "data": "abd"})
        assert len(other.asked) == COUNT and len(list(tmp_path.iterdir())) == 2

    def test_a_copied_folder_is_refused_by_its_manifest(self, build, tmp_path, file):
        build(Square())
        other = {**IDENTITY, "data": "abd", "weights": None}
        folder = tmp_path / digest({"format": 1, **other})[:16]
        shutil.copytree(file("manifest.json").parent, folder)
        with pytest.raises(DataError) as caught:
            build(Square(), other)
        assert str(caught.value) == (
            f"'{folder}' is not the cache of these images and settings, but perhaps a copy of another: data differ; delete it"
        )

    def test_another_count_is_refused(self, build):
        build(Square())
        with pytest.raises(DataError, match="another: count differ"):
            build(Square(), count=COUNT + 1)

    def test_a_cache_of_another_format_is_refused(self, build, file):
        build(Square())
        content = json.loads(file("manifest.json").read_text()) | {"format": 2}
        del content["sha256"]
        file("manifest.json").write_text(json.dumps({**content, "sha256": digest(content)}))
        with pytest.raises(DataError, match="another: format differ; delete it"):
            build(Square())

    def test_tensors_that_are_not_alike_are_refused(self, build):
        with pytest.raises(
            DataError, match=r"must be alike: \(\(2,\), 'float32'\) were stored, now there are \(\(1,\)"
        ):
            build(lambda pixels: torch.zeros(len(pixels), 2 if pixels.min() == 0 else 1))


class TestSizes:
    """Images that keep their aspects: a file for each size."""

    # Widths and heights, so that the sizes 20x12, 16x16 and 12x20 (height, width) take turns irregularly.
    WIDE, SQUARE, TALL = (50, 30), (16, 16), (33, 61)
    SHAPES = (SQUARE, WIDE, TALL, WIDE, SQUARE, TALL, WIDE, SQUARE, WIDE, WIDE, SQUARE)
    MEMBERS = ((1, 3, 6, 8, 9), (0, 4, 7, 10), (2, 5))  # the images of 12x20, 16x16 and 20x12

    @pytest.fixture
    def source(self, folder):
        images = {f"{i:02}.png": noise_image(i, shape) for i, shape in enumerate(self.SHAPES)}
        return image_folder(folder(images), 16, Buckets(16, 4, 2.0))

    @pytest.fixture
    def root(self, tmp_path):
        return tmp_path / "cache"

    @staticmethod
    def halve(pixels: torch.Tensor) -> torch.Tensor:
        return pixels[..., ::2, ::2].half()

    def test_every_image_is_found_by_its_own_number(self, source, root):
        opened = open_cache(root, IDENTITY, source, self.halve, batch_size=2)
        for i in range(len(source)):
            height, width = source.sizes[i].tolist()
            index = torch.tensor([i])
            assert opened.shape(index) == (3, height // 2, width // 2)
            assert torch.equal(opened[index], self.halve(source.read([i])))
        for members in self.MEMBERS:
            index = torch.tensor([*members[::-1], members[0]])
            assert torch.equal(opened[index], self.halve(source.read(index.tolist())))

    def test_each_size_has_a_file_and_a_shape(self, source, root):
        open_cache(root, IDENTITY, source, lambda pixels: self.halve(pixels).float())
        (folder,) = root.iterdir()
        shapes = {"12x20": [3, 6, 10], "16x16": [3, 8, 8], "20x12": [3, 10, 6]}
        assert json.loads((folder / "manifest.json").read_text())["shapes"] == shapes
        sizes = {path.name: path.stat().st_size for path in folder.glob("values-*")}
        assert sizes == {"values-12x20.bin": 5 * 720, "values-16x16.bin": 4 * 768, "values-20x12.bin": 2 * 720}
        records = np.fromfile(folder / "images.bin", RECORD)
        assert records["frame"].tolist() == source.frames(range(11)).tolist()

    @pytest.mark.parametrize("done", range(0, 11, 2))
    def test_a_kill_loses_no_image_that_is_done(self, source, root, done):
        asked: list[torch.Tensor] = []

        def dying(pixels: torch.Tensor) -> torch.Tensor:
            if len(asked) >= done:
                raise KilledError
            asked.append(pixels)
            return self.halve(pixels)

        with pytest.raises(KilledError):
            open_cache(root, IDENTITY, source, dying, batch_size=1)
        rest: list[torch.Tensor] = []
        opened = open_cache(
            root, IDENTITY, source, lambda pixels: rest.append(pixels) or self.halve(pixels), batch_size=1
        )
        assert len(asked) + len(rest) == 11
        for i in range(11):
            assert torch.equal(opened[torch.tensor([i])], self.halve(source.read([i])))

    def test_progress_counts_all_images_to_the_total(self, source, root):
        heard: list[tuple[int, int]] = []
        open_cache(root, IDENTITY, source, self.halve, batch_size=2, progress=lambda *told: heard.append(told))
        assert heard == [(done, 11) for done in (2, 4, 6, 8, 9, 11)]  # the first batch of each size, then the others

    def test_a_flipped_bit_is_encoded_again_in_its_own_file_alone(self, source, root):
        open_cache(root, IDENTITY, source, self.halve, batch_size=2)
        flip_bit(next(root.glob("*/values-16x16.bin")), 3 * 384)
        asked: list[torch.Tensor] = []
        opened = open_cache(
            root, IDENTITY, source, lambda pixels: asked.append(pixels) or self.halve(pixels), batch_size=2
        )
        assert len(asked) == 1 and torch.equal(asked[0], source.read([7, 10]))
        assert torch.equal(opened[torch.tensor([10])], self.halve(source.read([10])))

    def test_groups_are_in_order_and_together_all(self):
        sizes = torch.tensor([[16, 16], [8, 32], [16, 16], [32, 8], [8, 32], [8, 16]])
        assert [group.tolist() for group in groups(sizes)] == [[5], [1, 4], [0, 2], [3]]
        assert [group.tolist() for group in groups(torch.full((3, 2), 8))] == [[0, 1, 2]]


@pytest.mark.parametrize("readers", [1, 2])
def test_batches_are_read_ahead_and_written_behind(readers):
    """A batch is encoded only after those after it are read, and written only after the next one is encoded."""
    batches = range(5)
    read, encoded = ([threading.Event() for _ in range(len(batches) + readers)] for _ in range(2))
    for event in (*read[len(batches) :], *encoded[len(batches) :]):
        event.set()

    def encode(number: int) -> int:
        assert all(event.wait() for event in read[: number + 1 + readers])
        encoded[number].set()
        return number + 10

    def write(number: int, value: int) -> None:
        assert encoded[number + 1].wait() and value == number + 10

    found = encode_batches(batches, lambda number: read[number].set() or number, encode, write, readers)
    assert list(found) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("stage", range(3))
def test_an_error_in_any_stage_ends_the_others(stage):
    def fail(*args: int) -> int:
        raise KilledError

    stages = [abs, abs, max]
    stages[stage] = fail
    with pytest.raises(KilledError):
        list(encode_batches(range(3), *stages, 2))


def test_frames_are_those_of_the_source(build):
    opened = build(Square())
    assert opened.frames(torch.tensor([4, 0])).tolist() == Numbers().frames([4, 0]).tolist()
