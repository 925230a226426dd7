"""The layer by timestep profile: one measuring for all blocks, and the run's own number among its values."""

from __future__ import annotations

import itertools
from importlib.metadata import version

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from repa_lab.align.settings import EncoderSettings
from repa_lab.align.tokens import flatten_map
from repa_lab.data.sources import Split
from repa_lab.metrics import cka, cknna, lds, mutual_knn, rmsc
from repa_lab.models.tap import Denoiser, Tap, TapError
from repa_lab.runs import RunDirectory, RunWriter
from repa_lab.spec import RunOptions
from repa_lab.training.aligner import open_targets
from repa_lab.training.batches import Images
from repa_lab.training.checkpoint import NoWeightsError
from repa_lab.training.diffusion import Flow
from repa_lab.training.evaluate import held_out_batches
from repa_lab.training.model import Labels, Model, open_model
from repa_lab.training.profile import (
    METRICS,
    ProfileError,
    Request,
    choose_images,
    measure_profile,
    profile_run,
)
from tests.training.conftest import ENCODER, OFF, UNET, make_options, make_run, rows, run_steps, run_to_end
from tests.training.pretrained import make_pretrained_run, open_pretrained, write_images, write_pipeline

CPU = torch.device("cpu")
HALF = Request(timesteps=(0.5,))


def values(profile: dict) -> dict:
    return {(one["block"], one["timestep"], one["metric"]): one["value"] for one in profile["values"]}


def measured(directory: RunDirectory) -> float:
    return [row["heldout/cka"] for row in rows(directory) if "heldout/cka" in row][-1]


@pytest.fixture(scope="module")
def trained(cache, tmp_path_factory) -> RunDirectory:
    """A run to its end; at this rate its averages are not its last weights."""
    run = make_run(**{"train.ema": 0.5, "train.lr": 0.05, "evaluate.timestep": 0.3})
    return run_to_end(run, RunDirectory(tmp_path_factory.mktemp("runs") / "sit"), cache)


class TestTheRunsOwnNumber:
    """At the run's own block and time a profile is the run's own measurement to the last digit."""

    def test_of_a_sit(self, trained, cache):
        found = profile_run(trained, Request(), make_options(), cache)
        assert values(found)[1, 0.3, "cka"] == measured(trained)
        assert (found["measured_block"], found["aligned_block"]) == (1, 1)
        assert len(found["values"]) == 4 * 5 * len(METRICS)
        assert trained.profile == found
        last = profile_run(trained, Request(weights="last"), make_options(), cache)
        assert values(last)[1, 0.3, "cka"] != measured(trained)

    def test_of_a_unet_in_bf16(self, cache, fresh):
        run = make_run(**UNET, **{"regularizer.type": "urepa"})
        directory = run_to_end(run, fresh(), cache, precision="bf16")
        profile = profile_run(directory, HALF, RunOptions(device="cpu"), cache)  # auto: as the run was trained
        assert profile["protocol"]["precision"] == "bf16"
        found = values(profile)
        assert found["mid", 0.5, "cka"] == measured(directory)
        assert values(profile_run(directory, HALF, make_options(), cache))["mid", 0.5, "cka"] != measured(directory)

    def test_of_a_baseline_measured_at_a_block_of_its_own(self, cache, fresh):
        settings = {**OFF, "evaluate.encoder": ENCODER, "evaluate.block_index": 2}
        directory = run_to_end(make_run(**settings), fresh(), cache)
        found = profile_run(directory, HALF, make_options(), cache)
        assert values(found)[2, 0.5, "cka"] == measured(directory)
        assert (found["measured_block"], found["aligned_block"]) == (2, None)

    def test_of_flux_with_images_of_several_aspects(self, tmp_path):
        buckets = {"data.buckets": {"step": 16, "max_aspect": 2.0}, "train.steps": 2}
        run = make_pretrained_run(
            "flux", write_pipeline("flux", tmp_path / "flux"), write_images(tmp_path / "images"), **buckets
        )
        images = open_pretrained(run, tmp_path / "cache")
        assert len({tuple(size) for size in images.source.sizes[images.split.held_out].tolist()}) > 1
        directory = run_to_end(run, RunDirectory(tmp_path / "run"), tmp_path / "cache")
        found = values(profile_run(directory, Request((0.5,), ("cka", "rmsc")), make_options(), tmp_path / "cache"))
        assert [block for block, _, metric in found if metric == "cka"] == [0, 1, 2, 3]
        assert found[0, 0.5, "cka"] == measured(directory)

    def test_of_stable_diffusions_mid_block(self, tmp_path):
        run = make_pretrained_run(
            "sd15", write_pipeline("sd15", tmp_path / "sd15"), write_images(tmp_path / "images"), **{"train.steps": 1}
        )
        open_pretrained(run, tmp_path / "cache")
        directory = run_to_end(run, RunDirectory(tmp_path / "run"), tmp_path / "cache")
        found = values(profile_run(directory, Request((0.5,), ("cka",)), make_options(), tmp_path / "cache"))
        stages = [f"down_blocks.{n}" for n in range(4)], ["mid"], [f"up_blocks.{n}" for n in range(4)]
        assert [block for block, *_ in found] == list(itertools.chain(*stages))
        assert found["mid", 0.5, "cka"] == measured(directory)


