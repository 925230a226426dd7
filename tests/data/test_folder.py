from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from repa_lab.data import DataError
from repa_lab.data.crop import Buckets, crop, opaque
from repa_lab.data.folders import read_image_folder
from repa_lab.data.sources import Flips, groups
from tests.data.conftest import content_of, image_folder, listing_of, noise_image


class TestImageFolder:
    def test_classes_are_subfolders_in_alphabetical_order(self, folder):
        root = folder({"b/x.png": noise_image(0), "a/y.png": noise_image(1), "c/deep/z.png": noise_image(2)})
        source = image_folder(root, 20)
        assert (len(source), source.num_classes) == (3, 3)
        assert source.labels.tolist() == [0, 1, 2]
        assert source.labels.dtype == torch.int64
        assert source.fingerprint == content_of(root, 20)

    def test_pixels_are_those_of_the_files(self, folder):
        images = {f"{i}.png": noise_image(i) for i in range(3)}
        pixels = image_folder(folder(images), 20).read([2, 0])
        assert (pixels.shape, pixels.dtype) == ((2, 3, 20, 20), torch.uint8)
        for read, name in zip(pixels, ("2.png", "0.png"), strict=True):
            assert np.array_equal(read.permute(1, 2, 0).numpy(), np.asarray(images[name]))

    def test_images_beside_each_other_are_one_class(self, folder):
        source = image_folder(folder({"1.png": noise_image(0), "2.png": noise_image(1)}), 8)
        assert (source.num_classes, source.labels.tolist()) == (1, [0, 0])

    def test_captions_follow_the_images_that_are_listed(self, folder):
        images = {"b/1.png": noise_image(0), "a.png": noise_image(1), "c.png": noise_image(2)}
        root = folder(images, {"c.png": "x", "b/1.png": "ß"})
        source = image_folder(root, 20)
        assert (len(source), source.captions, source.num_classes) == (2, ["ß", "x"], 2)
        assert np.array_equal(source.read([1])[0].permute(1, 2, 0).numpy(), np.asarray(images["c.png"]))
        assert source.notes == ("1 of 3 images have no row in metadata.jsonl and are left out",)
        assert Flips(source).notes == source.notes
        (root / "metadata.jsonl").unlink()
        assert (len(image_folder(root, 8)), list(image_folder(root, 8).captions), image_folder(root, 8).notes) == (
            3,
            [],
            (),
        )

    def test_captions_may_hold_unicode_line_separators(self, folder):
        text = "one\u2028two\u0085three"
        assert image_folder(folder({"1.png": noise_image(0)}, {"1.png": text}), 8).captions == [text]

    def test_blank_lines_and_windows_line_ends_are_no_rows(self, folder):
        root = folder({"1.png": noise_image(0)})
        (root / "metadata.jsonl").write_bytes(b'{"file_name": "1.png", "text": "x"}\r\n\r\n')
        assert image_folder(root, 8).captions == ["x"]

    @pytest.mark.parametrize("damage", [lambda raw: b"", lambda raw: raw[:200], lambda raw: b"hello"])
    @pytest.mark.parametrize("buckets", [None, Buckets(8, 4, 2.0)], ids=["square", "buckets"])
    def test_an_unreadable_image_is_named(self, folder, damage, buckets):
        root = folder({"1.png": noise_image(0), "2.png": noise_image(1)})
        (root / "2.png").write_bytes(damage((root / "2.png").read_bytes()))

        def read_both() -> None:
            source = image_folder(root, 8, buckets)
            assert source.read([0]).shape == (1, 3, 8, 8)
            source.read([1])

        with pytest.raises(DataError, match=r"cannot read the image '.*2\.png'") as caught:
            read_both()
        assert caught.value.field == "path"


