"""The images of a run, what encoders see of them, and the labels and captions that denoisers are given."""

from __future__ import annotations

import datasets
import pytest
import torch

from repa_lab.align.settings import EncoderSettings
from repa_lab.data import DataError
from repa_lab.data.cache import TextCache
from repa_lab.data.crop import Buckets
from repa_lab.data.latents import LatentSpace, PixelSpace
from repa_lab.data.settings import SOURCES, SourceSettings
from repa_lab.data.sources import Flips, Split
from repa_lab.models.families import FAMILIES
from repa_lab.training.batches import Images, open_images, pixels_for
from repa_lab.training.evaluate import real_images
from repa_lab.training.model import Captions, Labels
from tests.data.autoencoders import tiny
from tests.data.conftest import image_folder, noise_image
from tests.data.test_space import save_vae


@pytest.fixture
def folder(tmp_path):
    for name in ("a/1", "a/2", "b/3", "b/4", "b/5"):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        noise_image(int(name[-1]), (20, 24)).save(tmp_path / "images" / f"{name}.png")
    return tmp_path / "images"


def config(**settings) -> SourceSettings:
    return SOURCES[settings["source"]].settings.model_validate(settings)


def test_digits(tmp_path):
    images = open_images(config(source="digits", holdout=97), tmp_path)
    assert (len(images.split.train), len(images.split.held_out)) == (1700, 97)
    assert isinstance(images.space, PixelSpace)
    assert (images.input.channels, images.input.size, images.input.num_classes) == (1, (8, 8), 10)


def test_a_folder_at_its_resolution(folder, tmp_path):
    images = open_images(config(source="imagefolder", path=str(folder), resolution=16, holdout=2), tmp_path)
    assert (images.input.channels, images.input.size, images.input.num_classes) == (3, (16, 16), 2)
    assert len(images.split.train) == 3


def test_a_folder_in_latents_announces_its_work(folder, tmp_path):
    save_vae(tmp_path / "vae")
    heard: list[tuple[str, int, int]] = []
    data = config(source="imagefolder", path=str(folder), resolution=16, holdout=2, vae=str(tmp_path / "vae"))
    images = open_images(data, tmp_path / "cache", lambda task: lambda done, total: heard.append((task, done, total)))
    assert heard[-1] == ("latents", 5, 5)
    assert isinstance(images.space, LatentSpace)
    assert (images.input.channels, images.input.size) == (4, (8, 8))
    assert images.space.encode(images.space.read(torch.tensor([0, 4])), None).shape == (2, 4, 8, 8)


@pytest.fixture
def latent(folder, tmp_path):
    """Settings of a data set with latents."""
    save_vae(tmp_path / "vae")
    return config(source="imagefolder", path=str(folder), resolution=16, holdout=2, vae=str(tmp_path / "vae"))


def test_flips_double_the_source_and_leave_the_split_alone(folder, latent, tmp_path):
    plain = open_images(latent, tmp_path / "cache")
    flipped = open_images(latent.model_copy(update={"flip": True}), tmp_path / "cache")
    assert (len(plain.base), len(plain.source)) == (5, 5)
    assert (len(flipped.base), len(flipped.source)) == (5, 10)
    assert torch.equal(flipped.split.train, plain.split.train)
    assert torch.equal(flipped.split.held_out, plain.split.held_out)
    assert flipped.input == plain.input
    pixels = image_folder(folder, 16).read([2])
    assert torch.equal(flipped.source.read([2, 7]), torch.cat([pixels, pixels.flip(-1)]))
    latents = flipped.space.encode(flipped.space.read(torch.tensor([2, 7])), None)
    torch.testing.assert_close(
        latents[:1], plain.space.encode(plain.space.read(torch.tensor([2])), None), rtol=1e-5, atol=1e-5
    )
    assert not torch.allclose(latents[0], latents[1], atol=1e-3)


def test_mirrored_arms_are_measured_against_the_same_images(folder, tmp_path):
    settings = {"source": "imagefolder", "path": str(folder), "resolution": 16, "holdout": 2}
    plain, flipped = (
        real_images(open_images(config(**settings, flip=flip), tmp_path / "cache")) for flip in (False, True)
    )
    assert (flipped.source, flipped.count, flipped.size) == (plain.source, 3, (16, 16))
    assert torch.equal(torch.cat([*flipped.batches()]), torch.cat([*plain.batches()]))


class TestPixels:
    def test_are_the_images_unless_told_otherwise(self, latent, tmp_path):
        images = open_images(latent, tmp_path / "cache")
        assert pixels_for(EncoderSettings(), images) is images.source

    def test_may_be_what_the_vae_gives_back(self, latent, tmp_path):
        images = open_images(latent, tmp_path / "cache")
        made = pixels_for(EncoderSettings(pixels="vae"), images)
        assert torch.equal(
            made.read(range(5)), images.space.decode(images.space.encode(images.space.read(torch.arange(5)), None))
        )
        assert made.fingerprint != images.source.fingerprint

    def test_may_be_what_a_tiny_autoencoder_makes_of_the_latents(self, latent, tmp_path):
        tae = tiny()
        tae.save_pretrained(tmp_path / "tae")
        images = open_images(latent, tmp_path / "cache")
        made = pixels_for(EncoderSettings(pixels="tae", tae=str(tmp_path / "tae")), images)
        with torch.no_grad():
            expected = tae.eval().decode(images.space.encode(images.space.read(torch.tensor([1, 4])), None)).sample
        assert (made.read([1, 4]) - (expected.clamp(-1, 1) + 1) * 127.5).abs().max() <= 0.501

    @pytest.mark.parametrize("kind", ["vae", "tae"])
    def test_without_latents_are_refused(self, folder, tmp_path, kind):
        data = config(source="imagefolder", path=str(folder), resolution=16, holdout=2)
        encoder = EncoderSettings(pixels=kind, tae="x" if kind == "tae" else None)
        with pytest.raises(DataError) as caught:
            pixels_for(encoder, open_images(data, tmp_path))
        assert str(caught.value) == (
            f"pixels: {kind} decodes latents, and there is no VAE; set data.vae, or pixels: image"
        )
        assert caught.value.field == "vae"

    def test_a_tiny_autoencoder_that_is_missing_or_of_other_latents_is_refused(self, latent, tmp_path):
        images = open_images(latent, tmp_path / "cache")
        tiny(latent_channels=16).save_pretrained(tmp_path / "wide")
        for name, match in (("wide", "decodes latents of 16 channels"), ("missing", "cannot load the TAE '.*missing'")):
            with pytest.raises(DataError, match=match) as caught:
                pixels_for(EncoderSettings(pixels="tae", tae=str(tmp_path / name)), images)
            assert caught.value.field == "tae"