@pytest.fixture(scope="module")
def targets(images, cache):
    return open_targets(make_run().config.regularizer.encoder, images, make_options(), cache, CPU)


def test_every_block_is_what_a_single_tap_of_it_gives(images, cache, targets):
    model = open_model(make_run(), images, make_options(), cache, CPU)
    for parameter in model.denoiser.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    model.denoiser.eval()
    chosen = images.split.held_out
    found = values({"values": measure_profile(model, images, targets, Request((0.2, 0.8)), chosen, CPU)})
    theirs = targets(chosen, CPU).values.mean(1)
    for block, t in itertools.product(range(4), (0.2, 0.8)):
        tap, parts = model.denoiser.tap(block), []
        with torch.no_grad():
            for index in held_out_batches(images, chosen, model.at_once):
                model.show(images, index, t, CPU)
                parts.append(tap.take())
        tap.remove()
        ours = torch.cat([part.values.mean(1) for part in parts])
        tokens = torch.cat([part.values for part in parts])
        assert found[block, t, "cka"] == cka(ours, theirs)
        assert found[block, t, "cknna"] == cknna(ours, theirs, 10)
        assert found[block, t, "mutual_knn"] == mutual_knn(ours, theirs, 10)
        assert found[block, t, "lds"] == pytest.approx(lds(tokens, (4, 4)), abs=1e-12)
        assert found[block, t, "rmsc"] == pytest.approx(rmsc(tokens, (4, 4)), abs=1e-12)


def test_an_untrained_sits_blocks_all_know_the_same(images, cache, targets):
    """adaLN-zero: no block changes its input yet. Beyond the image itself they know nothing of the time."""
    model = open_model(make_run(), images, make_options(), cache, CPU)
    found = values({"values": measure_profile(model, images, targets, Request((0.1, 0.9)), images.split.held_out, CPU)})
    for t, metric in itertools.product((0.1, 0.9), METRICS):
        assert len({found[block, t, metric] for block in range(4)}) == 1, metric
    assert found[0, 0.1, "cka"] != found[0, 0.9, "cka"]


class Given(Denoiser):
    """A denoiser whose block yields a map that was made by hand for each image, told by the image's first pixel."""

    def __init__(self, maps: torch.Tensor) -> None:
        super().__init__()
        block = nn.Identity()
        self.maps, self.block, self.depth = maps, block, 1
        self.tap = lambda block_index: Tap(block, flatten_map)

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        self.block(self.maps[: len(x)])
        self.maps = torch.cat([self.maps[len(x) :], self.maps[: len(x)]])
        return x


def given(images: Images, maps: torch.Tensor, at_once: int) -> tuple[Model, Images, torch.Tensor]:
    model = Model(Given(maps), Flow(), Labels(images.source.labels, 10, 10), None, at_once)
    return model, images, images.split.held_out[: len(maps)]


def spatial(images, targets, maps: torch.Tensor, at_once: int = 2) -> dict[str, float]:
    model, images, chosen = given(images, maps, at_once)
    found = measure_profile(model, images, targets, Request((0.5,), ("lds", "cds", "rmsc")), chosen, CPU)
    return {one["metric"]: one["value"] for one in found}


HALVES = torch.zeros(2, 4, 4)  # on a grid of 4 x 4: the left half is one direction, the right half another
HALVES[0, :, :2], HALVES[1, :, 2:] = 2.0, 0.5


