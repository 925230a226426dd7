from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from repa_lab.data.fingerprint import DataError, fingerprint_content
from repa_lab.data.sources import Digits, Flips, ImageFolder, center_crop, split
from tests.data.conftest import noise_image


class TestDigits:
    def test_are_scikit_learns_scans_on_0_to_255(self):
        bunch, digits = load_digits(), Digits()
        pixels = digits.read(range(len(digits)))
        assert (pixels.shape, pixels.dtype) == ((1797, 1, 8, 8), torch.uint8)
        level_of = [0, 16, 32, 48, 64, 80, 96, 112, 128, 143, 159, 175, 191, 207, 223, 239, 255]
        assert np.array_equal(pixels[:, 0].numpy(), np.array(level_of)[bunch.images.astype(int)])
        assert digits.labels.tolist() == bunch.target.tolist()

    def test_every_class_is_there(self):
        digits = Digits()
        assert digits.labels.unique().tolist() == list(range(digits.num_classes))

    @pytest.mark.parametrize("index", [[5, 3, 3], range(2, 5), torch.tensor([5, 3, 3])], ids=["list", "range", "tensor"])
    def test_are_read_by_any_index_in_its_order(self, index):
        digits, everything = Digits(), load_digits().images
        for pixels, i in zip(digits.read(index), index, strict=True):
            assert np.array_equal((pixels[0].numpy() / 255 * 16).round(), everything[int(i)])


class TestImageFolder:
    def test_classes_are_subfolders_in_alphabetical_order(self, folder):
        root = folder({"b/x.png": noise_image(0), "a/y.png": noise_image(1), "c/deep/z.png": noise_image(2)})
        source = ImageFolder(root, 20)
        assert (len(source), source.num_classes) == (3, 3)
        assert source.labels.tolist() == [0, 1, 2]
        assert source.labels.dtype == torch.int64
        assert source.fingerprint == fingerprint_content(root, 20)

    def test_pixels_are_those_of_the_files(self, folder):
        images = {f"{i}.png": noise_image(i) for i in range(3)}
        pixels = ImageFolder(folder(images), 20).read([2, 0])
        assert (pixels.shape, pixels.dtype) == ((2, 3, 20, 20), torch.uint8)
        for read, name in zip(pixels, ("2.png", "0.png"), strict=True):
            assert np.array_equal(read.permute(1, 2, 0).numpy(), np.asarray(images[name]))

    def test_images_beside_each_other_are_one_class(self, folder):
        source = ImageFolder(folder({"1.png": noise_image(0), "2.png": noise_image(1)}), 8)
        assert (source.num_classes, source.labels.tolist()) == (1, [0, 0])

    def test_captions_follow_the_images_and_default_to_empty(self, folder):
        images = {"b/1.png": noise_image(0), "a.png": noise_image(1), "c.png": noise_image(2)}
        root = folder(images, {"b/1.png": "ß", "c.png": "x"})
        assert list(ImageFolder(root, 8).captions) == ["", "ß", "x"]
        (root / "metadata.jsonl").unlink()
        assert list(ImageFolder(root, 8).captions) == []

    def test_captions_may_hold_unicode_line_separators(self, folder):
        text = "one\u2028two\u0085three"
        assert ImageFolder(folder({"1.png": noise_image(0)}, {"1.png": text}), 8).captions == [text]

    def test_blank_lines_and_windows_line_ends_are_no_rows(self, folder):
        root = folder({"1.png": noise_image(0)})
        (root / "metadata.jsonl").write_bytes(b'{"file_name": "1.png", "text": "x"}\r\n\r\n')
        assert ImageFolder(root, 8).captions == ["x"]

    @pytest.mark.parametrize("line", ["no json", '{"file_name": "1.png"}', '["1.png"]', '{"text": "x"}'])
    def test_a_bad_caption_row_is_named_by_its_line(self, folder, line):
        root = folder({"1.png": noise_image(0)}, {"1.png": "fine"})
        with (root / "metadata.jsonl").open("a") as file:
            file.write(line)
        with pytest.raises(DataError, match=r"metadata\.jsonl:2: expected a JSON object with 'file_name' and 'text'"):
            ImageFolder(root, 8)

    def test_captions_of_missing_images_are_refused(self, folder):
        root = folder({"1.png": noise_image(0)}, {"1.png": "x", "3.png": "y", "2.png": "z"})
        with pytest.raises(DataError, match=r"names '2.png', which is not in the folder \(2 such\)"):
            ImageFolder(root, 8)

    @pytest.mark.parametrize("damage", [lambda raw: b"", lambda raw: raw[:200], lambda raw: b"hello"])
    def test_an_unreadable_image_is_named(self, folder, damage):
        root = folder({"1.png": noise_image(0), "2.png": noise_image(1)})
        (root / "2.png").write_bytes(damage((root / "2.png").read_bytes()))
        source = ImageFolder(root, 8)
        assert source.read([0]).shape == (1, 3, 8, 8)
        with pytest.raises(DataError, match=r"cannot read the image '.*2\.png'") as caught:
            source.read([1])
        assert caught.value.field == "path"


