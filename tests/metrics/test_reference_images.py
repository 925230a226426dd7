from __future__ import annotations

import io
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch

from repa_lab.metrics.reference import StatisticsError, images_shape, read_images, write_images

PIXELS = torch.randint(0, 256, (10, 3, 6, 5), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_a_batch_is_numpys_own_npz(tmp_path):
    path = tmp_path / "new" / "samples.npz"
    write_images(path, [PIXELS[:4], PIXELS[4:]], 10)
    with np.load(path, allow_pickle=False) as stored:
        assert stored.files == ["arr_0"]
        assert (stored["arr_0"].dtype, stored["arr_0"].shape) == (np.uint8, (10, 6, 5, 3))
        assert np.array_equal(stored["arr_0"], PIXELS.permute(0, 2, 3, 1))
    assert [file.name for file in path.parent.iterdir()] == ["samples.npz"]


def test_grey_is_three_equal_channels(tmp_path):
    write_images(tmp_path / "x.npz", [PIXELS[:, :1]], 10)
    stored = np.load(tmp_path / "x.npz")["arr_0"]
    assert (stored == PIXELS[:, 0, :, :, None].numpy()).all()


@pytest.mark.parametrize("batch_size", [1, 4, 10, 64])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_what_others_wrote_is_read(tmp_path, batch_size, save):
    save(tmp_path / "x.npz", arr_0=PIXELS.permute(0, 2, 3, 1).numpy(), mu=np.zeros(3))
    parts = list(read_images(tmp_path / "x.npz", batch_size))
    assert [len(part) for part in parts] == [min(batch_size, 10 - start) for start in range(0, 10, batch_size)]
    assert torch.equal(torch.cat(parts), PIXELS)


@pytest.mark.parametrize(
    ("batches", "count", "match"),
    [
        ([PIXELS], 11, "11 images were announced and 10 arrived"),
        ([PIXELS, PIXELS], 11, "11 images were announced and 20 arrived"),
        ([PIXELS, PIXELS[:, :, :5]], 20, "images of one size are needed"),
        ([PIXELS.float()], 10, r"need uint8 pixels \(B, 1 or 3, H, W\), got torch.float32"),
        ([PIXELS.permute(0, 2, 3, 1)], 10, "need uint8 pixels"),
        ([], 0, "0 images were announced and 0 arrived"),
        ([PIXELS[:0]], 0, "0 images were announced and 0 arrived"),
    ],
)
def test_a_batch_that_is_not_whole_is_not_written(tmp_path, batches, count, match):
    (tmp_path / "x.npz").write_bytes(b"of before")
    with pytest.raises(ValueError, match=match):
        write_images(tmp_path / "x.npz", batches, count)
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("x.npz", b"of before")]


def test_a_failing_sampler_leaves_nothing(tmp_path):
    def batches():
        yield PIXELS
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        write_images(tmp_path / "x.npz", batches(), 20)
    assert list(tmp_path.iterdir()) == []


STREAM = """
import resource, sys
from pathlib import Path
import torch
from repa_lab.metrics.reference import images_shape, read_images, write_images
batch = torch.zeros(8, 3, 256, 256, dtype=torch.uint8)
write_images(Path(sys.argv[1]), [batch], 8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
write_images(Path(sys.argv[1]), (batch for _ in range(50)), 400)
assert sum(len(part) for part in read_images(Path(sys.argv[1]), 8)) == 400
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_images_are_never_all_in_memory(tmp_path):
    command = [sys.executable, "-c", STREAM, str(tmp_path / "x.npz")]
    kib = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert (tmp_path / "x.npz").stat().st_size > 75 << 20
    assert kib < 30 << 10


@pytest.mark.parametrize(
    ("held", "match"),
    [
        ({"mu": np.zeros(3)}, "holds no images under arr_0"),
        ({"arr_0": np.zeros((2, 4, 4, 3), np.float32)}, r"holds float32 \(2, 4, 4, 3\) under arr_0; allowed: uint8"),
        ({"arr_0": np.zeros((2, 3, 4, 4), np.uint8)}, "allowed: uint8"),
        ({"arr_0": np.zeros((2, 3), np.uint8)}, "allowed: uint8"),
    ],
)
def test_what_holds_no_images_is_refused(tmp_path, held, match):
    np.savez(tmp_path / "x.npz", **held)
    with pytest.raises(StatisticsError, match=match):
        next(read_images(tmp_path / "x.npz"))


def test_a_header_that_promises_more_than_there_is_and_none_at_all(tmp_path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (100, 8, 8, 3)})
    for content in (header.getvalue() + bytes(1000), b"no array", b""):
        with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
            archive.writestr("arr_0.npy", content)
        with pytest.raises(
            StatisticsError,
            match=r"x\.npz' holds no images under arr_0 that can be read \(.*\): give a file with images, .*, or download it again",
        ):
            next(read_images(tmp_path / "x.npz"))


def test_damage_within_compressed_images_is_named(tmp_path):
    np.savez_compressed(
        tmp_path / "x.npz", arr_0=np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3), dtype=np.uint8)
    )
    content = bytearray((tmp_path / "x.npz").read_bytes())
    content[60:100] = bytes(40 * [0x5A])
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(StatisticsError, match="holds no images under arr_0 that can be read"):
        next(read_images(tmp_path / "x.npz"))


def test_the_size_is_told_without_the_images(tmp_path):
    write_images(tmp_path / "x.npz", [torch.zeros(3, 1, 4, 5, dtype=torch.uint8)], 3)
    assert images_shape(tmp_path / "x.npz") == (3, 4, 5)
    np.savez(tmp_path / "none.npz", mu=np.zeros(3))
    assert images_shape(tmp_path / "none.npz") is None


def test_no_file_and_a_damaged_one(tmp_path):
    (tmp_path / "x.npz").write_bytes(b"PK\3\4aaaa")
    for name in ("x.npz", "none.npz"):
        with pytest.raises(StatisticsError, match=f"{name}' holds no images under arr_0"):
            next(read_images(tmp_path / name))
