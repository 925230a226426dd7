"""Clips as data: what is a clip, which frames are read, and that an autoencoder's latent frames are of those frames."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from repa_lab.data import DataError
from repa_lab.data.latents import Autoencoder
from repa_lab.data.settings import ClipsSettings
from repa_lab.data.sources import Clips, Flips, LatentFrames, as_images
from repa_lab.models.families import FAMILIES
from repa_lab.models.family import pipeline_of
from repa_lab.models.tiny import build_component

FRAMES = 12
# Every frame of the clip has a grey level of its own.
LEVELS = [20 * number for number in range(FRAMES)]


def grey(level: int, size: tuple[int, int] = (16, 16)) -> Image.Image:
    return Image.new("RGB", size, (level,) * 3)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A clip of each kind, all with the same frames: images whose names are numbers, an animation, and an array."""
    (tmp_path / "numbers").mkdir()
    for number, level in enumerate(LEVELS):
        grey(level).save(tmp_path / "numbers" / f"{number}.png")
    first, *others = map(grey, LEVELS)
    first.save(tmp_path / "moving.gif", save_all=True, append_images=others)
    first.save(tmp_path / "other.webp", save_all=True, append_images=others, lossless=True)
    np.save(tmp_path / "plain.npy", np.stack([np.array(grey(level)) for level in LEVELS]))
    return tmp_path


def opened(folder: Path, **settings) -> Clips:
    return Clips(ClipsSettings(path=str(folder), resolution=16, **settings))


def levels(clips: torch.Tensor) -> list[list[int]]:
    assert (clips.flatten(3) == clips[..., :1, 0]).all()
    return clips[:, 0, :, 0, 0].tolist()


