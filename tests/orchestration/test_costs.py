"""What runs cost: against the papers' numbers, against torch's own counting, and by hand."""

from __future__ import annotations

from unittest import mock

import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from repa_lab.align.methods.haste import attention_loss
from repa_lab.align.regularizer import Attention
from repa_lab.align.settings import ProjectorSettings
from repa_lab.align.tokens import Projector, Tokens
from repa_lab.encoders.registry import ENCODERS, encoder_flops, encoder_weights
from repa_lab.models import flops
from repa_lab.models.families import FAMILIES
from repa_lab.models.family import SIT, SIT_DOWN, UNET, shape_of
from repa_lab.models.scratch import CLASSES, Input, build
from repa_lab.models.sit import SiT
from repa_lab.spec import Machine, load_spec
from repa_lab.training.costs import caches_of, cost_of
from tests.models.counting import adapted, checkpointed_share, count, count_checkpointed, count_family, native_side

REPA = {
    "name": "x",
    "model": {"family": "sit", "size": "B/2"},
    "regularizer": {"type": "repa", "encoder": {"name": "dinov2_vitb14"}},
    "data": {"source": "imagefolder", "path": None, "vae": "a-vae"},
    "train": {"steps": 100, "batch_size": 256},
    "evaluate": {"every": 50, "samples": 1000},
    "run": {"precision": "bf16", "device": "cpu"},
}
DIGITS = {
    "name": "x",
    "model": {"family": "sit", "size": "nano/2"},
    "data": {"source": "digits"},
    "train": {"steps": 10, "batch_size": 8},
    "evaluate": {"every": 5, "samples": 16, "extractor": {"name": "efficientnet_lite0"}},
    "run": {"device": "cpu"},
}


def spec_of(base=REPA, overrides=None, **fields):
    return load_spec({**base, **fields}, overrides)


def cost(overrides=None, base=REPA):
    spec = spec_of(base, overrides)
    return cost_of(spec.arms[0].config, spec.run.resolved(Machine()))


@pytest.mark.parametrize(
    ("size", "gmacs", "parameters"),
    [("B/2", 23.00, 130_500_112), ("L/2", 80.69, 458_086_416), ("XL/2", 118.62, 675_111_184)],
)
def test_sit_costs_what_the_papers_say(size, gmacs, parameters):
    found = flops.forward_of(SIT, size, 256, 4, 1000)
    assert round(found.flops / 2e9, 2) == gmacs
    assert found.parameters == parameters


