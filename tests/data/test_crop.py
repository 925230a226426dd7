from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from repa_lab.data import DataError
from repa_lab.data.crop import Buckets, crop, framing
from tests.data.conftest import noise_image


def bicubic(rows: np.ndarray, count: int) -> np.ndarray:
    """Keys' cubic (a = -1/2) along the first axis, widened to the scale when it shrinks, as Pillow documents it."""
    scale = len(rows) / count
    width = max(scale, 1.0)
    distance = np.abs((np.arange(len(rows)) + 0.5)[None] - ((np.arange(count) + 0.5) * scale)[:, None]) / width
    inner, outer = 1.5 * distance**3 - 2.5 * distance**2 + 1, -0.5 * distance**3 + 2.5 * distance**2 - 4 * distance + 2
    weights = np.where(distance < 1, inner, np.where(distance < 2, outer, 0.0))
    return np.tensordot(weights / weights.sum(axis=1, keepdims=True), rows, axes=1)


class TestCenterCrop:
    @pytest.mark.parametrize(
        "size", [(8, 8), (9, 31), (31, 9), (16, 16), (17, 15), (5, 7), (1, 3), (100, 33), (333, 250)]
    )
    @pytest.mark.parametrize("side", [8, 7])
    def test_is_exactly_of_the_asked_size(self, size, side):
        assert crop(noise_image(0, size), (side, side)).size == (side, side)

    def test_an_image_of_that_size_is_untouched(self):
        image = noise_image(0, (8, 8))
        assert np.array_equal(np.asarray(crop(image, (8, 8))), np.asarray(image))

    def test_the_margin_is_floored_on_the_left_and_top(self):
        image = noise_image(0, (13, 8))
        assert np.array_equal(np.asarray(crop(image, (8, 8))), np.asarray(image)[:, 2:10])
        upright = image.transpose(Image.Transpose.TRANSPOSE)
        assert np.array_equal(np.asarray(crop(upright, (8, 8))), np.asarray(upright)[2:10])

    def test_twice_the_size_is_halved_by_the_mean_of_four(self):
        # Multiples of 4 have whole means, so rounding between Pillow's two passes cannot blur the comparison.
        pixels = np.random.default_rng(0).integers(0, 64, (16, 26, 3)).astype(np.uint8) * 4
        means = pixels.reshape(8, 2, 13, 2, 3).mean(axis=(1, 3)).astype(np.uint8)
        assert np.array_equal(np.asarray(crop(Image.fromarray(pixels), (8, 8))), means[:, 2:10])

    def test_four_times_the_size_is_halved_twice(self):
        pixels = np.random.default_rng(1).integers(0, 16, (32, 32)).astype(np.uint8) * 16
        means = pixels.reshape(8, 4, 8, 4).mean(axis=(1, 3)).astype(np.uint8)
        assert np.array_equal(np.asarray(crop(Image.fromarray(pixels), (8, 8))), means)

    @pytest.mark.parametrize("size", [12, 15, 5])
    def test_less_than_twice_the_size_is_bicubic(self, size):
        pixels = (
            np.random.default_rng(2).integers(60, 190, (size, size)).astype(np.uint8)
        )  # far from the ends: no clipping
        expected = bicubic(bicubic(pixels.astype(float), 8).T, 8).T
        cropped = np.asarray(crop(Image.fromarray(pixels), (8, 8))).astype(float)
        assert np.abs(cropped - expected).max() <= 1  # two roundings of half a level

    def test_halving_comes_before_the_bicubic_step(self):
        pixels = np.random.default_rng(3).integers(15, 48, (20, 20)).astype(np.uint8) * 4
        means = pixels.reshape(10, 2, 10, 2).mean(axis=(1, 3))
        cropped = np.asarray(crop(Image.fromarray(pixels), (8, 8))).astype(float)
        assert np.abs(cropped - bicubic(bicubic(means, 8).T, 8).T).max() <= 1
        assert (
            np.abs(cropped - bicubic(bicubic(pixels.astype(float), 8).T, 8).T).max() > 1
        )  # what bicubic alone would give

    def test_the_long_side_is_rounded(self):
        # 10x7 to side 8: 10 * 8/7 = 11.43 is resized to 11 wide, and 1 of the 3 columns too many goes on the left.
        pixels = np.random.default_rng(4).integers(60, 190, (7, 10)).astype(np.uint8)
        expected = bicubic(bicubic(pixels.astype(float), 8).T, 11).T[:, 1:9]
        assert np.abs(np.asarray(crop(Image.fromarray(pixels), (8, 8))).astype(float) - expected).max() <= 1


