"""Runs on clips: what the encoder sees of them, what is measured of samples, what `plan` refuses, and what they cost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from repa_lab.data.sources import as_images
from repa_lab.encoders.encoder import load_encoder
from repa_lab.encoders.targets import OnlineTargets
from repa_lab.metrics.quality import Moments, frechet_distance
from repa_lab.models.families import FAMILIES
from repa_lab.models.flops import COUNTED
from repa_lab.models.released import problem_with
from repa_lab.orchestration.checks import check
from repa_lab.spec import Machine, RunOptions, SpecError, load_spec
from repa_lab.training.aligner import open_targets
from repa_lab.training.batches import pixels_for
from repa_lab.training.costs import caches_of, cost_of
from repa_lab.training.diffusion import Flow, denoising_loss, process_of
from repa_lab.training.evaluate import Evaluator, open_extractor, real_images
from repa_lab.training.loop import train
from repa_lab.training.model import open_model
from repa_lab.training.resolve import Inventory
from repa_lab.training.trainer import Trainer
from tests.rounding import TINY_VIT, rounding
from tests.training.conftest import make_options
from tests.training.pretrained import FRAMES, make_pretrained_run, open_pretrained, write_clips, write_pipeline

CPU = torch.device("cpu")
VIDEOS = [name for name, family in FAMILIES.items() if family.is_video]
videos = pytest.mark.parametrize("family", VIDEOS)
NAME = "frechet:efficientnet_lite0@16/pipeline2-frames9"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("clips")
    write_clips(root / "clips")
    return root


@pytest.fixture
def made(place):
    def make(family: str, **settings):
        run = make_pretrained_run(family, write_pipeline(family, place / family), place / "clips", **settings)
        return run, open_pretrained(run, place / "cache")

    return make


class TestTheEncoder:
    @videos
    def test_it_sees_the_frame_of_every_latent_frame(self, family, made, place):
        run, images = made(family)
        settings, stride = run.config.regularizer.encoder, FAMILIES[family].frame_stride
        encoder = load_encoder(settings.name, settings.image_size, 64)
        targets = open_targets(settings, images, make_options(encoder_storage="fp32"), place / "cache", CPU)
        index = torch.tensor([3, 5])
        clips, tokens = images.source.read([3, 5]), targets(index, CPU)
        assert tokens.frames == FAMILIES[family].latent_frames(FRAMES)
        by_frame = tokens.values.unflatten(1, (tokens.frames, -1))
        for latent in range(tokens.frames):
            expected = encoder(clips[:, :, latent * stride]).values
            torch.testing.assert_close(by_frame[:, latent], expected, rtol=0, atol=rounding(expected, TINY_VIT))
        online = OnlineTargets(encoder, settings.name, pixels_for(settings, images), CPU)(index, CPU)
        torch.testing.assert_close(online.values, tokens.values, rtol=0, atol=rounding(tokens.values, TINY_VIT))

    @videos
    def test_the_block_has_as_many_frames_on_its_own_grid(self, family, made, place):
        run, _ = made(family)
        trainer = Trainer(run, make_options(), place / "cache")
        batch = next(trainer.batches())
        facts = FAMILIES[family]
        side = 64 // facts.latent_stride
        assert batch.x.shape[2:] == (facts.latent_frames(FRAMES), side, side)
        tap = trainer.model.denoiser.tap(0)
        trainer.model.denoiser(batch.x, batch.t, **batch.condition)
        tokens = tap.take()
        assert (tokens.frames, tokens.grid) == (batch.x.shape[2], (side // facts.shapes[""].stride,) * 2)

    def test_reconstructions_are_of_the_same_frames(self, made, place):
        run, images = made("wan")
        whole, encoder = images.source.read([2]), run.config.regularizer.encoder
        seen = pixels_for(encoder.model_copy(update={"pixels": "vae"}), images)
        space = images.space
        decoded = space.decode(space.encode(space.read(torch.tensor([2])), None))
        assert decoded.shape == whole.shape
        assert torch.equal(seen.read([2]), decoded[:, :, ::4])
        online = encoder.model_copy(update={"pixels": "vae", "cache": False})
        assert (
            open_targets(online, images, make_options(), place / "cache", CPU).reader is None
        )  # decoded on the device


class TestNoise:
    def test_a_clip_has_one_time(self):
        x, noise, t = torch.randn(2, 4, 3, 5, 6), torch.randn(2, 4, 3, 5, 6), torch.tensor([0.25, 1.0])
        flow = Flow()
        x_t, target = flow.corrupt(x, noise, t)
        torch.testing.assert_close(x_t[0], 0.75 * x[0] + 0.25 * noise[0])
        assert torch.equal(x_t[1], noise[1])
        assert torch.equal(target, noise - x)

    def test_min_snr_weighs_clips_by_their_own_time(self):
        prediction, target = torch.randn(2, 2, 3, 4, 4), torch.randn(2, 2, 3, 4, 4)  # clips as many as channels
        weight = Flow().min_snr(torch.tensor([0.25, 0.9]), 5.0)
        errors = (prediction - target).square().mean((1, 2, 3, 4))
        expected = (min(0.75**2, 5 * 0.25**2) * errors[0] + min(0.1**2, 5 * 0.9**2) * errors[1]) / 2
        torch.testing.assert_close(denoising_loss(prediction, target, weight), expected)

    def test_wans_shift_is_the_schedulers(self):
        flow = process_of(
            {"_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction", "flow_shift": 3.0}
        )
        assert flow.shift == 3.0


class TestMeasuring:
    @pytest.fixture(scope="class")
    def measured(self, place):
        settings = {"evaluate.every": 2, "train.steps": 2}
        run = make_pretrained_run(
            "ltxvideo", write_pipeline("ltxvideo", place / "ltxvideo"), place / "clips", **settings
        )
        open_pretrained(run, place / "cache")
        return run

    def test_a_run_has_distance_agreement_and_pictures_and_says_how(self, measured, place, fresh):
        directory = fresh("run")
        train(measured, directory, make_options(), place / "cache")
        row = directory.rows()[-1]
        assert np.isfinite([row[name] for name in (NAME, "heldout/cka", "heldout/cosine", "heldout/gap")]).all()
        protocol = directory.protocols[NAME]
        assert (protocol["samples"], protocol["frames"], protocol["real"]) == (16, FRAMES, 4 * FRAMES)
        (grid,) = directory.sample_grids().values()
        with Image.open(grid) as picture:  # a row of nine frames for each of 16 clips, with lines of 2 px
            assert picture.size == (FRAMES * 66 + 2, 16 * 66 + 2)

    def test_the_distance_is_that_of_all_frames_as_images(self, measured, place):
        images = open_pretrained(measured, place / "cache")
        model = open_model(measured, images, make_options(), place / "cache", CPU)
        model.denoiser.eval()
        row, shown = Evaluator(measured.config, images, model, None, place / "cache", CPU).quality(
            measured.config.evaluate
        )
        extractor = open_extractor(measured.config, measured.config.evaluate.extractors[0], CPU)
        sampler = model.sampler(measured.config.evaluate)
        clips = torch.cat([sampler(range(8)), sampler(range(8, 16))])
        assert clips.shape == (16, 3, FRAMES, 64, 64)
        assert torch.equal(shown, clips)
        real = images.base.read(images.split.train.tolist())
        moments = []
        for pixels in (clips, real):
            frames = torch.cat([clip[:, number] for clip in pixels for number in range(FRAMES)]).view(-1, 3, 64, 64)
            assert torch.equal(frames, as_images(pixels))
            (layer,) = extractor.features(frames).values()
            one = Moments(layer.shape[1], CPU)
            one.add(layer)
            moments.append(one.statistics)
        generated, reference = moments
        expected = frechet_distance(generated.mu, generated.sigma, reference.mu, reference.sigma)
        assert row[NAME] == pytest.approx(expected, rel=1e-3)

    def test_the_reference_counts_frames(self, made):
        _, images = made("wan")
        real = real_images(images)
        assert real.count == sum(len(batch) for batch in real.batches()) == 4 * FRAMES


class TestCosts:
    @videos
    def test_tokens_and_caches_are_of_the_latent_frames(self, family, made):
        run, _ = made(family)
        config, facts = run.config, FAMILIES[family]
        options = RunOptions().resolved(Machine())
        side, latent = 64 // facts.latent_stride, facts.latent_frames(FRAMES)
        tokens = latent * (side // facts.shapes[""].stride) ** 2
        forward = COUNTED[family].at(tokens, 0).flops
        found = cost_of(config.model_copy(update={"model": config.model.model_copy(update={"train": "full"})}), options)
        assert found.denoiser_flops == pytest.approx(3 * forward)
        latents, features = caches_of(config, options)
        assert latents.image_bytes == 2 * 4 * facts.network.channels * latent * side**2
        assert features.image_bytes == 2 * 48 * latent * 4**2  # a tiny encoder's 48 channels in half precision

    def test_more_frames_cost_what_as_many_tokens_of_one_frame_cost(self, made):
        """The counted parabola is in the number of tokens, whatever their grid."""
        counted = COUNTED["wan"]
        assert counted.at(900, 0).flops == pytest.approx(2519.83e9)
        assert FAMILIES["wan"].latent_frames(81) == 21
        assert [FAMILIES["ltxvideo"].latent_frames(frames) for frames in (1, 9, 17)] == [1, 2, 3]
        assert FAMILIES["flux"].latent_frames(0) == 1


class TestPlan:
    def refused(self, **settings) -> list[str]:
        value = {
            "name": "clips",
            "model": {"family": "wan", "pretrained": "x/y", "train": "lora"},
            "regularizer": {"type": "crepa", "encoder": {"name": "efficientnet_lite0", "image_size": 64}},
            "data": {"source": "clips", "frames": 17, "resolution": 64},
            "train": {"steps": 10},
            "evaluate": {"extractor": {"name": "efficientnet_lite0"}},
        }
        try:
            check(load_spec(value, settings), None)
        except SpecError as error:
            return [f"{problem.path}: {problem.message}" for problem in error.problems]
        return []

    def test_clips_for_a_family_of_videos_are_accepted(self):
        assert self.refused() == []
        assert self.refused(**{"data.frames": 5, "regularizer.distance": 1}) == []
        assert self.refused(**{"regularizer.type": "repa"}) == []

    def test_images_for_a_family_of_videos(self):
        assert self.refused(**{"data": {"source": "imagefolder", "resolution": 64}}) == [
            "data.source: wan is trained on clips, and imagefolder has images: use clips",
            "regularizer.type: crepa compares the frames of clips, and the data have one frame each: use repa",
        ]

    def test_clips_for_a_family_of_images(self):
        assert self.refused(**{"model.family": "sd3", "regularizer.type": "repa"}) == [
            "data.source: sd3 is trained on images, and clips has clips; clips are for wan, ltxvideo"
        ]

    def test_images_have_no_neighbours(self):
        value = {"data": {"source": "imagefolder", "resolution": 64}, "model.family": "sd3"}
        assert self.refused(**value) == [
            "regularizer.type: crepa compares the frames of clips, and the data have one frame each: use repa"
        ]

    def test_a_number_of_frames_that_the_autoencoder_cannot_take(self):
        message = "makes a latent frame of the first frame and of every {} after it: use {} or {}, got 15"
        assert self.refused(**{"data.frames": 15}) == [f"data.frames: wan {message.format(4, 13, 17)}"]
        assert self.refused(**{"data.frames": 15, "model.family": "ltxvideo"}) == [
            f"data.frames: ltxvideo {message.format(8, 9, 17)}"
        ]

    def test_a_distance_that_no_two_latent_frames_have(self):
        assert self.refused(**{"regularizer.distance": 4}) == []
        assert self.refused(**{"regularizer.distance": 5}) == [
            "regularizer.distance: a clip has 5 frames in the denoiser: distance must be 0 to 4, got 5"
        ]
        assert self.refused(**{"data.frames": 1}) == [
            "regularizer.type: crepa compares the frames of clips, and the data have one frame each: use repa"
        ]

    def test_a_clip_that_is_too_short_is_named(self, place):
        value = {
            "name": "clips",
            "model": {"family": "wan", "pretrained": "x/y"},
            "data": {"source": "clips", "path": str(place / "clips"), "frames": 13, "resolution": 64},
            "train": {"steps": 10},
            "evaluate": {"extractor": {"name": "efficientnet_lite0"}},
        }
        with pytest.raises(SpecError) as caught:
            check(load_spec(value), Inventory())
        (problem,) = caught.value.problems
        assert problem.path == "data.frames"
        assert "00' has 9 frames, and 13 are asked for" in problem.message

    def test_two_denoisers_in_one_pipeline(self, place, tmp_path):
        folder = tmp_path / "wan"
        shutil.copytree(write_pipeline("wan", place / "wan"), folder)
        index = json.loads((folder / "model_index.json").read_text())
        assert problem_with(folder, FAMILIES["wan"]) is None
        (folder / "model_index.json").write_text(json.dumps(index | {"transformer_2": index["transformer"]}))
        message = (
            "has two denoisers, transformer and transformer_2, each for a part of the noise levels: wan trains one"
        )
        assert problem_with(folder, FAMILIES["wan"]) == f"'{folder}' {message}"