class TestSpatialMetrics:
    def test_by_hand_on_two_halves(self, images, targets):
        """Of 24 neighbours 4 cross the middle; the two pairs six apart lie across it; every token is sqrt(1/2) from the mean."""
        found = spatial(images, targets, HALVES.expand(3, 2, 4, 4))
        assert found["lds"] == pytest.approx(20 / 24 - 0)
        assert found["rmsc"] == pytest.approx(0.5**0.5)
        places = [(r, c) for r in range(4) for c in range(4)]
        pairs = [
            (abs(a[0] - b[0]) + abs(a[1] - b[1]), (a[1] < 2) == (b[1] < 2))
            for a, b in itertools.combinations(places, 2)
        ]
        means = [np.mean([same for d, same in pairs if d == distance]) for distance in range(1, 7)]
        assert found["cds"] == pytest.approx(-np.polyfit(range(1, 7), means, 1)[0])

    def test_every_image_counts_alike_whatever_its_batch(self, images, targets):
        """Two constant maps in the first batch, one of halves in the second."""
        constant = torch.ones(2, 2, 4, 4)
        found = spatial(images, targets, torch.cat([constant, HALVES[None]]))
        assert found["rmsc"] == pytest.approx(0.5**0.5 / 3)
        assert found["lds"] == pytest.approx(20 / 24 / 3)

    def test_a_large_grid_is_measured_at_sixteen(self, images, targets):
        coarse = torch.randn(2, 5, 8, 16)
        fine = coarse.repeat_interleave(2, 2).repeat_interleave(2, 3)
        found, expected = spatial(images, targets, fine), spatial(images, targets, coarse)
        assert found == {name: pytest.approx(value, abs=1e-6) for name, value in expected.items()}
        assert expected["lds"] == pytest.approx(lds(coarse.flatten(2).mT, (8, 16)))

    def test_a_grid_too_small_for_a_metric_has_no_value_of_it(self, images, targets):
        assert spatial(images, targets, torch.randn(2, 5, 3, 4)).keys() == {"cds", "rmsc"}
        assert spatial(images, targets, torch.randn(2, 5, 1, 2)).keys() == {"rmsc"}
        assert spatial(images, targets, torch.randn(2, 5, 1, 1)).keys() == set()


class TestWhatCannotBeMeasured:
    @pytest.mark.parametrize("wrong, message", [
        ({"timesteps": (0.5, 1.5)}, r"different numbers from 0 \(data\) to 1 \(noise\), got \[0.5, 1.5\]"),
        ({"timesteps": (0.5, 0.5)}, "different numbers"),
        ({"timesteps": ()}, "different numbers"),
        ({"metrics": ("cka", "knn")}, "unknown metric 'knn'; allowed: cka, cknna, mutual_knn, lds, cds, rmsc"),
        ({"metrics": ()}, "unknown metric ''"),
    ])  # fmt: skip
    def test_a_request_is_refused_before_anything_is_loaded(self, wrong, message):
        with pytest.raises(ProfileError, match=message):
            Request(**wrong)

    def test_too_few_images_for_the_neighbours(self, images):
        few = Images(images.source, Split(images.split.train, images.split.held_out[:10]), images.space)
        with pytest.raises(
            ProfileError, match="cknna needs 11 or more held-out images, got 10; leave it out of the metrics"
        ):
            choose_images(few, Request(), "r")
        assert len(choose_images(few, Request(metrics=("cka", "lds")), "r")) == 10
        with pytest.raises(ProfileError, match="11 samples are asked for, and run r holds out 10 images"):
            choose_images(few, Request(samples=11), "r")

    def test_a_run_without_checkpoint_or_encoder(self, fresh, cache):
        run = make_run(**OFF)
        with RunWriter(fresh()) as writer:
            writer.describe(run.to_json(), {})
        with pytest.raises(NoWeightsError, match="run run has no checkpoint yet"):
            profile_run(fresh(), HALF, make_options(), cache)
        directory = run_steps(run, fresh("off"), cache, 1)
        with pytest.raises(NoWeightsError, match="unknown weights 'best'; allowed: ema, last"):
            profile_run(directory, Request(weights="best"), make_options(), cache)
        with pytest.raises(ProfileError, match="run off is compared with no encoder; name one"):
            profile_run(directory, HALF, make_options(), cache)
        named = Request((0.5,), encoder=EncoderSettings(**ENCODER))
        assert profile_run(directory, named, make_options(), cache)["aligned_block"] is None

    def test_a_diverged_block_is_named(self, images, cache, targets):
        model = open_model(make_run(), images, make_options(), cache, CPU)
        nn.init.constant_(model.denoiser.blocks[2].adaLN_modulation[-1].bias, torch.inf)
        with pytest.raises(ProfileError, match=r"block 2 at timestep 0\.5 yields values that are not finite"):
            measure_profile(model, images, targets, HALF, images.split.held_out, CPU)
        assert not model.denoiser.blocks[0]._forward_hooks

    def test_a_block_that_no_pass_reaches(self, images, targets):
        model, images, chosen = given(images, torch.randn(2, 5, 4, 4), 2)
        aside = model.denoiser.block
        model.denoiser.block = nn.Identity()
        with pytest.raises(TapError, match=r"block 0 at timestep 0\.5 saw 0 images of 2"):
            measure_profile(model, images, targets, Request((0.5,), ("rmsc",)), chosen, CPU)
        assert not aside._forward_hooks