def read_one(folder, image: Image.Image, **options) -> list[int]:
    """The colour of a plain image after reading, which must be plain too."""
    root = folder({})
    root.mkdir(exist_ok=True)
    image.save(root / "1.png", **options)
    pixels = ImageFolder(root, 8).read([0])[0]
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


class TestFlips:
    def test_the_second_half_are_the_images_mirrored_left_to_right(self, folder):
        images = {f"{name}/{i}.png": noise_image(i) for i, name in enumerate("abb")}
        flips = Flips(ImageFolder(folder(images, {"b/1.png": "one"}), 20))
        assert len(flips) == 6
        pixels = flips.read(range(6)).permute(0, 2, 3, 1).numpy()
        for i, image in enumerate(images.values()):
            assert np.array_equal(pixels[i], np.asarray(image))
            assert np.array_equal(pixels[3 + i], np.asarray(image)[:, ::-1])
        assert flips.labels.tolist() == [0, 1, 1] * 2
        assert list(flips.captions) == ["", "one", ""] * 2
        assert (flips.channels, flips.side, flips.num_classes) == (3, 20, 2)

    @pytest.mark.parametrize("index", [[1800, 3, 3, 0], range(1795, 1800), torch.tensor([3593, 1796])])
    def test_both_versions_are_read_by_any_index_in_its_order(self, index):
        digits = Digits()
        whole = np.concatenate([digits.read(range(1797)).numpy(), digits.read(range(1797)).numpy()[..., ::-1]])
        assert np.array_equal(Flips(digits).read(index).numpy(), whole[np.asarray(index)])

    def test_are_another_data_set_and_stay_without_captions(self, folder):
        digits, other = Digits(), ImageFolder(folder({"1.png": noise_image(0)}), 8)
        assert len({digits.fingerprint, Flips(digits).fingerprint, Flips(other).fingerprint}) == 3
        assert Flips(digits).fingerprint == Flips(Digits()).fingerprint
        assert list(Flips(digits).captions) == []


def bicubic(rows: np.ndarray, count: int) -> np.ndarray:
    """Keys' cubic (a = -1/2) along the first axis, widened to the scale when it shrinks, as Pillow documents it."""
    scale = len(rows) / count
    width = max(scale, 1.0)
    distance = np.abs((np.arange(len(rows)) + 0.5)[None] - ((np.arange(count) + 0.5) * scale)[:, None]) / width
    inner, outer = 1.5 * distance**3 - 2.5 * distance**2 + 1, -0.5 * distance**3 + 2.5 * distance**2 - 4 * distance + 2
    weights = np.where(distance < 1, inner, np.where(distance < 2, outer, 0.0))
    return np.tensordot(weights / weights.sum(axis=1, keepdims=True), rows, axes=1)


