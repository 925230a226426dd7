from __future__ import annotations

import dataclasses
import json
import math
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from repa_lab.align import REPA, Tokens
from repa_lab.align.settings import EncoderSettings
from repa_lab.align.tokens import flatten_map
from repa_lab.data import DataError
from repa_lab.data.crop import Buckets
from repa_lab.data.latents import PixelSpace
from repa_lab.data.sources import Flips, split
from repa_lab.encoders.encoder import load_encoder
from repa_lab.encoders.targets import OnlineTargets
from repa_lab.metrics import cka, frechet_distance, kid, precision_recall, statistics
from repa_lab.metrics.extractor import Extractor
from repa_lab.metrics.protocol import differences
from repa_lab.metrics.reference import reference
from repa_lab.models.tap import Denoiser, Tap
from repa_lab.training.aligner import open_targets
from repa_lab.training.batches import Images, generator
from repa_lab.training.diffusion import FieldSampler, Flow
from repa_lab.training.evaluate import DivergedError, Evaluator, decoder_identity, real_images, write_grid
from repa_lab.training.model import Labels, Model, build_denoiser
from repa_lab.training.resolve import encoder_identity
from tests.data.conftest import image_folder, noise_image
from tests.metrics.conftest import cosine_gap
from tests.rounding import FRECHET, LITE0, rounding
from tests.training.conftest import make_options, make_run
from tests.training.pretrained import make_pretrained_run, write_pipeline

CPU = torch.device("cpu")
HELD_OUT = 40


@pytest.fixture(scope="module")
def few(images) -> Images:
    """The same images, with few of them held out and few trained on."""
    held = split(len(images.source), 1797 - 60)
    return Images(images.source, type(held)(held.train, held.held_out[:HELD_OUT]), images.space)


