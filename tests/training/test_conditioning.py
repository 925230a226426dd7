from __future__ import annotations

import pytest
import torch

from repa_lab.data import DataError
from repa_lab.data.cache import TextCache
from repa_lab.data.crop import Buckets
from repa_lab.data.sources import Flips, ImageFolder
from repa_lab.models.families import FAMILIES
from repa_lab.training.data import Captions, Labels
from tests.data.conftest import noise_image

# Width and height; of the sizes 20x12, 16x16 and 12x20 the images have (height x width) 16x16, 12x20, 20x12 and 16x16.
SHAPES = [(16, 16), (50, 30), (33, 61), (24, 22)]
TEXTS = ["a cat", "", "two dogs", "an eel"]


def kept(*flags: int) -> torch.Tensor:
    return torch.tensor(flags, dtype=torch.bool)


class TestLabels:
    labels = torch.tensor([4, 0, 2, 2, 1])

    def test_are_those_of_the_images_and_none_where_dropped(self):
        conditioning = Labels(self.labels, null=5, classes=5)
        found = conditioning(torch.tensor([2, 0, 4]), kept(0, 1, 0))
        assert found.keys() == {"y"}
        assert found["y"].tolist() == [2, 5, 1]
        assert found["y"].dtype == torch.int64
        assert self.labels.tolist() == [4, 0, 2, 2, 1]

    def test_samples_take_the_classes_in_turn(self):
        conditioning = Labels(self.labels, null=1000, classes=3, name="class_labels")
        assert conditioning.of_samples([2, 0, 1])["class_labels"].tolist() == [2, 0, 1]
        assert conditioning.of_samples(range(2, 5), dropped=True)["class_labels"].tolist() == [1000] * 3
        assert conditioning(torch.tensor([0]), kept(1))["class_labels"].tolist() == [1000]


def encode(texts) -> dict[str, torch.Tensor]:
    """Tensors that tell their text: its length everywhere, a mask of so many words, and in half precision its first letter."""
    lengths = torch.tensor([float(len(text)) for text in texts])
    words = torch.tensor([len(text.split()) for text in texts])
    return {
        "encoder_hidden_states": lengths.view(-1, 1, 1).expand(-1, 5, 3).clone(),
        "text_embeds": torch.tensor([float(ord(text[:1] or "0")) for text in texts]).unsqueeze(1).half(),
        "mask": (torch.arange(5) < words.unsqueeze(1)).long(),
    }


class TestCaptions:
    @pytest.fixture
    def source(self, tmp_path):
        root = tmp_path / "images"
        root.mkdir()
        for i, (shape, text) in enumerate(zip(SHAPES, TEXTS, strict=True)):
            noise_image(i, shape).save(root / f"{i}.png")
            (root / f"{i}.txt").write_text(text)
        return ImageFolder(root, 16, Buckets(16, 4, 2.0))

    @pytest.fixture
    def texts(self, tmp_path):
        cache = TextCache(tmp_path / "texts", {"kind": "test"})
        cache.build([*TEXTS, "a prompt"], encode, 2)
        return cache

    def make(self, source, texts, sizes=None, train=(0, 2, 3)) -> Captions:
        return Captions(source, torch.tensor(train), texts, sizes, None)

    def test_are_those_of_the_images(self, source, texts):
        found = self.make(source, texts)(torch.tensor([2, 0, 3, 2]), kept(0, 0, 0, 0))
        assert found.keys() == {"encoder_hidden_states", "text_embeds", "mask"}
        assert torch.equal(found["encoder_hidden_states"], torch.tensor([8.0, 5, 6, 8]).view(4, 1, 1).expand(4, 5, 3))
        assert found["mask"].tolist() == [[1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 0, 0, 0]]
        assert found["text_embeds"].flatten().tolist() == [ord(letter) for letter in "taat"]

    def test_what_is_dropped_has_the_empty_caption(self, source, texts):
        conditioning = self.make(source, texts)
        found = conditioning(torch.tensor([2, 0, 3]), kept(1, 0, 1))
        assert found["encoder_hidden_states"][:, 0, 0].tolist() == [0, 5, 0]
        assert found["mask"].sum(1).tolist() == [0, 2, 0]
        empty = conditioning(torch.tensor([1, 1]), kept(0, 1))  # an image without a caption is as one that is dropped
        for value in empty.values():
            assert torch.equal(value[0], value[1])

    def test_floats_are_float32_and_masks_stay_whole_numbers(self, source, texts):
        conditioning = self.make(source, texts, sizes=FAMILIES["sdxl"].pipeline.sizes)
        for found in (
            conditioning(torch.tensor([0]), kept(0)),
            conditioning.of_samples(range(1)),
            conditioning.of_texts([""]),
        ):
            for name, value in found.items():
                assert value.dtype == (torch.int64 if name == "mask" else torch.float32), name

    def test_sdxl_is_told_the_sizes_in_its_order_whether_or_not_the_text_is_dropped(self, source, texts):
        conditioning = self.make(source, texts, sizes=FAMILIES["sdxl"].pipeline.sizes)
        found = conditioning(torch.tensor([2, 1, 0, 3]), kept(1, 0, 0, 0))
        assert found["time_ids"].tolist() == [
            # Original height and width, top and left of the cut, height and width.
            [61, 33, 1, 0, 20, 12],
            [30, 50, 0, 0, 12, 20],
            [16, 16, 0, 0, 16, 16],
            [22, 24, 0, 0, 16, 16],
        ]
        assert found["encoder_hidden_states"][:, 0, 0].tolist() == [0, 0, 5, 6]

    def test_a_family_without_sizes_is_told_none(self, source, texts):
        assert "time_ids" not in self.make(source, texts)(torch.tensor([0]), kept(0))

    def test_samples_take_the_training_captions_and_no_sizes(self, source, texts):
        conditioning = self.make(source, texts, sizes=FAMILIES["sdxl"].pipeline.sizes)
        assert conditioning.kinds == 3
        found = conditioning.of_samples([1, 2, 0, 1, 2])
        assert found["encoder_hidden_states"][:, 0, 0].tolist() == [8, 6, 5, 8, 6]  # images 2, 3, 0, 2, 3
        assert "time_ids" not in found
        null = conditioning.of_samples([1, 2, 0, 1, 2], dropped=True)
        assert null.keys() == found.keys()
        assert null["encoder_hidden_states"].abs().max() == 0
        assert len(null["mask"]) == 5

    def test_prompts_are_encoded_ahead_of_time_or_refused(self, source, texts):
        conditioning = self.make(source, texts)
        assert conditioning.of_texts(["a prompt", "a cat"])["encoder_hidden_states"][:, 0, 0].tolist() == [8, 5]
        with pytest.raises(DataError, match="the cached embedding of 'another' is missing"):
            conditioning.of_texts(["a prompt", "another"])

    def test_a_mirrored_image_has_its_images_caption_and_sizes(self, source, texts):
        conditioning = self.make(Flips(source), texts, sizes=FAMILIES["sdxl"].pipeline.sizes)
        found = conditioning(torch.tensor([2, 6]), kept(0, 0))
        for value in found.values():
            assert torch.equal(value[0], value[1])