class TestCaptionsBeside:
    """A text file beside each image, called as the image is."""

    @pytest.fixture
    def root(self, folder):
        root = folder(
            {"a/1.png": noise_image(0), "a/2.jpg": noise_image(1), "b/1.png": noise_image(2), "3.webp": noise_image(3)}
        )
        (root / "a" / "1.txt").write_text("  ein Hund, Größe ß\n\n", encoding="utf-8")
        (root / "b" / "1.txt").write_text("two lines,\none caption", encoding="utf-8")
        (root / "3.txt").write_text("\n")
        (root / "notes.txt").write_text("of no image")
        return root

    def test_are_stripped_and_empty_where_there_is_none(self, root):
        # In the order of the images: 3.webp, a/1.png, a/2.jpg, b/1.png.
        assert list(image_folder(root, 8).captions) == ["", "ein Hund, Größe ß", "", "two lines,\none caption"]

    def test_metadata_goes_before_them_if_it_has_captions(self, root):
        (root / "metadata.jsonl").write_text('{"file_name": "a/1.png", "text": "listed"}\n')
        assert list(image_folder(root, 8).captions) == ["listed"]
        (root / "metadata.jsonl").write_text('{"file_name": "a/1.png", "height": 20}\n')
        assert list(image_folder(root, 8).captions) == ["ein Hund, Größe ß"]

    def test_how_many_have_none_is_noted(self, root):
        assert image_folder(root, 8).notes == ("2 of 4 images have no caption: they are trained with the empty one",)

    def test_only_empty_ones_are_none_at_all(self, folder):
        root = folder({"1.png": noise_image(0)})
        (root / "1.txt").write_text(" \n")
        assert list(image_folder(root, 8).captions) == []

    def test_they_are_no_images_and_no_classes(self, root):
        source = image_folder(root, 8)
        assert (len(source), source.num_classes, source.labels.tolist()) == (4, 3, [0, 1, 1, 2])

    def test_windows_mark_of_utf8_is_no_part_of_a_caption(self, root):
        (root / "a" / "1.txt").write_bytes(b"\xef\xbb\xbfa cat\r\n")
        assert image_folder(root, 8).captions[1] == "a cat"

    def test_what_is_no_utf8_is_refused_by_name(self, root):
        (root / "a" / "1.txt").write_bytes("Größe".encode("latin-1"))
        with pytest.raises(DataError, match=r"a/1\.txt:1: not UTF-8 \(.*\): save the file as UTF-8") as caught:
            image_folder(root, 8)
        assert caught.value.field == "path"

    def test_every_change_of_one_shows_in_both_fingerprints(self, root):
        def prints() -> tuple[str, str]:
            return listing_of(root, 8), content_of(root, 8)

        seen = [prints()]
        for path, text in (
            ("a/1.txt", "ein Hahn"),
            ("a/1.txt", "ein Huhn"),
            ("a/2.txt", "new"),
            ("notes.txt", "other"),
        ):
            (root / path).write_text(text)
            seen.append(prints())
        assert seen[3] == seen[4]  # what belongs to no image
        for kind in zip(*seen[:4], strict=True):
            assert len(set(kind)) == 4

    def test_a_folder_without_any_has_none(self, folder):
        root = folder({"1.png": noise_image(0)})
        (root / "other.txt").write_text("of no image")
        assert not read_image_folder(root).captions
        (root / "1.txt").write_text("x")
        assert read_image_folder(root).captions == ["x"]