def test_fewer_images_are_spread_over_all_that_are_held_out(images):
    held_out = images.split.held_out
    assert torch.equal(choose_images(images, Request(samples=None), "r"), held_out)
    some = choose_images(images, Request(samples=20), "r")
    assert len(some.unique()) == 20
    assert some[0] == held_out[0] and some[-1] >= held_out[-6]


def test_the_protocol_says_what_decides_a_value(trained, cache, images):
    found = profile_run(trained, Request((0.5,), ("cka", "cknna"), samples=30), make_options(), cache)["protocol"]
    assert found["step"] == 5
    assert found["encoder"]["name"] == "efficientnet_lite0" and found["encoder"]["image_size"] == 32
    assert (found["images"], found["data"], found["seed"], found["k"]) == (30, images.source.fingerprint, 0, 10)
    assert (found["weights"], found["timesteps"], found["metrics"], found["precision"]) == (
        "ema",
        [0.5],
        ["cka", "cknna"],
        "fp32",
    )
    assert found["packages"]["torch"] == version("torch")
    assert "noise_batch" not in found


def test_profiles_under_the_noise_of_other_batches_are_of_two_protocols(cache, fresh):
    directories = [
        run_steps(make_run(**settings), fresh(name), cache)
        for name, settings in (("a", {}), ("b", {"evaluate.batch_size": 8}))
    ]
    one, other = (profile_run(directory, Request((0.5,), ("cka",)), make_options(), cache) for directory in directories)
    assert {**one["protocol"], "noise_batch": 8} == other["protocol"]
    assert values(one) != values(other)


def test_a_file_of_weights_is_named_by_its_content(trained, cache, tmp_path):
    kept = []
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        torch.manual_seed(seed)
        save_file(timm.create_model("tf_efficientnet_lite0").state_dict(), tmp_path / f"{name}.safetensors")
        encoder = EncoderSettings(**ENCODER, cache=False, weights=str(tmp_path / f"{name}.safetensors"))
        kept.append(
            profile_run(trained, Request((0.5,), ("cka",), encoder=encoder), make_options(), cache)["protocol"][
                "encoder"
            ]
        )
    assert kept[0] == kept[1] != kept[2]
    assert profile_run(trained, HALF, make_options(), cache)["protocol"]["encoder"]["weights"] is None


def test_tokens_of_a_pass_are_what_the_denoiser_saw_at_that_time(images, cache):
    """The noise of measuring is one and the same at every time; only its share changes."""
    seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    class Recorder(nn.Module):
        def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            seen.append((x, t, y))
            return x

    model = Model(Recorder(), Flow(), Labels(images.source.labels, 10, 10), None, 3)
    index = images.split.held_out[:3]
    for t in (0.0, 0.25, 1.0):
        model.show(images, index, t, CPU)
    (clean, _, labels), (between, times, _), (noise, _, _) = seen
    assert torch.equal(clean, images.source.read(index.tolist()).float() / 127.5 - 1)
    torch.testing.assert_close(between, 0.75 * clean + 0.25 * noise)
    assert labels.tolist() == [10, 10, 10] and times.tolist() == [0.25] * 3