class TestFrames:
    def test_each_kind_of_clip_has_the_same_frames_in_order(self, folder):
        clips = opened(folder, frames=FRAMES)
        pixels = clips.read(range(4))
        assert (len(clips), pixels.shape, pixels.dtype) == (4, (4, 3, FRAMES, 16, 16), torch.uint8)
        assert levels(pixels) == [LEVELS] * 4  # 2.png comes before 10.png

    def test_the_first_frames_or_every_third(self, folder):
        assert levels(opened(folder, frames=5).read(range(4))) == [LEVELS[:5]] * 4
        assert levels(opened(folder, frames=4, frame_step=3).read(range(4))) == [LEVELS[:10:3]] * 4

    def test_frames_are_turned_as_the_camera_was_held(self, tmp_path):
        (tmp_path / "held").mkdir()
        left = Image.fromarray(np.repeat([[[0] * 3] * 8 + [[255] * 3] * 8], 16, 0).astype(np.uint8))  # dark on the left
        noted = Image.Exif()
        noted[0x0112] = 6  # to be turned clockwise
        for number in range(2):
            left.save(tmp_path / "held" / f"{number}.jpg", exif=noted, quality=95)
        first = opened(tmp_path, frames=2).read([0])[0, 0]
        assert (first[:, 2] < 40).all() and (first[:, -3] > 215).all()  # dark above, in both frames

    def test_a_clip_that_is_too_short_is_refused_by_name(self, folder):
        with pytest.raises(DataError, match=r"moving.gif' has 12 frames, and 13 are asked for: lower frames") as caught:
            opened(folder, frames=13)
        assert caught.value.field == "frames"
        with pytest.raises(DataError, match="has 12 frames, and 13 are asked for"):  # 1 + 4 * 3
            ClipsSettings(path=str(folder), frames=5, frame_step=3).describe()

    def test_as_images_frame_by_frame(self, folder):
        pixels = opened(folder, frames=3).read(range(2))
        assert levels(as_images(pixels).unsqueeze(2)) == [[level] for level in (*LEVELS[:3], *LEVELS[:3])]
        assert as_images(pixels[:, :, 0]) is not None
        assert torch.equal(as_images(pixels[:, :, 0]), pixels[:, :, 0])

    def test_a_mirrored_clip_is_mirrored_in_every_frame(self, folder):
        draw = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
        (folder / "only").mkdir()
        np.save(folder / "only" / "noise.npy", draw)
        clips = Flips(opened(folder / "only", frames=3))
        first, mirrored = clips.read([0, 1])
        assert torch.equal(first, torch.from_numpy(draw).permute(3, 0, 1, 2))
        assert torch.equal(mirrored, first.flip(-1))

    def test_arrays_of_another_kind_are_refused(self, tmp_path):
        np.save(tmp_path / "a.npy", np.zeros((3, 16, 16)))
        with pytest.raises(DataError, match=r"must be uint8 of \(frames, height, width, 3\), got float64 of shape"):
            opened(tmp_path, frames=2)
        (tmp_path / "a.npy").write_bytes(b"no array")
        with pytest.raises(DataError, match=r"cannot read the clip '.*a.npy'"):
            opened(tmp_path, frames=2)

    def test_a_damaged_clip_is_named(self, folder):
        (folder / "numbers" / "1.png").write_bytes(b"no image")
        clips = opened(folder, frames=3)
        with pytest.raises(DataError, match=r"cannot read the clip '.*numbers'"):
            clips.read([1])
        content = (folder / "moving.gif").read_bytes()
        (folder / "moving.gif").write_bytes(content[: len(content) // 2])
        with pytest.raises(DataError, match=r"moving.gif"):
            opened(folder, frames=12).read([0])

    def test_a_folder_of_images_alone_has_no_clips(self, tmp_path):
        grey(0).save(tmp_path / "0.png")
        with pytest.raises(DataError, match=r"no clips in .*; expected subfolders of images, or files in it"):
            opened(tmp_path)

    def test_sizes_of_several_aspects(self, tmp_path):
        np.save(tmp_path / "wide.npy", np.zeros((2, 20, 60, 3), np.uint8))
        np.save(tmp_path / "tall.npy", np.zeros((2, 60, 20, 3), np.uint8))
        clips = opened(tmp_path, frames=2, buckets={"step": 8, "max_aspect": 3.0})
        assert clips.read([0]).shape[-1] < clips.read([0]).shape[-2]
        assert clips.read([1]).shape == clips.read([0]).transpose(-1, -2).shape


class TestCaptions:
    def test_beside_the_clip(self, folder):
        (folder / "numbers.txt").write_text("counting\n")
        (folder / "plain.txt").write_text("an array")
        clips = opened(folder, frames=2)
        assert clips.captions == ["", "counting", "", "an array"]  # moving, numbers, other, plain
        assert clips.notes == ("2 of 4 clips have no caption: they are trained with the empty one",)

    def test_metadata_lists_the_clips(self, folder):
        rows = [{"file_name": "plain.npy", "text": "an array"}, {"file_name": "numbers", "text": "counting"}]
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings = ClipsSettings(path=str(folder), resolution=16, frames=2)
        clips = Clips(settings)
        assert clips.captions == ["counting", "an array"]
        assert clips.notes == ("2 of 4 clips have no row in metadata.jsonl and are left out",)
        described = settings.describe()
        assert (described.images, described.has_captions, described.notes) == (2, True, clips.notes)

    def test_a_few_are_copied_with_their_captions(self, folder, tmp_path_factory):
        (folder / "numbers.txt").write_text("counting")
        settings = ClipsSettings(path=str(folder), resolution=16, frames=2)
        target = tmp_path_factory.mktemp("few")
        settings.copy_few(target, 4)
        copy = Clips(settings.model_copy(update={"path": str(target)}))
        assert copy.captions == ["", "counting", "", ""]
        assert torch.equal(copy.read(range(4)), Clips(settings).read(range(4)))


class TestFingerprint:
    def test_it_is_of_the_frames_and_how_they_are_read_not_of_the_place(self, folder, tmp_path_factory):
        settings = ClipsSettings(path=str(folder), resolution=16, frames=3)
        other = tmp_path_factory.mktemp("elsewhere")
        settings.copy_few(other, 4)
        found = {
            name: (Clips(one).fingerprint, one.describe().fingerprint)
            for name, one in {
                "here": settings,
                "there": settings.model_copy(update={"path": str(other)}),
                "longer": settings.model_copy(update={"frames": 4}),
                "slower": settings.model_copy(update={"frame_step": 2}),
                "larger": settings.model_copy(update={"resolution": 32}),
            }.items()
        }
        assert found["here"] == found["there"]
        assert len(set(found.values())) == 4

    def test_a_frame_of_other_content_is_another_data_set(self, folder):
        before = opened(folder, frames=3).fingerprint
        array = np.load(folder / "plain.npy")
        array[2] = 255
        np.save(folder / "plain.npy", array)
        assert opened(folder, frames=3).fingerprint != before


VIDEOS = [family for family in FAMILIES.values() if family.is_video]
videos = pytest.mark.parametrize("family", VIDEOS, ids=lambda family: family.name)


class TestLatentFrames:
    def test_the_frames_by_hand(self, folder):
        clips = opened(folder, frames=9)
        of_wan, of_ltx = LatentFrames(clips, 4), LatentFrames(clips, 8)
        assert levels(of_wan.read([0])) == [[LEVELS[0], LEVELS[4], LEVELS[8]]]
        assert levels(of_ltx.read([0])) == [[LEVELS[0], LEVELS[8]]]
        assert (of_wan.clip_frames, of_ltx.clip_frames) == (3, 2)
        assert len({clips.fingerprint, of_wan.fingerprint, of_ltx.fingerprint}) == 3

    @videos
    def test_they_are_the_last_that_a_latent_frame_is_made_of(self, family):
        """A latent frame changes with its own frame, and with none after it: the autoencoder is causal."""
        torch.manual_seed(0)
        vae = Autoencoder(build_component(pipeline_of(family).tiny["vae"]), "vae")
        frames = 2 * family.frame_stride + 1
        clip = torch.randint(0, 256, (1, 3, frames, 64, 64), dtype=torch.uint8)
        before = vae.moments(clip)
        assert before.shape[2] == family.latent_frames(frames) == 3
        assert before.shape[3] * family.latent_stride == 64
        for number in range(3):
            changed = clip.clone()
            changed[:, :, number * family.frame_stride] = 255 - changed[:, :, number * family.frame_stride]
            moved = (vae.moments(changed) - before).abs().amax((0, 1, 3, 4)) > 1e-6
            assert moved[:number].tolist() == [False] * number
            assert moved[number]

    @videos
    def test_clips_are_scaled_as_the_pipeline_scales_them_and_come_back(self, family):
        torch.manual_seed(0)
        vae = Autoencoder(build_component(pipeline_of(family).tiny["vae"]), "vae")
        z = torch.randn(2, vae.latent_channels, 2, 3, 4)
        x = vae.scaling.normalise(z)
        for frame in range(2):
            torch.testing.assert_close(x[:, :, frame], vae.scaling.normalise(z[:, :, frame]))
        torch.testing.assert_close(vae.scaling.denormalise(x), z)
        pixels = vae.decode(x)
        assert pixels.shape == (2, 3, family.frame_stride + 1, *(side * family.latent_stride for side in (3, 4)))

    def test_a_decoder_that_is_told_the_noise_is_told_none(self):
        torch.manual_seed(0)
        component = pipeline_of(FAMILIES["ltxvideo"]).tiny["vae"]
        model = build_component(type(component)(component.name, {**component.config, "timestep_conditioning": True}))
        x = torch.randn(1, 8, 2, 1, 1)
        with torch.no_grad():
            expected = model.eval().decode(x, torch.zeros(1)).sample
        torch.testing.assert_close(Autoencoder(model, "vae").decode(x), expected)

    def test_an_autoencoder_of_images_refuses_clips(self):
        vae = Autoencoder(build_component(pipeline_of(FAMILIES["sd15"]).tiny["vae"]), "vae")
        with pytest.raises(DataError, match="AutoencoderKL encodes images, and the data are clips"):
            vae.moments(torch.zeros(1, 3, 5, 64, 64, dtype=torch.uint8))
