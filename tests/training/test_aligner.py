from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch

from repa_lab.align import REPA, UREPA, Prediction, Tokens
from repa_lab.encoders.targets import CachedTargets, OnlineTargets
from repa_lab.models.family import UNET_SHAPES
from repa_lab.models.tap import Denoiser, TapError
from repa_lab.timm_models import EncoderError
from repa_lab.training import aligner as aligner_module
from repa_lab.training.aligner import Aligner, open_targets
from repa_lab.training.batches import Batch
from repa_lab.training.model import open_model
from repa_lab.training.resolve import choose_block
from tests.training.conftest import UNET, make_options, make_regularizer, make_run

CPU = torch.device("cpu")


class CountingTargets:
    """Fixed tokens on a 2x2 grid; counts how often it was asked."""

    dim, reader = 12, None

    def __init__(self) -> None:
        self.asked: list[list[int]] = []
        self.loaded: list[torch.Tensor | None] = []

    def __call__(self, index: torch.Tensor, device: torch.device, loaded: torch.Tensor | None = None) -> Tokens:
        self.asked.append(index.tolist())
        self.loaded.append(loaded)
        return Tokens(torch.arange(len(index) * 48.0).view(len(index), 4, 12).sin(), (2, 2))


def make_aligner(images, **settings) -> tuple[Aligner, Denoiser, list[CountingTargets]]:
    run = make_run(**settings)
    model = open_model(run, images, make_options(), Path(), CPU)
    with mock.patch.object(aligner_module, "open_targets", lambda *arguments, **options: CountingTargets()):
        aligner = Aligner(run, images, model, make_options(), Path(), CPU)
    for parameter in model.denoiser.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    return aligner, model.denoiser, [*aligner.targets.values()]


def batch_of(index: torch.Tensor, loaded: tuple[torch.Tensor | None, ...] = ()) -> Batch:
    return Batch(index, *[torch.zeros(len(index))] * 3, {}, loaded)


def align(aligner: Aligner, batch: Batch, step: int = 0) -> torch.Tensor | None:
    nothing = Prediction(torch.zeros(()), torch.zeros(()))
    return aligner(aligner.active(step), batch, step, nothing, batch.t, {})[0]


def pass_through(denoiser) -> None:
    denoiser(torch.randn(3, 1, 8, 8), torch.rand(3), torch.arange(3))


@pytest.mark.parametrize("settings", [{}, {**UNET, "regularizer.type": "urepa"}], ids=["sit", "unet"])
def test_aligns_the_tap_with_the_targets_of_these_images(images, settings):
    aligner, denoiser, (counting,) = make_aligner(images, **settings)
    pass_through(denoiser)
    index = torch.tensor([4, 2, 9])
    alignment = align(aligner, batch_of(index))
    assert counting.asked == [[4, 2, 9]]
    pass_through(denoiser)
    (tap,) = aligner.taps.values()
    student = tap.take()
    assert (student.grid, student.dim) == ((4, 4), UNET_SHAPES["nano"].width if settings else 64)
    assert alignment.requires_grad
    alignment.backward()
    assert all(parameter.grad is not None for parameter in aligner.module.parameters())


def test_what_was_loaded_ahead_goes_to_its_targets(images):
    encoders = [{"name": "efficientnet_lite0", "image_size": size} for size in (32, 64)]
    aligner, denoiser, (first, second) = make_aligner(images, **{"regularizer.encoder": encoders})
    pass_through(denoiser)
    loaded = torch.ones(3)
    align(aligner, batch_of(torch.arange(3), (None, loaded)))
    assert first.loaded == [None]
    assert second.loaded == [loaded]


def test_gradients_reach_the_blocks_up_to_the_tap(images):
    aligner, denoiser, _ = make_aligner(images, **{"regularizer.block_index": 2})
    pass_through(denoiser)
    align(aligner, batch_of(torch.arange(3))).backward()
    reached = [
        any(p.grad is not None and p.grad.abs().max() > 0 for p in block.parameters()) for block in denoiser.blocks
    ]
    assert reached == [True, True, True, False]


def test_weight_0_asks_no_encoder_and_keeps_no_activations(images):
    schedule = {"type": "constant", "cutoff_step": 2}
    aligner, denoiser, (counting,) = make_aligner(images, **{"regularizer.schedule": schedule})
    for step in range(5):
        pass_through(denoiser)
        assert len(aligner.active(step)) == (step < 2)
        loss = align(aligner, batch_of(torch.arange(3)), step)
        assert (loss is not None) == (step < 2)
    assert len(counting.asked) == 2
    with pytest.raises(TapError):
        aligner.taps[1].take()


