from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from repa_lab.align import REPA, Tokens
from repa_lab.data.fingerprint import DataError
from repa_lab.data.sources import split
from repa_lab.encoders.extractor import Extractor
from repa_lab.metrics import cka, cosine_gap, frechet_distance, statistics
from repa_lab.models.family import BUILDERS
from repa_lab.training.aligner import open_targets
from repa_lab.training.evaluate import DivergedError, Evaluator, reference_statistics, write_grid
from repa_lab.training.images import Images
from repa_lab.training.sampling import Sampling
from repa_lab.training.streams import generator
from repa_lab.training.trainer import build_denoiser
from tests.training.conftest import make_options, make_run

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


def make_evaluator(few, cache, targets=None, seed: int = 0, **settings) -> Evaluator:
    config = make_run(**{f"evaluate.{name}": value for name, value in settings.items()}).config.evaluate
    return Evaluator(config, few, seed, targets, cache, CPU)


@pytest.fixture(scope="module")
def extractor() -> Extractor:
    return Extractor("efficientnet_lite0", None, CPU)


class TestQuality:
    def test_is_the_distance_of_the_samples_to_the_training_images(self, few, cache, denoiser, extractor):
        config = make_run().config.evaluate
        row, shown = make_evaluator(few, cache).quality(denoiser)
        sampling = Sampling((1, 8, 8), 10, config.sampler, config.guidance, 0)
        drawn = few.space.decode(next(sampling.batches(denoiser, 16, 125, CPU))[1])
        samples = statistics(extractor(drawn))
        real = statistics(extractor(few.source.read(few.split.train.tolist())))
        expected = frechet_distance(samples.mu, samples.sigma, real.mu, real.sigma)
        assert row == {"frechet:efficientnet_lite0@16/ode2": pytest.approx(expected, rel=1e-6)}
        assert torch.equal(shown, drawn)

    def test_shows_the_first_samples_only(self, few, cache, denoiser):
        _, shown = make_evaluator(few, cache, samples=50, batch_size=7).quality(denoiser)
        assert (shown.shape, shown.dtype) == ((40, 1, 8, 8), torch.uint8)

    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    def test_samples_that_are_not_finite_are_no_images(self, few, cache, value):
        class Broken(nn.Module):
            def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
                return torch.full_like(x, value)

        with pytest.raises(DivergedError, match="samples that are not finite"):
            make_evaluator(few, cache).quality(Broken())


class TestReference:
    def test_is_computed_once_for_good(self, few, tmp_path, extractor):
        config = make_run().config.evaluate.extractor
        asked: list[int] = []

        def counting(pixels: torch.Tensor) -> np.ndarray:
            asked.append(len(pixels))
            return extractor(pixels)

        first = reference_statistics(config, counting, few, tmp_path)
        again = reference_statistics(config, counting, few, tmp_path)
        assert asked == [60]
        assert first.count == again.count == 60
        assert np.array_equal(first.mu, again.mu) and np.array_equal(first.sigma, again.sigma)

    def test_other_training_images_are_another_reference(self, few, tmp_path, extractor):
        config = make_run().config.evaluate.extractor
        less = Images(few.source, type(few.split)(few.split.train[:30], few.split.held_out), few.space)
        first, second = (reference_statistics(config, extractor, one, tmp_path) for one in (few, less))
        assert (first.count, second.count) == (60, 30)
        assert len(list((tmp_path / "reference").iterdir())) == 2


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
            tokens = denoiser.blocks[number](tokens, condition)
        found.append(tokens)
    return torch.cat(found)


class TestAlignment:
    def measure(self, evaluator, denoiser, block=2, match=None):
        tap = BUILDERS["sit"].tap(denoiser, block)
        try:
            return evaluator.alignment(denoiser, tap, match)
        finally:
            tap.remove()

    def test_compares_held_out_images_under_the_null_label(self, few, cache, denoiser, targets):
        evaluator = make_evaluator(few, cache, targets, timestep=0.3, batch_size=16)
        row = self.measure(evaluator, denoiser)
        student = tokens_by_hand(few, denoiser, 2, 0.3, 16)
        teacher = targets(few.split.held_out, CPU).values
        assert row == {"heldout/cka": pytest.approx(cka(student.mean(1), teacher.mean(1)), abs=1e-5)}

    def test_the_projector_speaks_of_its_own_tap(self, few, cache, denoiser, targets):
        torch.manual_seed(3)
        regularizer = REPA(64, targets.dim, width=16)
        row = self.measure(make_evaluator(few, cache, targets, batch_size=16), denoiser, 2, regularizer.match)
        student = Tokens(tokens_by_hand(few, denoiser, 2, 0.5, 16), (4, 4))
        teacher = targets(few.split.held_out, CPU)
        with torch.no_grad():
            projected = regularizer.projectors[0].project(student).resample((2, 2)).values
        matched, gap = cosine_gap(projected, teacher.values)
        assert row["heldout/cosine"] == pytest.approx(matched, abs=1e-6)
        assert row["heldout/gap"] == pytest.approx(gap, abs=1e-6)
        assert row.keys() == {"heldout/cka", "heldout/cosine", "heldout/gap"}

    def test_every_seed_is_measured_under_the_same_noise(self, few, cache, denoiser, targets):
        rows = [self.measure(make_evaluator(few, cache, targets, seed), denoiser) for seed in (0, 1)]
        assert rows[0] == rows[1]

    def test_nothing_is_measured_without_an_encoder(self, few, cache, denoiser):
        assert self.measure(make_evaluator(few, cache), denoiser) == {}

    def test_too_few_held_out_images_are_refused_before_training(self, images, cache, targets):
        held = type(images.split)(images.split.train, images.split.held_out[:3])
        with pytest.raises(DataError, match="hold out 4 or more") as caught:
            make_evaluator(Images(images.source, held, images.space), cache, targets)
        assert caught.value.field == "holdout"


class TestGrid:
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