class TestAspects:
    BUCKETS = Buckets(16, 4, 2.0)  # by hand: 20x12, 16x16, 12x20 (of 24 wide, 10 are 8 high: an aspect of 3)

    @pytest.fixture
    def images(self):
        return {"a.png": noise_image(0, (16, 16)), "b.png": noise_image(1, (50, 30)), "c.png": noise_image(2, (33, 61)),
                "d.png": noise_image(3, (24, 22)), "e.png": noise_image(4, (90, 9))}  # fmt: skip

    def test_every_image_has_the_size_of_the_nearest_aspect(self, folder, images):
        assert self.BUCKETS.sizes == ((20, 12), (16, 16), (12, 20))
        source = image_folder(folder(images), 16, self.BUCKETS)
        assert source.sizes.tolist() == [[16, 16], [12, 20], [20, 12], [16, 16], [12, 20]]
        assert (source.side, source.channels) == (16, 3)

    def test_pixels_are_those_of_the_crop(self, folder, images):
        source = image_folder(folder(images), 16, self.BUCKETS)
        pixels = source.read([4, 1])
        assert (pixels.shape, pixels.dtype) == ((2, 3, 12, 20), torch.uint8)
        for read, name in zip(pixels, ("e.png", "b.png"), strict=True):
            assert np.array_equal(read.permute(1, 2, 0).numpy(), np.asarray(crop(opaque(images[name]), (12, 20))))
        assert np.array_equal(source.read([0])[0].permute(1, 2, 0).numpy(), np.asarray(images["a.png"]))

    def test_frames_by_hand(self, folder, images):
        source = image_folder(folder(images), 16, self.BUCKETS)
        assert source.frames([2, 0, 1, 3, 4]).tolist() == [
            [61, 33, 1, 0, 20, 12],  # covered by 12/33: 22.2 -> 22 rows
            [16, 16, 0, 0, 16, 16],
            [30, 50, 0, 0, 12, 20],  # halved to 15x25, and that is the size's aspect
            [22, 24, 0, 0, 16, 16],  # covered by 16/22: 17.45 -> 17 columns, of which the last is cut
            [9, 90, 0, 50, 12, 20],  # covered by 12/9: 120 columns
        ]

    def test_without_buckets_all_are_square(self, folder, images):
        source = image_folder(folder(images), 16)
        assert source.sizes.tolist() == [[16, 16]] * 5
        assert source.frames([1]).tolist() == [[30, 50, 0, 5, 16, 16]]  # covered by 16/30: 26.7 -> 27 columns

    def test_images_of_several_sizes_cannot_be_read_together(self, folder, images):
        with pytest.raises(RuntimeError, match="equal size"):
            image_folder(folder(images), 16, self.BUCKETS).read([0, 1])

    def test_mirrored_images_keep_size_frame_and_caption(self, folder, images):
        captions = dict.fromkeys(images, "") | {"b.png": "wide"}
        base = image_folder(folder(images, captions), 16, self.BUCKETS)
        flips = Flips(base)
        assert flips.sizes.tolist() == base.sizes.tolist() * 2
        assert torch.equal(
            flips.read([6, 1, 9]), torch.cat([base.read([1]).flip(-1), base.read([1]), base.read([4]).flip(-1)])
        )
        assert torch.equal(flips.frames([7, 2]), base.frames([2, 2]))
        assert (flips.captions[1], flips.captions[6]) == ("wide", "wide")

    def test_every_part_of_the_buckets_shows_in_both_fingerprints(self, folder, images):
        root = folder(images)
        chosen = [None, self.BUCKETS, Buckets(16, 8, 2.0), Buckets(16, 4, 3.0)]
        for kind in (listing_of, content_of):
            assert len({kind(root, 16, buckets) for buckets in chosen}) == 4
        assert image_folder(root, 16, self.BUCKETS).fingerprint == content_of(root, 16, self.BUCKETS)

    def test_groups_are_the_images_of_each_size(self, folder, images):
        found = groups(image_folder(folder(images), 16, self.BUCKETS).sizes)
        assert [index.tolist() for index in found] == [[1, 4], [0, 3], [2]]  # of 12x20, 16x16, 20x12


def read_one(folder, image: Image.Image, **options) -> list[int]:
    """The colour of a plain image after reading, which must be plain too."""
    root = folder({})
    root.mkdir(exist_ok=True)
    image.save(root / "1.png", **options)
    pixels = image_folder(root, 8).read([0])[0]
    assert (pixels == pixels[:, :1, :1]).all()
    return pixels[:, 0, 0].tolist()


class TestColours:
    # 127 = 255 * (1 - 128/255): half of black on white.
    @pytest.mark.parametrize(
        "mode, colour, expected",
        [
            ("RGB", (10, 20, 30), [10, 20, 30]),
            ("L", 77, [77, 77, 77]),
            ("1", 1, [255, 255, 255]),
            ("RGBA", (255, 0, 0, 0), [255, 255, 255]),
            ("RGBA", (0, 0, 0, 128), [127, 127, 127]),
            ("RGBA", (1, 2, 3, 255), [1, 2, 3]),
            ("LA", (0, 128), [127, 127, 127]),
        ],
    )
    def test_every_mode_becomes_rgb_on_white(self, folder, mode, colour, expected):
        assert read_one(folder, Image.new(mode, (16, 16), colour)) == expected

    def test_palettes_with_and_without_transparency(self, folder):
        image = Image.new("P", (16, 16), 3)
        image.putpalette([0, 0, 0] * 3 + [10, 20, 30])
        assert read_one(folder, image) == [10, 20, 30]
        assert read_one(folder, image, transparency=3) == [255, 255, 255]

    @pytest.mark.parametrize("level", [0, 1, 128, 254, 255])
    def test_sixteen_bit_grey_is_scaled_not_clipped(self, folder, level):
        assert read_one(folder, Image.fromarray(np.full((16, 16), level * 257, np.uint16))) == [level] * 3