@pytest.fixture(scope="module")
def denoiser(images) -> nn.Module:
    torch.manual_seed(0)
    model = build_denoiser(make_run().config, images.input, 0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def targets(images, cache):
    return open_targets(make_run().config.regularizer.encoder, images, make_options(), cache, CPU)


def make_evaluator(few, cache, denoiser, targets=None, seed: int = 0, **settings) -> Evaluator:
    config = make_run(**{f"evaluate.{name}": value for name, value in settings.items()}).config

    def sampler(protocol):
        return FieldSampler(denoiser, few.space, (1, 8, 8), 10, protocol, seed, CPU)

    model = Model(denoiser, Flow(), Labels(few.source.labels, 10, 10), sampler, config.evaluate.batch_size)
    return Evaluator(config, few, model, targets, cache, CPU)


def quality(few, cache, denoiser, **settings):
    config = make_run(**{f"evaluate.{name}": value for name, value in settings.items()}).config
    return make_evaluator(few, cache, denoiser, **settings).quality(config.evaluate)


@pytest.fixture(scope="module")
def extractor() -> Extractor:
    return Extractor("efficientnet_lite0", None, CPU)


class TestQuality:
    def test_is_the_distance_of_the_samples_to_the_training_images(self, few, cache, denoiser, extractor):
        config = make_run().config.evaluate
        row, shown = quality(few, cache, denoiser)
        drawn = FieldSampler(denoiser, few.space, (1, 8, 8), 10, config, 0, CPU)(range(16))
        samples = statistics(extractor.features(drawn)["1280"])
        real = statistics(extractor.features(few.source.read(few.split.train.tolist()))["1280"])
        expected = frechet_distance(samples.mu, samples.sigma, real.mu, real.sigma)
        assert row == {"frechet:efficientnet_lite0@16/ode2": pytest.approx(expected, rel=FRECHET)}
        assert torch.equal(shown, drawn)

    def test_shows_the_first_samples_only(self, few, cache, denoiser):
        _, shown = quality(few, cache, denoiser, samples=50, batch_size=7)
        assert (shown.shape, shown.dtype) == ((40, 1, 8, 8), torch.uint8)

    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    def test_samples_that_are_not_finite_are_no_images(self, few, cache, value):
        class Broken(nn.Module):
            def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
                return torch.full_like(x, value)

        with pytest.raises(DivergedError, match="samples that are not finite"):
            quality(few, cache, Broken())


class TestReference:
    def test_is_the_training_images_looked_at_once_for_good(self, few, tmp_path, extractor):
        real = real_images(few)
        asked: list[int] = []

        def counting():
            for pixels in real.batches():
                asked.append(len(pixels))
                yield pixels

        watched = dataclasses.replace(real, batches=counting)
        first, again = (reference(extractor, watched, tmp_path).of("frechet") for _ in range(2))
        assert asked == [60]
        assert first.count == again.count == 60
        assert np.array_equal(first.mu, again.mu) and np.array_equal(first.sigma, again.sigma)

    def test_other_training_images_are_another_reference(self, few, tmp_path, extractor):
        less = Images(few.source, type(few.split)(few.split.train[:30], few.split.held_out), few.space)
        first, second = (reference(extractor, real_images(one), tmp_path).of("frechet") for one in (few, less))
        assert (first.count, second.count) == (60, 30)
        assert len(list((tmp_path / "reference").iterdir())) == 2

    def test_a_file_of_statistics_takes_their_place(self, few, tmp_path, cache, denoiser):
        rng = np.random.default_rng(0)
        vectors = rng.normal(size=(3000, 1280))
        np.savez(tmp_path / "theirs.npz", mu=vectors.mean(axis=0), sigma=np.cov(vectors, rowvar=False))
        row, shown = quality(few, cache, denoiser, **{"extractor.reference": str(tmp_path / "theirs.npz")})
        samples = statistics(Extractor("efficientnet_lite0", None, CPU).features(shown)["1280"])
        expected = frechet_distance(samples.mu, samples.sigma, vectors.mean(axis=0), np.cov(vectors, rowvar=False))
        assert row == {"frechet:efficientnet_lite0@16/ode2": pytest.approx(expected, rel=FRECHET)}


class TestProtocols:
    ALL: ClassVar = {"metrics": ["frechet", "kid", "precision_recall"], "samples": 20}

    def test_one_pass_gives_all_that_was_asked_for(self, few, cache, denoiser, extractor, monkeypatch):
        seen: list[int] = []
        features = Extractor.features
        monkeypatch.setattr(
            Extractor, "features", lambda self, pixels, *more: seen.append(len(pixels)) or features(self, pixels, *more)
        )
        evaluator = make_evaluator(few, cache, denoiser, **self.ALL)
        seen.clear()  # of the reference
        row, shown = evaluator.quality(
            make_run(**{f"evaluate.{name}": value for name, value in self.ALL.items()}).config.evaluate
        )
        assert seen == [20]
        found, real = (
            extractor.features(shown)["1280"],
            extractor.features(few.source.read(few.split.train.tolist()))["1280"],
        )
        at = "efficientnet_lite0@20/ode2"
        assert list(row) == [f"frechet:{at}", f"kernel:{at}", f"precision:{at}", f"recall:{at}"]
        assert row[f"kernel:{at}"] == pytest.approx(kid(found, real).value)
        both = precision_recall(found, real)
        assert (row[f"precision:{at}"], row[f"recall:{at}"]) == (both.precision, both.recall)

    def test_every_number_says_what_it_depends_on(self, few, cache, denoiser, targets):
        evaluator = make_evaluator(
            few, cache, denoiser, targets, full={"samples": 32, "sampler": {"type": "sde", "steps": 3}}, **self.ALL
        )
        found = evaluator.protocols(5, 2)
        at = "efficientnet_lite0@20/ode2"
        rare = {name for name in found if name.endswith("@32/sde3")}
        assert (
            set(found)
            == {
                f"frechet:{at}",
                f"kernel:{at}",
                f"precision:{at}",
                f"recall:{at}",
                "heldout/cka",
                "heldout/cosine",
                "heldout/gap",
            }
            | rare
        )
        assert len(rare) == 4
        kernel = found[f"kernel:{at}"]
        assert (kernel["samples"], kernel["subsets"], kernel["real"], kernel["seed"], kernel["labels"]) == (
            20,
            "100x20",
            60,
            5,
            "balanced",
        )
        assert kernel["preprocessing"] == "bicubic-antialias-64-half"
        assert kernel["versions"]["torch"] == torch.__version__.split("+")[0]
        assert found["heldout/cka"]["encoder"]["name"] == "efficientnet_lite0"
        assert (found["heldout/cka"]["block"], found["heldout/cka"]["images"]) == (2, HELD_OUT)

    def test_of_two_references_the_difference_is_named(self, few, cache, denoiser):
        less = Images(few.source, type(few.split)(few.split.train[:30], few.split.held_out), few.space)
        (one,), (other,) = (
            make_evaluator(images, cache, denoiser).protocols(seed, 1).values()
            for seed, images in enumerate((few, less))
        )
        assert differences(one, other) == ("real", "reference")
        assert differences(one, {**one, "seed": 9, "versions": {}}) == ()

    def test_samples_that_are_rounded_otherwise_are_another_number(self, few, cache, denoiser):
        evaluators = [make_evaluator(few, cache, denoiser, rounding=rounding) for rounding in ("nearest", "truncate")]
        (one,), (other,) = (evaluator.protocols(0, 1).values() for evaluator in evaluators)
        assert differences(one, other) == ("rounding",) and "rounding" not in one

    def test_alignment_of_an_arm_with_mirrored_images_is_of_the_same_held_out_ones(self, few, cache, denoiser, targets):
        mirrored = Images(Flips(few.source), few.split, few.space)
        plain, flipped = (
            make_evaluator(images, cache, denoiser, targets).protocols(0, 1)["heldout/cka"]
            for images in (few, mirrored)
        )
        assert differences(plain, flipped) == ()
        fewer = Images(few.source, type(few.split)(few.split.train, few.split.held_out[1:]), few.space)
        assert differences(plain, make_evaluator(fewer, cache, denoiser, targets).protocols(0, 1)["heldout/cka"]) == (
            "held_out",
            "images",
        )

    def test_alignment_under_the_noise_of_other_batches_is_another_number_and_says_so(
        self, few, cache, denoiser, targets
    ):
        """The noise of held-out images is drawn batch by batch; from 40 on, all 40 are one batch."""

        def measured(**settings):
            evaluator, tap = make_evaluator(few, cache, denoiser, targets, **settings), denoiser.tap(2)
            try:
                return evaluator.alignment(tap, None)["heldout/cka"], evaluator.protocols(0, 2)["heldout/cka"]
            finally:
                tap.remove()

        (usual, one), (whole, two), (parts, three) = measured(), measured(batch_size=HELD_OUT), measured(batch_size=16)
        assert whole == usual != parts
        assert differences(one, two) == ()
        assert differences(one, three) == ("noise_batch",)
        assert (three["noise_batch"], "noise_batch" in one) == (16, False)

    def test_an_encoder_is_known_by_what_is_in_its_files(self, tmp_path):
        encoders = {}
        for name in ("one", "copy", "other"):
            file = tmp_path / f"{name}.safetensors"
            file.write_text("other" if name == "other" else "one")
            encoders[name] = encoder_identity(EncoderSettings(weights=str(file)))
        assert encoders["one"] == encoders["copy"] != encoders["other"]
        assert encoder_identity(EncoderSettings()) == EncoderSettings().model_dump(mode="json")

    def test_an_encoder_is_known_by_whether_its_tokens_are_normed(self):
        mae = EncoderSettings(name="mae_vitl16")
        assert encoder_identity(mae) == {**mae.model_dump(mode="json"), "norm": False}

    def test_a_decoder_is_known_by_what_is_in_it_and_a_pipeline_by_its_scheduler_too(self, tmp_path):
        vaes = {name: tmp_path / name for name in ("one", "copy", "other")}
        for name, folder in vaes.items():
            folder.mkdir()
            (folder / "weights").write_text("other" if name == "other" else "one")
        one, copy, other = (decoder_identity(make_run(**{"data.vae": str(folder)}).config) for folder in vaes.values())
        assert one == copy != other
        assert decoder_identity(make_run(**{"data.vae": "some/vae"}).config) == {"decoder": "some/vae"}
        assert decoder_identity(make_run().config) == {"decoder": None}
        run = make_pretrained_run(
            "sd15", write_pipeline("sd15", tmp_path / "sd15"), tmp_path, **{"data.vae": str(vaes["one"])}
        )
        before, path = decoder_identity(run.config), tmp_path / "sd15" / "scheduler" / "scheduler_config.json"
        assert before["decoder"] == one["decoder"]
        path.write_text(json.dumps({**json.loads(path.read_text()), "beta_end": 0.013, "_diffusers_version": "0"}))
        assert (
            {**before["scheduler"], "beta_end": 0.013}
            == decoder_identity(run.config)["scheduler"]
            != before["scheduler"]
        )
        path.write_text(
            json.dumps({**json.loads(path.read_text()), "beta_end": 0.013, "lambda_min_clipped": -math.inf})
        )
        assert decoder_identity(run.config)["scheduler"]["lambda_min_clipped"] == "-inf"
        json.dumps(decoder_identity(run.config), allow_nan=False)


def tokens_by_hand(few, denoiser, block: int, timestep: float, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tap tokens of the held-out images, by running the denoiser's own parts up to the block."""
    found = []
    for index in few.split.held_out.split(batch_size):
        draw = generator(0, "held-out", int(index[0]))
        x = few.source.read(index).float() / 127.5 - 1
        x_t = (1 - timestep) * x + timestep * torch.randn(x.shape, generator=draw)
        t, null = torch.full((len(x),), timestep), torch.full((len(x),), 10)
        tokens = denoiser.x_embedder(x_t) + denoiser.pos_embed
        condition = denoiser.t_embedder(t) + denoiser.y_embedder(null)
        for number in range(block + 1):
            tokens = denoiser.blocks[number](tokens, condition, None)
        found.append(tokens)
    return torch.cat(found)


class TestAlignment:
    def measure(self, evaluator, denoiser, block=2, match=None):
        tap = denoiser.tap(block)
        try:
            return evaluator.alignment(tap, match)
        finally:
            tap.remove()

    def test_compares_held_out_images_under_the_null_label(self, few, cache, denoiser, targets):
        evaluator = make_evaluator(few, cache, denoiser, targets, timestep=0.3, batch_size=16)
        row = self.measure(evaluator, denoiser)
        student = tokens_by_hand(few, denoiser, 2, 0.3, 16)
        teacher = targets(few.split.held_out, CPU).values
        assert row == {"heldout/cka": pytest.approx(cka(student.mean(1), teacher.mean(1)), abs=1e-5)}

    def test_the_projector_speaks_of_its_own_tap(self, few, cache, denoiser, targets):
        torch.manual_seed(3)
        regularizer = REPA(64, targets.dim, projector={"width": 16})
        row = self.measure(make_evaluator(few, cache, denoiser, targets, batch_size=16), denoiser, 2, regularizer.match)
        student = Tokens(tokens_by_hand(few, denoiser, 2, 0.5, 16), (4, 4))
        teacher = targets(few.split.held_out, CPU)
        with torch.no_grad():
            projected = regularizer.projectors[0](student).resample((2, 2)).values
        matched, gap = cosine_gap(projected, teacher.values)
        assert row["heldout/cosine"] == pytest.approx(matched, abs=1e-6)
        assert row["heldout/gap"] == pytest.approx(gap, abs=1e-6)
        assert row.keys() == {"heldout/cka", "heldout/cosine", "heldout/gap"}

    def test_every_seed_is_measured_under_the_same_noise(self, few, cache, denoiser, targets):
        rows = [self.measure(make_evaluator(few, cache, denoiser, targets, seed), denoiser) for seed in (0, 1)]
        assert rows[0] == rows[1]

    def test_nothing_is_measured_without_an_encoder(self, few, cache, denoiser):
        assert self.measure(make_evaluator(few, cache, denoiser), denoiser) == {}

    def test_too_few_held_out_images_are_refused_before_training(self, images, cache, denoiser, targets):
        held = type(images.split)(images.split.train, images.split.held_out[:3])
        with pytest.raises(DataError, match="hold out 4 or more") as caught:
            make_evaluator(Images(images.source, held, images.space), cache, denoiser, targets)
        assert caught.value.field == "holdout"


class AnySize(Denoiser):
    """A denoiser of images of any size: what it sees in cells of 4x4, and back."""

    def __init__(self) -> None:
        super().__init__()
        self.cells, self.back = nn.Conv2d(3, 8, 4, stride=4), nn.ConvTranspose2d(8, 3, 4, stride=4)

    def tap(self, block_index: int) -> Tap:
        return Tap(self.cells, flatten_map)

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.back(self.cells(x) * t.view(-1, 1, 1, 1) + y.view(-1, 1, 1, 1))


class TestSizes:
    """Images that keep their aspects are measured size by size, and the number is one of all images."""

    # Width x height: 20 images, of which 6 are wide and 5 upright.
    SHAPES = ((64, 64), (80, 48), (64, 64), (48, 80)) * 4 + ((80, 48), (64, 64), (48, 80), (80, 48))

    def make(self, tmp_path, shapes, held_out: int) -> tuple[Evaluator, Model, Images, OnlineTargets]:
        (tmp_path / "images").mkdir()
        for i, shape in enumerate(shapes):
            noise_image(i, shape).save(tmp_path / "images" / f"{i:02}.png")
        source = image_folder(tmp_path / "images", 64, Buckets(64, 16, 4.0))
        images = Images(source, split(len(source), held_out), PixelSpace(source))
        denoiser = AnySize().eval()
        config = make_run(**{"evaluate.batch_size": 2, "evaluate.timestep": 0.25}).config
        sampler = FieldSampler(denoiser, images.space, (3, 64, 64), 1, config.evaluate, 0, CPU)
        labels = Labels(source.labels, 1, 1)
        model = Model(denoiser, Flow(), labels, lambda protocol: sampler, 2)
        encoder = OnlineTargets(load_encoder("efficientnet_lite0", None, 64), "it", source, CPU)
        return Evaluator(config, images, model, encoder, tmp_path / "cache", CPU), model, images, encoder

    def by_hand(self, model, images, encoder, regularizer) -> list[tuple[torch.Tensor, ...]]:
        """Of each size: means of the images' tokens on both sides, projected tokens and the encoder's."""
        found, held_out, sizes = [], images.split.held_out, images.source.sizes
        for size in sizes.unique(dim=0).tolist():
            index = held_out[(sizes[held_out] == torch.tensor(size)).all(1)]
            sides: tuple[list[torch.Tensor], ...] = ([], [], [], [])
            for part in index.split(2):
                draw = generator(0, "held-out", int(part[0]))
                x = images.source.read(part.tolist()).float() / 127.5 - 1
                with torch.no_grad():
                    cells = model.denoiser.cells(0.75 * x + 0.25 * torch.randn(x.shape, generator=draw))
                    student = Tokens(cells.flatten(2).mT, (size[0] // 4, size[1] // 4))
                    teacher = encoder(part, CPU)
                    projected = regularizer.projectors[0](student).resample(teacher.grid).values
                assert teacher.grid == (size[0] // 16, size[1] // 16)
                held = student.values.mean(1), teacher.values.mean(1), projected, teacher.values
                for side, one in zip(sides, held, strict=True):
                    side.append(one)
            found.append(tuple(torch.cat(side) for side in sides))
        return found

    def test_alignment_by_an_independent_computation(self, tmp_path):
        measured, model, images, encoder = self.make(tmp_path, self.SHAPES, 14)
        regularizer = REPA(8, 112, projector={"width": 16}).eval()
        row = measured.alignment(model.denoiser.tap(0), regularizer.match)
        found = self.by_hand(model, images, encoder, regularizer)
        counts = [len(one[0]) for one in found]
        assert len(counts) == 3
        assert min(counts) >= 2 and sum(counts) == 14
        assert row["heldout/cka"] == pytest.approx(
            cka(*(torch.cat([one[n] for one in found]) for n in (0, 1))), abs=1e-4
        )
        cosines = [cosine_gap(one[2], one[3]) for one in found]
        assert row["heldout/cosine"] == pytest.approx(np.average([one[0] for one in cosines], weights=counts), abs=1e-5)
        assert row["heldout/gap"] == pytest.approx(np.average([one[1] for one in cosines], weights=counts), abs=1e-5)

    def test_a_size_may_have_a_single_image(self, tmp_path):
        """It counts for the cosine, and has no other image to be told from."""
        shapes = [(64, 64), (64, 64), (80, 48), (64, 64), (112, 32), (96, 32)]
        measured, model, images, encoder = self.make(tmp_path, shapes, 4)
        regularizer = REPA(8, 112, projector={"width": 16}).eval()
        row = measured.alignment(model.denoiser.tap(0), regularizer.match)
        found = self.by_hand(model, images, encoder, regularizer)
        cosines = [nn.functional.cosine_similarity(one[2], one[3], dim=-1).mean(1) for one in found if len(one[0])]
        assert row["heldout/cosine"] == pytest.approx(torch.cat(cosines).mean().item(), abs=1e-5)

    def test_the_reference_is_of_the_training_images_of_all_sizes(self, extractor, tmp_path):
        _, _, images, _ = self.make(tmp_path, self.SHAPES, 14)
        found = reference(extractor, real_images(images), tmp_path / "other").of("frechet")
        features = np.concatenate(
            [extractor.features(images.source.read([i]))["1280"] for i in images.split.train.tolist()]
        )
        assert found.count == 6
        error = rounding(features, LITE0)
        np.testing.assert_allclose(found.mu, features.mean(0), rtol=0, atol=error)
        expected = np.cov(features, rowvar=False)
        np.testing.assert_allclose(found.sigma, expected, rtol=0, atol=4 * features.std(0).max() * error)


class TestGrid:
    def test_large_samples_are_shrunk_to_a_screens_width(self, tmp_path):
        pixels = torch.full((3, 3, 1024, 1024), 120, dtype=torch.uint8)
        write_grid(pixels, tmp_path / "grid.png")
        with Image.open(tmp_path / "grid.png") as grid:
            assert grid.size == (3 * 853 + 8, 853 + 4)
            assert grid.getpixel((400, 400)) == (120, 120, 120)

    def test_ten_to_a_row_enlarged_without_smoothing(self, tmp_path):
        pixels = torch.arange(12, dtype=torch.uint8).view(12, 1, 1, 1).expand(12, 1, 8, 8) * 20
        write_grid(pixels, tmp_path / "samples" / "grid.png")
        grid = np.asarray(Image.open(tmp_path / "samples" / "grid.png"))
        side = 32 + 2  # 8 px enlarged fourfold, and the space between
        assert grid.shape == (2 * side + 2, 10 * side + 2, 3)
        for number in range(12):
            top, left = 2 + number // 10 * side, 2 + number % 10 * side
            assert (grid[top : top + 32, left : left + 32] == number * 20).all()
        assert (grid[:2] == 255).all()

    def test_larger_images_keep_their_size_and_colour(self, tmp_path):
        pixels = torch.randint(0, 256, (3, 3, 40, 40), dtype=torch.uint8)
        write_grid(pixels, tmp_path / "grid.png")
        grid = np.asarray(Image.open(tmp_path / "grid.png"))
        assert np.array_equal(grid[2:42, 44:84], pixels[1].permute(1, 2, 0).numpy())
