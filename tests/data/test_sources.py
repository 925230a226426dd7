from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from repa_lab.data import DataError
from repa_lab.data.sources import Digits, Flips, split
from tests.data.conftest import image_folder, noise_image


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

    @pytest.mark.parametrize(
        "index", [[5, 3, 3], range(2, 5), torch.tensor([5, 3, 3])], ids=["list", "range", "tensor"]
    )
    def test_are_read_by_any_index_in_its_order(self, index):
        digits, everything = Digits(), load_digits().images
        for pixels, i in zip(digits.read(index), index, strict=True):
            assert np.array_equal((pixels[0].numpy() / 255 * 16).round(), everything[int(i)])


class TestFlips:
    def test_the_second_half_are_the_images_mirrored_left_to_right(self, folder):
        images = {f"{name}/{i}.png": noise_image(i) for i, name in enumerate("abb")}
        flips = Flips(image_folder(folder(images, dict.fromkeys(images, "") | {"b/1.png": "one"}), 20))
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
        digits, other = Digits(), image_folder(folder({"1.png": noise_image(0)}), 8)
        assert len({digits.fingerprint, Flips(digits).fingerprint, Flips(other).fingerprint}) == 3
        assert Flips(digits).fingerprint == Flips(Digits()).fingerprint
        assert list(Flips(digits).captions) == []


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