def png(bits: int, kind: int, rows: list[bytes], transparent: bytes) -> bytes:
    """A PNG of 8x8 pixels with a tRNS chunk, by the PNG specification; Pillow writes no depths but 8 and 16 bits."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", 8, 8, bits, kind, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    chunks = [(b"IHDR", header), (b"tRNS", transparent), (b"IDAT", pixels), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*one) for one in chunks)


GREY, RGB = 0, 2
# Depth, kind, rows whose left half has one colour and right half another, the transparent colour: the left one. Then the right
# one as 8 bits a channel: 2 bits are steps of 85, 4 bits of 17, 16 bits of 257.
TRANSPARENT = {
    "1 bit": (1, GREY, b"\x0f", ">H", (0,), [255, 255, 255]),
    "2 bits": (2, GREY, bytes([0b01010101, 0b10101010]), ">H", (1,), [170, 170, 170]),
    "4 bits": (4, GREY, bytes([0x33] * 2 + [0xA1 & 0xF0 | 0xA] * 2), ">H", (3,), [170, 170, 170]),
    "8 bits": (8, GREY, bytes([10] * 4 + [20] * 4), ">H", (10,), [20, 20, 20]),
    "16 bits": (16, GREY, struct.pack(">8H", *[2571] * 4, *[5140] * 4), ">H", (2571,), [20, 20, 20]),
    "rgb": (8, RGB, bytes([1, 2, 3] * 4 + [1, 2, 4] * 4), ">3H", (1, 2, 3), [1, 2, 4]),
    "rgb of 16 bits": (
        16,
        RGB,
        struct.pack(">24H", *[256, 512, 770] * 4, *[256, 512, 1024] * 4),
        ">3H",
        (256, 512, 770),
        [1, 2, 4],
    ),
}


@pytest.mark.parametrize("name", TRANSPARENT)
def test_the_transparent_colour_of_a_png_becomes_white(tmp_path, name):
    bits, kind, row, form, transparent, right = TRANSPARENT[name]
    (tmp_path / "1.png").write_bytes(png(bits, kind, [row] * 8, struct.pack(form, *transparent)))
    pixels = image_folder(tmp_path, 8).read([0])[0].permute(1, 2, 0)
    assert (pixels[:, :4] == 255).all()
    assert pixels[:, 4:].unique(dim=0).reshape(-1, 3).unique(dim=0).tolist() == [right]


def test_a_camera_that_was_held_upright_gives_an_upright_image(tmp_path):
    """JPEG keeps the pixels as the sensor saw them and notes how the camera was held; 6 is a quarter turn."""
    pixels = np.zeros((16, 32, 3), dtype=np.uint8)
    pixels[:, :16] = (255, 0, 0)
    image, exif = Image.fromarray(pixels), Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    source = image_folder(tmp_path, 16, Buckets(16, 4, 2.0))
    height, width = source.sizes[0].tolist()
    assert height > width
    seen = source.read([0])[0].float()
    assert seen[0, : height // 3].mean() > 200 > 60 > seen[0, -height // 3 :].mean()  # the left has become the top
    assert source.frames([0])[0, :2].tolist() == [32, 16]


def test_images_that_are_known_are_not_opened_again(folder, tmp_path, audited):
    root, buckets = (
        folder({f"{i}.png": noise_image(i, shape) for i, shape in enumerate([(16, 16), (50, 30), (33, 61)])}),
        Buckets(16, 4, 2.0),
    )

    def read() -> tuple[list, str, list[str]]:
        with audited("open") as opened:
            source = image_folder(root, 16, buckets, cache=tmp_path / "cache")
            frames = source.frames(range(3)).tolist()
        return (
            frames,
            source.fingerprint,
            sorted({Path(path).name for path, *_ in opened if str(path).endswith(".png")}),
        )

    plain = image_folder(root, 16, buckets)
    expected = (plain.frames(range(3)).tolist(), plain.fingerprint)
    assert read() == (*expected, ["0.png", "1.png", "2.png"])
    assert read() == (*expected, [])
    noise_image(7, (30, 50)).save(root / "1.png")
    frames, fingerprint, opened = read()
    assert frames[1] != expected[0][1] and frames[0] == expected[0][0] and fingerprint != expected[1]
    assert opened == ["0.png", "1.png", "2.png"]