class TestCenterCrop:
    @pytest.mark.parametrize("size", [(8, 8), (9, 31), (31, 9), (16, 16), (17, 15), (5, 7), (1, 3), (100, 33), (333, 250)])
    @pytest.mark.parametrize("side", [8, 7])
    def test_is_exactly_of_the_asked_size(self, size, side):
        assert center_crop(noise_image(0, size), side).size == (side, side)

    def test_an_image_of_that_size_is_untouched(self):
        image = noise_image(0, (8, 8))
        assert np.array_equal(np.asarray(center_crop(image, 8)), np.asarray(image))

    def test_the_margin_is_floored_on_the_left_and_top(self):
        image = noise_image(0, (13, 8))
        assert np.array_equal(np.asarray(center_crop(image, 8)), np.asarray(image)[:, 2:10])
        upright = image.transpose(Image.Transpose.TRANSPOSE)
        assert np.array_equal(np.asarray(center_crop(upright, 8)), np.asarray(upright)[2:10])

    def test_twice_the_size_is_halved_by_the_mean_of_four(self):
        # Multiples of 4 have whole means, so rounding between Pillow's two passes cannot blur the comparison.
        pixels = np.random.default_rng(0).integers(0, 64, (16, 26, 3)).astype(np.uint8) * 4
        means = pixels.reshape(8, 2, 13, 2, 3).mean(axis=(1, 3)).astype(np.uint8)
        assert np.array_equal(np.asarray(center_crop(Image.fromarray(pixels), 8)), means[:, 2:10])

    def test_four_times_the_size_is_halved_twice(self):
        pixels = np.random.default_rng(1).integers(0, 16, (32, 32)).astype(np.uint8) * 16
        means = pixels.reshape(8, 4, 8, 4).mean(axis=(1, 3)).astype(np.uint8)
        assert np.array_equal(np.asarray(center_crop(Image.fromarray(pixels), 8)), means)

    @pytest.mark.parametrize("size", [12, 15, 5])
    def test_less_than_twice_the_size_is_bicubic(self, size):
        pixels = np.random.default_rng(2).integers(60, 190, (size, size)).astype(np.uint8)  # far from the ends: no clipping
        expected = bicubic(bicubic(pixels.astype(float), 8).T, 8).T
        cropped = np.asarray(center_crop(Image.fromarray(pixels), 8)).astype(float)
        assert np.abs(cropped - expected).max() <= 1  # two roundings of half a level

    def test_halving_comes_before_the_bicubic_step(self):
        pixels = np.random.default_rng(3).integers(15, 48, (20, 20)).astype(np.uint8) * 4
        means = pixels.reshape(10, 2, 10, 2).mean(axis=(1, 3))
        cropped = np.asarray(center_crop(Image.fromarray(pixels), 8)).astype(float)
        assert np.abs(cropped - bicubic(bicubic(means, 8).T, 8).T).max() <= 1
        assert np.abs(cropped - bicubic(bicubic(pixels.astype(float), 8).T, 8).T).max() > 1  # what bicubic alone would give

    def test_the_long_side_is_rounded(self):
        # 10x7 to side 8: 10 * 8/7 = 11.43 is resized to 11 wide, and 1 of the 3 columns too many goes on the left.
        pixels = np.random.default_rng(4).integers(60, 190, (7, 10)).astype(np.uint8)
        expected = bicubic(bicubic(pixels.astype(float), 8).T, 11).T[:, 1:9]
        assert np.abs(np.asarray(center_crop(Image.fromarray(pixels), 8)).astype(float) - expected).max() <= 1


class TestSplit:
    def test_is_disjoint_complete_and_ascending(self):
        parts = split(1797, 256)
        assert len(parts.held_out) == 256
        assert torch.cat([parts.train, parts.held_out]).sort().values.tolist() == list(range(1797))
        for part in (parts.train, parts.held_out):
            assert (part.diff() > 0).all()

    def test_does_not_depend_on_any_seed(self):
        torch.manual_seed(1)
        first = split(100, 10)
        torch.manual_seed(2)
        np.random.seed(2)
        second = split(100, 10)
        assert torch.equal(first.held_out, second.held_out)

    def test_is_pinned(self):
        assert split(1797, 256).held_out[:6].tolist() == [12, 20, 28, 53, 68, 72]

    def test_a_larger_holdout_holds_the_smaller(self):
        assert set(split(100, 10).held_out.tolist()) < set(split(100, 20).held_out.tolist())

    def test_is_drawn_from_everywhere(self):
        # Of 1,797 images 256 held out at random have a mean index of 898 with a standard deviation of 30.
        assert abs(split(1797, 256).held_out.float().mean() - 898) < 120

    @pytest.mark.parametrize("holdout", [10, 11])
    def test_something_must_be_left_to_train_on(self, holdout):
        with pytest.raises(DataError, match=f"holding out {holdout} of 10 images leaves none") as caught:
            split(10, holdout)
        assert caught.value.field == "holdout"
        assert len(split(10, 9).train) == 1