def test_the_schedule_counts_steps_already_taken(images):
    schedule = {"type": "cosine", "warmup_steps": 100, "decay_steps": 5000}
    run = make_run(**{"regularizer.schedule": schedule, "train.steps": 5000})
    regularizer = make_regularizer(run)
    found = [regularizer.weight_at(step) for step in (0, 50, 100, 2550, 5000)]
    assert found == pytest.approx([0, 0.25, 0.5, 0.25, 0], abs=1e-12)


def test_a_decay_without_an_end_ends_with_the_training(images):
    run = make_run(**{"regularizer.schedule": {"type": "linear"}, "train.steps": 40})
    assert [make_regularizer(run).weight_at(step) for step in (0, 20, 40)] == [0.5, 0.25, 0]


U_SHAPED = {**UNET, "regularizer.type": "urepa", "regularizer.manifold_weight": 0.0}


@pytest.mark.parametrize("settings, kind, block", [({}, REPA, 1), (U_SHAPED, UREPA, "mid")])
def test_the_regularizer_is_what_the_spec_says(settings, kind, block):
    run = make_run(**{**settings, "regularizer.weight": 0.0})
    built = make_regularizer(run)
    assert type(built) is kind
    assert built.weight_at(0) == 0.0
    assert kind is REPA or built.settings.manifold_weight == 0.0
    assert built.settings.block_index == block  # the family's suggestion, as a number


def test_the_projector_is_initialised_from_its_own_stream():
    def state(seed: int = 0, **settings) -> dict[str, torch.Tensor]:
        torch.manual_seed(torch.seed())  # whatever stands in torch's own generator
        return make_regularizer(make_run(seed, **settings)).state_dict()

    first = state()
    for other in (state(), state(**{"regularizer.weight": 0.1}), state(**{"regularizer.type": "urepa"})):
        assert all(torch.equal(first[name], value) for name, value in other.items())
    assert not torch.equal(first["projectors.0.net.layers.0.weight"], state(1)["projectors.0.net.layers.0.weight"])


MISSING = [({"regularizer.block_index": 4}, "sit has 4 blocks"), ({**UNET, "regularizer.block_index": 0}, "mid")]


@pytest.mark.parametrize("settings, match", MISSING, ids=["sit", "unet"])
def test_a_block_that_is_not_there_is_refused(images, settings, match):
    with pytest.raises(TapError, match=match):
        make_aligner(images, **settings)


def test_the_first_wish_counts_and_0_is_a_wish():
    config = make_run().config
    assert choose_block(config) == 1  # what SiT nano suggests
    assert choose_block(config, None, 3, 2) == 3
    assert choose_block(config, 0, 3) == 0
    assert choose_block(make_run(**UNET).config, None) == "mid"


def test_targets_come_from_the_cache_unless_told_otherwise(images, cache):
    config = make_run().config.regularizer.encoder
    assert isinstance(open_targets(config, images, make_options(), cache, CPU), CachedTargets)
    online = config.model_copy(update={"cache": False})
    assert isinstance(open_targets(online, images, make_options(), cache, CPU), OnlineTargets)


def test_an_online_encoder_is_named_when_it_is_refused(images, cache):
    config = make_run().config.regularizer.encoder.model_copy(update={"cache": False, "image_size": 16})
    with pytest.raises(EncoderError, match="'efficientnet_lite0' gives one token"):
        open_targets(config, images, make_options(), cache, CPU)


def test_long_work_is_announced(images, tmp_path):
    heard: list[tuple[str, int, int]] = []
    settings = make_run().config.regularizer.encoder

    class Few:
        """The first images only: the digits take seconds."""

        channels, side, num_classes, clip_frames, fingerprint = 1, 8, 10, 0, "few"
        sizes = torch.full((5, 2), 8)

        def __len__(self) -> int:
            return 5

        def read(self, index) -> torch.Tensor:
            return images.source.read(index)

        def frames(self, index) -> torch.Tensor:
            return images.source.frames(index)

    few = replace(images, source=Few())
    open_targets(
        settings, few, make_options(), tmp_path, CPU, lambda task: lambda done, total: heard.append((task, done, total))
    )
    assert heard == [("features of efficientnet_lite0", 5, 5)]