class TestFraming:
    # By hand: the frame is original height and width, top and left of the cut, target height and width.
    CASES = (
        # 1.95 times too high: no halving. Covered by 0.512: 512x819.2, of whose 819 columns 51 are too many.
        ((1000, 1600), (512, 768), 0, (512, 819), (1000, 1600, 0, 25, 512, 768)),
        # 4.1 and 3.9 times too large: halved once to 1050x1500. Covered by 0.512: 537.6x768, 26 rows too many.
        ((2100, 3000), (512, 768), 1, (538, 768), (2100, 3000, 13, 0, 512, 768)),
        # Halving rounds down: 3001 -> 1500, and the aspect is then the target's own.
        ((3001, 1000), (768, 256), 1, (768, 256), (3001, 1000, 0, 0, 768, 256)),
        # Enlarged by 2.56: 256x230.4.
        ((100, 90), (256, 192), 0, (256, 230), (100, 90, 0, 19, 256, 192)),
        # Exactly twice as large is halved; 8 times as large three times.
        ((16, 26), (8, 8), 1, (8, 13), (16, 26, 0, 2, 8, 8)),
        ((64, 96), (8, 12), 3, (8, 12), (64, 96, 0, 0, 8, 12)),
        # An upright image for a wide target loses most of its rows: 16x8 -> 32x16, 24 rows too many.
        ((16, 8), (8, 16), 0, (32, 16), (16, 8, 12, 0, 8, 16)),
    )

    @pytest.mark.parametrize("original, size, halvings, resized, frame", CASES)
    def test_by_hand(self, original, size, halvings, resized, frame):
        how = framing(original, size)
        assert (how.halvings, how.resized, how.frame) == (halvings, resized, frame)

    def test_covers_the_size_and_no_more_than_it_must(self):
        draw = np.random.default_rng(0)
        for height, width, high, wide in draw.integers(1, 700, (2000, 4)).tolist():
            how = framing((height, width), (high, wide))
            assert min(how.resized[0] - high, how.resized[1] - wide) == 0  # one side is cut nowhere
            assert how.frame[2:4] == ((how.resized[0] - high) // 2, (how.resized[1] - wide) // 2)
            halved = (height >> how.halvings, width >> how.halvings)
            assert min(halved[0] / high, halved[1] / wide) < 2
            assert how.halvings == 0 or min(halved[0] / high, halved[1] / wide) >= 0.5

    @pytest.mark.parametrize("original", [(9, 31), (31, 9), (333, 250), (7, 5), (100, 33)])
    def test_turning_an_image_and_its_target_turns_the_frame(self, original):
        for size in ((8, 8), (8, 16), (24, 8)):
            how, turned = framing(original, size), framing(original[::-1], size[::-1])
            assert turned.resized == how.resized[::-1]
            assert turned.frame[2:4] == how.frame[2:4][::-1]


class TestCropToAnySize:
    @pytest.mark.parametrize("size", [(8, 12), (12, 8), (7, 21), (5, 64)])
    @pytest.mark.parametrize("original", [(16, 16), (9, 31), (31, 9), (5, 7), (100, 33)])  # width, height
    def test_is_exactly_of_the_asked_size(self, size, original):
        cropped = crop(noise_image(0, original), size)
        assert (cropped.height, cropped.width) == size

    def test_the_frame_says_where_the_cut_is(self):
        image = noise_image(0, (30, 20))
        how = framing((20, 30), (20, 12))
        assert how.frame == (20, 30, 0, 9, 20, 12)
        assert np.array_equal(np.asarray(crop(image, (20, 12))), np.asarray(image)[:, 9:21])
        upright = image.transpose(Image.Transpose.TRANSPOSE)
        assert framing((30, 20), (12, 20)).frame == (30, 20, 9, 0, 12, 20)
        assert np.array_equal(np.asarray(crop(upright, (12, 20))), np.asarray(upright)[9:21])

    def test_halves_by_the_mean_of_four_while_both_sides_are_twice_too_large(self):
        pixels = np.random.default_rng(0).integers(0, 64, (16, 40, 3)).astype(np.uint8) * 4
        means = pixels.reshape(8, 2, 20, 2, 3).mean(axis=(1, 3)).astype(np.uint8)
        assert np.array_equal(np.asarray(crop(Image.fromarray(pixels), (8, 12))), means[:, 4:16])

    def test_is_bicubic_where_it_is_no_halving(self):
        # 15x22 to 8x16: covered by 16/22, so 10.9 -> 11 rows, of which the second to the ninth stay.
        pixels = np.random.default_rng(2).integers(60, 190, (15, 22)).astype(np.uint8)
        expected = bicubic(bicubic(pixels.astype(float), 11).T, 16).T[1:9]
        assert np.abs(np.asarray(crop(Image.fromarray(pixels), (8, 16))).astype(float) - expected).max() <= 1


class TestBuckets:
    # By hand: of each width the greatest height within 1,024 x 1,024 pixels, and the same turned.
    SDXL = (
        (1408, 704), (1344, 768), (1280, 768), (1216, 832), (1152, 896), (1088, 960), (1024, 1024),
        (960, 1088), (896, 1152), (832, 1216), (768, 1280), (768, 1344), (704, 1408),
    )  # fmt: skip
    MANY = (
        Buckets(1024, 64, 2.0),
        Buckets(1024, 64, 4.0),
        Buckets(512, 8, 3.0),
        Buckets(256, 32, 1.5),
        Buckets(768, 64, 2.5),
    )
    many = pytest.mark.parametrize("buckets", MANY, ids=str)

    def test_by_hand(self):
        assert Buckets(1024, 64, 2.0).sizes == self.SDXL

    def test_has_the_sizes_that_sdxl_was_trained_with(self):
        # Of the paper's list (2307.01952, appendix I) those of about the whole area with aspects up to 2.
        theirs = {(1408, 704), (1344, 768), (1280, 768), (1216, 832), (1152, 896), (1088, 960), (1024, 1024)}
        assert {size for size in Buckets(1024, 64, 2.0).sizes if size[0] >= size[1]} == theirs

    @many
    def test_sizes_are_what_they_are_said_to_be(self, buckets):
        sizes = buckets.sizes
        assert len(set(sizes)) == len(sizes) >= 3
        for height, width in sizes:
            assert height % buckets.step == width % buckets.step == 0
            assert buckets.side**2 / 2 < height * width <= buckets.side**2
            assert max(height / width, width / height) <= buckets.max_aspect
            # One of the sides has no room for another step.
            assert max((height + buckets.step) * width, height * (width + buckets.step)) > buckets.side**2
        aspects = [width / height for height, width in sizes]
        assert aspects == sorted(aspects)
        assert len(set(aspects)) == len(aspects)

    @many
    def test_upright_and_wide_images_are_treated_alike(self, buckets):
        assert buckets.sizes == tuple((height, width) for width, height in reversed(buckets.sizes))

    @many
    def test_the_nearest_aspect_is_chosen(self, buckets):
        draw = np.random.default_rng(0)
        wanted = np.log([width / height for height, width in buckets.sizes])
        for height, width in draw.integers(1, 4000, (500, 2)).tolist():
            chosen = buckets.choose((height, width))
            nearest = np.abs(wanted - np.log(width / height)).min()
            assert abs(np.log(chosen[1] / chosen[0]) - np.log(width / height)) == pytest.approx(nearest, abs=1e-12)

    @many
    @pytest.mark.parametrize("original", [(1, 1), (300, 300), (5000, 5000)])
    def test_a_square_image_stays_square(self, buckets, original):
        assert buckets.choose(original) == (buckets.side, buckets.side)

    @pytest.mark.parametrize("original, expected", [
        ((1080, 1920), (768, 1344)),  # 16:9 is 1.78, the size 1.75
        ((1920, 1080), (1344, 768)),
        ((2000, 3000), (832, 1216)),  # 1.5: nearer to 1.46 than to 1.67
        ((3000, 4000), (896, 1152)),  # 1.33: nearer to 1.29 than to 1.46
        ((10, 10_000), (704, 1408)),
        ((10_000, 10), (1408, 704)),
        ((999, 1000), (1024, 1024)),
    ])  # fmt: skip
    def test_photographs_by_hand(self, original, expected):
        assert Buckets(1024, 64, 2.0).choose(original) == expected

    def test_an_aspect_of_1_leaves_the_square(self):
        assert Buckets(512, 64, 1.0).sizes == ((512, 512),)

    @pytest.mark.parametrize("side, step, aspect", [(32, 64, 2.0), (500, 64, 1.1), (100, 64, 1.0)])
    def test_steps_that_fit_nothing_are_refused(self, side, step, aspect):
        with pytest.raises(DataError) as caught:
            Buckets(side, step, aspect)
        assert str(caught.value) == (
            f"no size in steps of {step} px is of about the area of {side}x{side} px with aspects up to {aspect:g}; "
            "choose a smaller step"
        )
        assert caught.value.field == "buckets"
        assert Buckets(side, 16, 1.5).sizes