@pytest.mark.parametrize("settings, match", [({}, r"set data\.path"), ({"path": "nowhere"}, "no folder 'nowhere'")])
def test_a_folder_must_be_given_and_be_there(tmp_path, settings, match):
    with pytest.raises(DataError, match=match) as caught:
        open_images(config(source="imagefolder", **settings), tmp_path)
    assert caught.value.field == "path"


def test_holding_out_everything_is_refused(folder, tmp_path):
    with pytest.raises(DataError, match="holding out 5 of 5") as caught:
        open_images(config(source="imagefolder", path=str(folder), resolution=16, holdout=5), tmp_path)
    assert caught.value.field == "holdout"


def test_a_saved_data_set_is_opened_with_its_column_of_captions(tmp_path):
    rows = {"image": [noise_image(i, (20, 24)) for i in range(5)], "note": list("abcde"), "text": list("vwxyz")}
    columns = {"image": datasets.Image(), "note": datasets.Value("string"), "text": datasets.Value("string")}
    datasets.Dataset.from_dict(rows, features=datasets.Features(columns)).save_to_disk(tmp_path / "data")
    data = config(source="datasets", path=str(tmp_path / "data"), resolution=16, holdout=2)
    images = open_images(data, tmp_path)
    assert (images.input.channels, images.input.size, images.input.num_classes) == (3, (16, 16), 1)
    assert images.source.captions == list("vwxyz")
    assert open_images(data.model_copy(update={"caption_column": "note"}), tmp_path).source.captions == list("abcde")
    assert images.source.fingerprint == data.describe().fingerprint


def test_buckets_keep_aspects_in_latents_too(folder, tmp_path):
    save_vae(tmp_path / "vae")
    settings = {
        "source": "imagefolder",
        "path": str(folder),
        "resolution": 16,
        "holdout": 2,
        "vae": str(tmp_path / "vae"),
    }
    square, kept = config(**settings), config(**settings, buckets={"step": 4, "max_aspect": 2.0})
    images = open_images(kept, tmp_path / "cache")
    # 24 high and 20 wide is 1.2: nearer to 1 (16x16) than to 1.67 (20x12); a taller one is added.
    assert images.source.sizes.tolist() == [[16, 16]] * 5
    noise_image(9, (20, 40)).save(folder / "b" / "6.png")
    images = open_images(kept, tmp_path / "cache")
    assert images.source.sizes.tolist() == [[16, 16]] * 5 + [[20, 12]]
    assert images.space.shape(torch.tensor([5])) == (4, 10, 6)
    assert images.space.encode(images.space.read(torch.tensor([5])), None).shape == (1, 4, 10, 6)
    assert open_images(square, tmp_path / "cache").source.sizes.tolist() == [[16, 16]] * 6
    assert len({one.describe().fingerprint for one in (square, kept, kept.model_copy(update={"resolution": 32}))}) == 3


def test_the_pipelines_vae_is_taken_where_none_is_named(folder, tmp_path):
    save_vae(tmp_path / "own")
    save_vae(tmp_path / "pipeline" / "vae", seed=1)
    (tmp_path / "pipeline" / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    settings = {"source": "imagefolder", "path": str(folder), "resolution": 16, "holdout": 2}
    pipeline = str(tmp_path / "pipeline")

    def latents(around: str | None, named: str | None = None) -> torch.Tensor:
        images = open_images(config(**settings, vae=named), tmp_path / "cache", vae=around)
        return images.space.encode(images.space.read(torch.arange(5)), None)

    own = str(tmp_path / "own")
    assert torch.equal(latents(pipeline, own), latents(None, own))
    assert torch.equal(latents(pipeline), latents(None, pipeline))
    assert not torch.equal(latents(pipeline), latents(None, own))


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
        return image_folder(root, 16, Buckets(16, 4, 2.0))

    @pytest.fixture
    def texts(self, tmp_path):
        cache = TextCache(tmp_path / "texts", {"kind": "test"})
        cache.build([*TEXTS, "a prompt"], encode, 2)
        return cache

    def make(self, source, texts, sizes=None, train=(0, 2, 3)) -> Captions:
        return Captions(
            Images(source, Split(torch.tensor(train), torch.tensor([])), PixelSpace(source)), texts, sizes, None
        )

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
        with pytest.raises(DataError, match="the embedding of 'another' is not in the cache"):
            conditioning.of_texts(["a prompt", "another"])

    def test_a_mirrored_image_has_its_images_caption_and_sizes(self, source, texts):
        conditioning = self.make(Flips(source), texts, sizes=FAMILIES["sdxl"].pipeline.sizes)
        found = conditioning(torch.tensor([2, 6]), kept(0, 0))
        for value in found.values():
            assert torch.equal(value[0], value[1])