@pytest.mark.parametrize(
    ("size", "channels", "side", "classes"), [("nano/2", 1, 8, 10), ("S/4", 4, 64, 1000), ("B/2", 4, 32, 5)]
)
def test_sits_formula_is_what_torch_counts(size, channels, side, classes):
    shape = shape_of(SIT, size)
    with torch.device("meta"):
        net = build("sit", size, Input(channels, (side, side), classes))
    x, t, y = (
        torch.empty(1, channels, side, side, device="meta"),
        torch.empty(1, device="meta"),
        torch.zeros(1, dtype=torch.long, device="meta"),
    )
    counted, kept = count(lambda: net(x, t, y), net)
    tokens = (side // shape.stride) ** 2
    found = flops.forward_of(SIT, size, tokens, channels, classes)
    assert found.flops == counted
    assert found.parameters == sum(parameter.numel() for parameter in net.parameters())

    def left_out(blocks: int) -> int:
        """The image, 256 features of its time, two statistics of each norm, and what is one vector for an image."""
        return channels * side**2 + 256 + 2 * (2 * blocks + 1) * tokens + (9 * blocks + 5) * shape.width

    assert kept - found.kept == left_out(shape.depth)
    checkpointed = count_checkpointed(lambda: net(x, t, y), net)
    assert checkpointed - left_out(1) == pytest.approx(found.kept * found.kept_checkpointed, rel=1e-12)


@pytest.mark.parametrize("size", ["nano/2", "XL/2"])
def test_a_second_time_in_an_image_costs_a_sit_what_torch_counts(size):
    with torch.device("meta"):
        net = SiT.from_size(size)
    x, y = torch.empty(1, 4, 32, 32, device="meta"), torch.zeros(1, dtype=torch.long, device="meta")
    (one, one_kept), (two, two_kept) = (
        count(lambda t=t: net(x, t, y), net)
        for t in (torch.empty(1, device="meta"), torch.empty(1, 1, 16, 16, device="meta"))
    )
    found = flops.forward_of(SIT, size, 256, 4, 1000)
    assert found.second_time_flops == two - one
    assert found.second_time_kept == pytest.approx(two_kept - one_kept, rel=0.06)


@pytest.mark.parametrize(
    ("size", "channels", "side", "classes"),
    [("nano/2", 1, 8, 10), ("narrow-L/2", 4, 64, 7), ("B/2", 4, 32, 5), ("L/2", 4, 32, 1000)],
)
def test_sit_downs_formula_is_what_torch_counts(size, channels, side, classes):
    shape = shape_of(SIT_DOWN, size)
    with torch.device("meta"):
        net = build("sit_down", size, Input(channels, (side, side), classes))
    x, t, y = (
        torch.empty(1, channels, side, side, device="meta"),
        torch.empty(1, device="meta"),
        torch.zeros(1, dtype=torch.long, device="meta"),
    )
    counted, kept = count(lambda: net(x, t, y), net)
    tokens, (before, middle, after) = (side // shape.stride) ** 2, shape.stages
    found = flops.forward_of(SIT_DOWN, size, tokens, channels, classes)
    assert found.flops == counted
    assert found.parameters == sum(parameter.numel() for parameter in net.parameters())

    def left_out(outer: int, inner: int) -> int:
        """As for a SiT; a block of an outer stage has four times as many tokens, and so has the last layer."""
        statistics = 2 * (2 * outer + 1) * 4 * tokens + 2 * 2 * inner * tokens
        return channels * side**2 + 256 + statistics + (9 * (outer + inner) + 5) * shape.width

    assert kept - found.kept == left_out(before + after, middle)
    checkpointed = count_checkpointed(lambda: net(x, t, y), net)
    assert checkpointed - left_out(1, 0) == pytest.approx(found.kept * found.kept_checkpointed, rel=1e-12)


def test_every_family_from_scratch_has_a_cost():
    assert flops.FROM_SCRATCH.keys() == CLASSES.keys()


def test_kept_numbers_are_near_the_count_for_a_real_sit():
    with torch.device("meta"):
        net = SiT.from_size("XL/2")
    x, t, y = (
        torch.empty(1, 4, 32, 32, device="meta"),
        torch.empty(1, device="meta"),
        torch.zeros(1, dtype=torch.long, device="meta"),
    )
    assert flops.forward_of(SIT, "XL/2", 256, 4, 1000).kept == pytest.approx(
        count(lambda: net(x, t, y), net)[1], rel=0.002
    )


@pytest.mark.parametrize(
    ("size", "channels", "side", "classes"),
    [("nano", 1, 8, 10), ("S", 4, 32, 1000), ("B", 3, 48, 2), ("narrow-S", 4, 16, 10)],
)
def test_unets_from_scratch_are_as_counted_at_any_size(size, channels, side, classes):
    shape = shape_of(UNET, size)
    with torch.device("meta"):
        net = build("unet", size, Input(channels, (side, side), classes)).eval()
    x, t, y = (
        torch.empty(1, channels, side, side, device="meta"),
        torch.empty(1, device="meta"),
        torch.zeros(1, dtype=torch.long, device="meta"),
    )
    counted, _ = count(lambda: net(x, t, y), net)
    found = flops.forward_of(UNET, size, (side // shape.stride) ** 2, channels, classes)
    assert found.flops == pytest.approx(counted, rel=1e-4)
    assert found.parameters == sum(parameter.numel() for parameter in net.parameters())


@pytest.mark.parametrize("size", flops.COUNTED_UNETS)
def test_a_checkpointed_unet_keeps_the_counted_share(size):
    with torch.device("meta"):
        net = build("unet", size, Input(4, (64, 64), 1000)).eval()
    x, t, y = (
        torch.empty(1, 4, 64, 64, device="meta"),
        torch.empty(1, device="meta"),
        torch.zeros(1, dtype=torch.long, device="meta"),
    )
    kept, checkpointed = count(lambda: net(x, t, y), net)[1], count_checkpointed(lambda: net(x, t, y), net)
    _, counts = flops.COUNTED_UNETS[size]
    assert counts.checkpointed == pytest.approx(checkpointed / kept, abs=5e-4)  # as printed


def recount(name: str, divisor: int) -> None:
    family, part = FAMILIES[name], {1: 0, 2: 1, 4: 2}[divisor]
    side, row = native_side(family), flops.COUNTED[name]
    found, kept = count_family(family, side // divisor)
    assert row.tokens == side**2
    assert (row.gflops[part], row.kept[part]) == (
        pytest.approx(found / 1e9, rel=1e-4),
        pytest.approx(kept / 1e6, rel=1e-3),
    )


@pytest.mark.parametrize("name", ["sd15", "dit", "sana"])
def test_a_pretrained_family_is_as_counted(name):
    recount(name, 4)
    assert flops.COUNTED[name].adapted == adapted(FAMILIES[name])
    assert flops.COUNTED[name].checkpointed == pytest.approx(checkpointed_share(FAMILIES[name]), abs=5e-4)  # as printed


@pytest.mark.slow
@pytest.mark.parametrize("divisor", [1, 2, 4])
@pytest.mark.parametrize("name", flops.COUNTED)
def test_every_pretrained_family_is_as_counted(name, divisor):
    recount(name, divisor)
    if divisor == 1:
        assert flops.COUNTED[name].checkpointed == pytest.approx(checkpointed_share(FAMILIES[name]), abs=5e-4)


@pytest.mark.parametrize("name", ["sd15", "dit"])
def test_the_parabola_gives_sizes_that_were_not_counted(name):
    family, side = FAMILIES[name], native_side(FAMILIES[name]) * 3 // 4
    counted, kept = count_family(family, side)
    found = flops.forward_of(family, None, side**2, 4, 0)
    assert (found.flops, found.kept) == (pytest.approx(counted, rel=1e-3), pytest.approx(kept, rel=1e-2))


def test_a_plugins_family_has_a_guessed_cost_that_says_so(monkeypatch):
    """The guess for a family that was counted is within a factor of three of the count."""
    lora = {"model": {"family": "pixart", "pretrained": "x", "train": "lora"}, "regularizer": {"type": "none"}}
    spec = spec_of({**REPA, **lora}, {"data.vae": None, "data.resolution": 1024})
    known = cost_of(spec.arms[0].config, spec.run.resolved(Machine()))
    monkeypatch.delitem(flops.COUNTED, "pixart")
    guess = cost_of(spec.arms[0].config, spec.run.resolved(Machine()))
    assert guess.rough == ("FLOPs and memory of family 'pixart' are estimated from its size, not counted",)
    assert 1 / 3 < guess.image_flops / known.image_flops < 3
    assert 1 / 3 < guess.memory.activations / known.memory.activations < 3
    assert 1 / 3 < guess.trained / known.trained < 3


def test_every_pretrained_family_was_counted():
    assert set(flops.COUNTED) == {name for name, family in FAMILIES.items() if not family.from_scratch}


@pytest.mark.parametrize(("name", "side", "gmacs"), [("dinov2_vitb14", 224, 23.16), ("dinov2_vitg14", 518, 1783)])
def test_encoders_cost_what_was_published(name, side, gmacs):
    assert encoder_flops(name, side) / 2e9 == pytest.approx(gmacs, rel=5e-4)


@pytest.mark.parametrize(
    "name", ["dinov2_vits14_reg", "dinov3_vits16plus", "siglip2_so400m14", "clip_vitb16", "efficientnet_lite0"]
)
def test_an_encoders_formula_is_what_torch_counts(name):
    facts = ENCODERS[name]
    side = 16 * facts.stride
    sized = {} if name == "efficientnet_lite0" else {"img_size": side}
    with torch.device("meta"):
        net = timm.create_model(facts.timm_name, num_classes=0, **sized).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net.forward_features(torch.empty(1, 3, side, side, device="meta"))
    assert encoder_flops(name, side) == pytest.approx(counter.get_total_flops(), rel=2e-3)


def test_every_encoder_of_the_registry_has_a_cost_and_others_have_none():
    assert all(encoder_flops(name, 224) and encoder_weights(name) for name in ENCODERS)
    assert encoder_flops("tiny-dinov2_vitb14", 56)
    assert encoder_flops("vit_base_patch16_224.dino", 224) is None


@pytest.mark.parametrize("kind", ["mlp", "linear", "conv"])
def test_projectors_are_as_large_as_they_are(kind):
    config = ProjectorSettings(type=kind, width=64, kernel=5)
    real = Projector(48, 32, config)
    found = config.overhead(48, 32, 16)
    assert found.parameters == sum(parameter.numel() for parameter in real.parameters())
    tokens = torch.empty(1, 16, 48, device="meta", requires_grad=True)
    real.to("meta")
    kept = count(lambda: real(Tokens(tokens, (4, 4))), real)[1]
    assert (
        found.hidden <= kept <= found.hidden + 16 * 48 + 16 * 2
    )  # with its input, and a mean and a deviation of a token
    assert ProjectorSettings().overhead(768, 768, 1) == (7_344_896, 7_340_032, 8192, 0)


class TestTraining:
    FORWARD = 46_003_912_704

    def test_three_forward_passes_and_three_of_the_projector(self):
        assert cost({"regularizer.type": "none"}).image_flops == 3 * self.FORWARD
        assert cost().image_flops == 3 * self.FORWARD + 6 * 256 * 7_340_032

    def test_a_projector_takes_the_tokens_of_the_block_that_is_tapped(self):
        """SiT-down B has 5 blocks on 16x16 tokens, 5 on 8x8 and 5 on 16x16 at 256 px."""
        down = {"model": {"family": "sit_down", "size": "B/2"}}
        without = cost({"regularizer.type": "none", **down}).image_flops
        blocks = (None, 0, 4, 5, 9, 10, 14)
        tokens = [
            (cost({"regularizer.block_index": block, **down}).image_flops - without) / (6 * 7_340_032)
            for block in blocks
        ]
        assert tokens == pytest.approx([64, 256, 256, 64, 64, 256, 256])

    def test_overheads_are_those_of_the_papers(self):
        """41.7, 12.1 and 8.3 % for B, L and XL with the encoder in every step (papers.md, section 7)."""
        for size, percent in (("B/2", 41.7), ("L/2", 12.1), ("XL/2", 8.3)):
            own = {"model.size": size, "regularizer.encoder.cache": False}
            ratio = cost(own).image_flops / cost({**own, "regularizer.type": "none"}).image_flops
            assert 100 * (ratio - 1) == pytest.approx(percent, abs=0.3)

    def test_self_flow_is_the_teachers_pass_the_projector_and_a_second_time(self):
        """The time embedding, twelve modulations of 6 D^2 and the last of 2 D^2 are computed for both times of an image."""
        second_time = 2 * (256 * 768 + 768**2 + 12 * 6 * 768**2 + 2 * 768**2)
        flow, sra = cost({"regularizer.type": "self_flow"}), cost({"regularizer.type": "sra"})
        assert sra.image_flops == 4 * self.FORWARD + 6 * 256 * 7_340_032
        assert flow.image_flops - sra.image_flops == 3 * second_time
        section = {"type": "self_flow"}
        both = cost({"regularizer": [{**section, "name": "one"}, {**section, "name": "two", "block_index": 5}]})
        assert both.image_flops - flow.image_flops == self.FORWARD + 6 * 256 * 7_340_032  # the second time is there

    def test_checkpointing_is_one_more_forward_pass(self):
        assert cost({"run.gradient_checkpointing": True}).image_flops - cost().image_flops == self.FORWARD

    def test_an_encoder_costs_nothing_in_a_step_where_its_features_are_cached(self):
        online, cached = cost({"regularizer.encoder.cache": False}), cost()
        encoder = encoder_flops("dinov2_vitb14", 224)
        of_encoders = [sum(one.encoder_flops for one in found.regularizers) for found in (online, cached)]
        assert of_encoders == [encoder, 0]
        assert online.image_flops - cached.image_flops == pytest.approx(encoder)
        assert cached.saved_flops - online.saved_flops == pytest.approx(encoder)

    def test_an_encoder_is_not_asked_after_the_cutoff_or_at_weight_0(self):
        online, cutoff = {"regularizer.encoder.cache": False}, "regularizer.schedule.cutoff_step"
        without, whole = (cost(settings).image_flops for settings in ({"regularizer.type": "none"}, online))
        cut, never, off = (
            cost({**online, **settings}).image_flops
            for settings in ({cutoff: 25}, {cutoff: 0}, {"regularizer.weight": 0.0})
        )
        assert whole - without > encoder_flops("dinov2_vitb14", 224)
        assert (cut - without, never, off) == ((whole - without) / 4, whole, without)

    def test_lora_is_two_forward_passes_and_the_adapters(self):
        lora = {
            "model": {"family": "dit", "pretrained": "x", "train": "lora", "rank": 4},
            "regularizer": {"type": "none"},
        }
        found = cost_of(
            (spec := spec_of({**REPA, **lora}, {"data.vae": None})).arms[0].config, spec.run.resolved(Machine())
        )
        assert found.trained == 4 * 258_048
        assert found.image_flops == pytest.approx(2 * 237.334e9 + 6 * 256 * 4 * 258_048, rel=1e-4)

    @pytest.mark.parametrize(
        ("settings", "calls"),
        [
            ({}, 50),
            ({"sampler.steps": 20}, 20),
            ({"sampler.solver": "heun"}, 99),
            ({"guidance": {"scale": 2.0, "low": 0.0, "high": 0.7}}, 85),
        ],
    )
    def test_an_evaluation_is_samples_times_calls(self, settings, calls):
        decoded = 622.187e9
        found = cost({f"evaluate.{key}": value for key, value in settings.items()})
        assert found.evaluation_flops == pytest.approx(1000 * (calls * self.FORWARD + decoded))
        assert found.milestone_flops == 0


class TestMemory:
    PARAMETERS, PROJECTOR = 130_500_112, 7_344_896

    def test_by_hand(self):
        trains = self.PARAMETERS + self.PROJECTOR
        found = cost({"run.micro_batch": 32}).memory
        assert found.weights == 4 * trains
        assert (found.training, found.gradients) == (12 * trains, 4 * trains)  # two moments and the average
        assert found.overlap == 4 * trains  # of the first micro-batch in the others
        assert found.copies == 2 * self.PARAMETERS
        assert found.activations == 2 * 32 * 256 * (768 * (21 * 12 + 3) + 4 * 2048)  # and between a projector's layers
        assert found.total == found.weights + found.training + found.copies + found.activations + found.overlap

    def test_gradients_take_the_place_of_activations(self):
        whole, small = cost().memory, cost({"train.batch_size": 1}).memory
        held = whole.weights + whole.training + whole.copies
        assert whole.overlap == small.overlap == 4 * self.PROJECTOR
        assert whole.total == held + whole.activations + whole.overlap
        assert small.total == held + small.gradients > held + small.activations + small.overlap

    def test_float32_has_no_copies_and_activations_twice_as_large(self):
        half, single = cost().memory, cost({"run.precision": "fp32"}).memory
        assert (single.copies, single.activations) == (0, 2 * half.activations)

    def test_checkpointing_keeps_the_inputs_of_blocks_and_the_rest_of_one(self):
        found = cost({"run.gradient_checkpointing": True, "run.micro_batch": 1}).memory
        assert found.activations == pytest.approx(2 * 256 * (768 * (12 + 20 + 3) + 4 * 2048))  # and the projector's

    def test_haste_keeps_a_map_of_attention_on_each_side(self):
        """Four layers of 12 heads with 256 x 256 pairs in float32, whatever the precision: 25 MB an image."""
        online = {"regularizer.encoder.cache": False, "run.micro_batch": 8}
        maps = 4 * 2 * 12 * 256**2 * 4
        for precision in ("bf16", "fp32"):
            repa, haste, without = (
                cost({**online, "run.precision": precision, "regularizer.type": kind, **more}).memory
                for kind, more in (("repa", {}), ("haste", {}), ("haste", {"regularizer.attention_weight": 0.0}))
            )
            assert haste.activations - repa.activations == 8 * maps
            assert without == repa

    def test_the_attention_loss_keeps_two_maps(self):
        heads = nn.ParameterList([torch.empty(1, 12, 256, 64, device="meta") for _ in range(4)])
        student, teacher = Attention(heads[0], heads[1], (16, 16)), Attention(heads[2], heads[3], (16, 16))
        with mock.patch.object(Attention, "resample", lambda self, grid: self):
            _, kept = count(lambda: attention_loss(student, teacher), heads)
        assert kept == 2 * 12 * 256**2

    def test_self_flow_keeps_the_modulation_of_every_token(self):
        flow, sra = (cost({"regularizer.type": kind}).memory for kind in ("self_flow", "sra"))
        assert flow.activations - sra.activations == 256 * 2 * 8 * 12 * 256 * 768

    def test_processes_share_the_batch(self):
        assert cost({"run.gpus_per_run": 4}).memory.activations * 4 == cost().memory.activations

    def test_an_encoder_in_the_step_is_held(self):
        assert cost({"regularizer.encoder.cache": False}).memory.encoders == 4 * 84_934_656

    def test_lora_holds_frozen_weights_in_half_precision(self):
        model = {"family": "flux", "pretrained": "x", "train": "lora", "rank": 16}
        spec = spec_of({**REPA, "model": model, "regularizer": {"type": "none"}}, {"data.vae": None})
        found, trains = cost_of(spec.arms[0].config, spec.run.resolved(Machine())), 16 * 1_634_304
        assert (found.trained, found.memory.weights) == (trains, 2 * 11_901_408_320 + 4 * trains)
        assert (found.memory.training, found.memory.copies) == (12 * trains, 0)

    def test_two_checkpoints_hold_weights_averages_and_moments(self):
        assert cost().checkpoint_bytes == 2 * 16 * (self.PARAMETERS + self.PROJECTOR)


def test_caches_are_latents_in_float32_and_features_in_half():
    spec = spec_of()
    latents, features = caches_of(spec.arms[0].config, spec.run.resolved(Machine()))
    assert (latents.what, latents.image_bytes) == ("latents at 256 px", 2 * 4 * 32 * 32 * 4)
    assert (features.what, features.image_bytes) == (
        "features of dinov2_vitb14 at 224 px",
        384 * 1024,
    )  # papers.md: 384 KiB
    assert (latents.image_flops, features.image_flops) == (
        pytest.approx(272.722e9),
        encoder_flops("dinov2_vitb14", 224),
    )
