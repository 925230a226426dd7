"""Every family of diffusers, from a tiny model of its class: what is tapped are the image's tokens, in their order, alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import SanaLinearAttnProcessor2_0
from diffusers.models.transformers.sana_transformer import SanaAttnProcessor2_0
from diffusers.models.transformers.transformer_hidream_image import MOEFeedForwardSwiGLU
from torch import nn

from repa_lab.align import REPA, UREPA, Signals
from repa_lab.models.families import FAMILIES
from repa_lab.models.family import Family, network_of
from repa_lab.models.pretrained import DiffusersDenoiser
from repa_lab.models.tap import TapError
from repa_lab.models.tiny import build_net
from tests.models.counting import meta_condition
from tests.rounding import DENOISER, rounding

OURS = [family for family in FAMILIES.values() if family.network]
families = pytest.mark.parametrize("family", OURS, ids=lambda family: family.name)
TOKENS = 7
GRID = (3, 2)  # of what is tapped: not square
FRAMES = 2  # of a clip's latents
# Their classes see padding: the one pools it, the others cannot be masked and see it up to the longest text of a batch.
SEEING_PADDING = {"hunyuan_dit", "cogview4", "kandinsky5"}


def grid_of(family: Family) -> tuple[int, int]:
    """Of what is tapped in the tests."""
    return (3, 3) if network_of(family).square else GRID


def make(family: Family) -> DiffusersDenoiser:
    """A tiny model of the family with no weight at zero, so that nothing is passed over."""
    torch.manual_seed(0)
    net = build_net(family, network_of(family).tiny)
    for parameter in net.parameters():
        if not parameter.any() or parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3):
            centre = layer.weight.detach()[:, :, 1, 1].clone()
            layer.weight.data.zero_()[:, :, 1, 1] = centre  # it sees what it stands on, and no neighbour
    return DiffusersDenoiser(net, family).eval()


def given(
    family: Family, denoiser: DiffusersDenoiser, batch: int = 2
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Latents, times and conditioning; where texts are masked, the second is two tokens shorter."""
    stride, config = family.shapes[""].stride, denoiser.net.config
    height, width = grid_of(family)
    frames = (FRAMES,) if family.is_video else ()
    latents = torch.randn(batch, latent_channels(family, denoiser), *frames, height * stride, width * stride)
    shapes = network_of(family).condition(config, TOKENS)
    condition = {name: torch.randn(batch, *shape) for name, shape in shapes.items()}
    for mask in (name for name in condition if "mask" in name):
        condition[mask] = torch.ones_like(condition[mask], dtype=torch.long)
        condition[mask][1, -2:] = 0
    for labels in (name for name in condition if "labels" in name):
        condition[labels] = torch.arange(batch)
    return latents, torch.tensor([0.3, 0.7])[:batch], condition


def texts_of(condition: dict[str, torch.Tensor]) -> list[str]:
    """The names of the conditioning that holds embeddings of words."""
    return [name for name, value in condition.items() if value.ndim > 2]


def latent_channels(family: Family, denoiser: DiffusersDenoiser) -> int:
    """Of the tiny model: what is packed 2x2 has four values a cell."""
    packed = "unpack" in network_of(family).output.__name__
    config = denoiser.net.config
    return int(config.get("in_channels") or config["in_visual_dim"]) // (4 if packed else 1)


@contextmanager
def apart() -> Iterator[None]:
    """Let every token attend to itself alone and normalise nothing over an image: the model maps tokens one by one."""
    attend, normalise = F.scaled_dot_product_attention, F.group_norm

    def alone(query, key, value, *args, **kwargs):
        return query * 0 if query.shape[-2] != key.shape[-2] else value

    linear = SanaLinearAttnProcessor2_0.__call__
    F.scaled_dot_product_attention, F.group_norm = alone, lambda values, *args, **kwargs: values
    SanaLinearAttnProcessor2_0.__call__ = SanaAttnProcessor2_0.__call__
    try:
        yield
    finally:
        F.scaled_dot_product_attention, F.group_norm = attend, normalise
        SanaLinearAttnProcessor2_0.__call__ = linear


def blocks_of(family: Family, denoiser: DiffusersDenoiser) -> list[int | str]:
    if family.kind == "unet":
        return ["mid"]
    return list(range(sum(len(denoiser.net.get_submodule(blocks.path)) for blocks in network_of(family).blocks)))


def captured(denoiser: DiffusersDenoiser, latents, time, condition) -> dict[int | str, torch.Tensor]:
    """The tokens of every block, by one forward pass."""
    taps = {block: denoiser.tap(block) for block in blocks_of(denoiser.family, denoiser)}
    with torch.no_grad():
        denoiser(latents, time, **condition)
    tokens = {block: tap.take() for block, tap in taps.items()}
    for tap in taps.values():
        tap.remove()
    assert {tap.grid for tap in tokens.values()} == {grid_of(denoiser.family)}
    assert {tap.frames for tap in tokens.values()} == {FRAMES if denoiser.family.is_video else 1}
    return {block: tap.values for block, tap in tokens.items()}


@families
def test_the_prediction_has_the_latents_shape_and_every_block_the_grids_tokens(family):
    denoiser = make(family)
    latents, time, condition = given(family, denoiser)
    with torch.no_grad():
        assert denoiser(latents, time, **condition).shape == latents.shape
    for values in captured(denoiser, latents, time, condition).values():
        assert values.shape[:2] == (2, math.prod(grid_of(family)) * (FRAMES if family.is_video else 1))
        assert values.isfinite().all()


@families
def test_a_marked_patch_shows_at_its_own_row(family):
    denoiser, stride = make(family), family.shapes[""].stride
    latents, time, condition = given(family, denoiser)
    height, width = grid_of(family)
    with apart():
        before = captured(denoiser, latents, time, condition)
        for row in range(height * width * (FRAMES if family.is_video else 1)):
            frame, y, x = row // (height * width), row // width % height, row % width
            marked = latents.clone()
            of_frame = marked[:, :, frame] if family.is_video else marked
            of_frame[:, :, y * stride : (y + 1) * stride, x * stride : (x + 1) * stride] += 1.0
            for block, after in captured(denoiser, marked, time, condition).items():
                change = (after - before[block]).norm(dim=-1)
                assert [sample.nonzero().flatten().tolist() for sample in change] == [[row], [row]], (block, row)


@families
def test_a_marked_word_shows_at_no_row(family):
    denoiser = make(family)
    latents, time, condition = given(family, denoiser)
    sequences = texts_of(condition)
    assert sequences or family.name == "dit"
    with apart():
        before = captured(denoiser, latents, time, condition)
        for name in sequences:
            for position in (0, TOKENS - 3):  # which no text lacks
                marked = {**condition, name: condition[name].clone()}
                marked[name][..., position, :] += 1
                for block, after in captured(denoiser, latents, time, marked).items():
                    assert torch.equal(before[block], after), (name, position, block)


@families
def test_padding_changes_nothing(family):
    denoiser = make(family)
    latents, time, condition = given(family, denoiser)
    if not any("mask" in name for name in condition):
        pytest.skip("its text has no mask")
    padded = {name: value.clone() for name, value in condition.items()}
    for name in texts_of(condition):
        padded[name][1, ..., -2:, :] += 1
    with torch.no_grad():
        same = torch.equal(denoiser(latents, time, **condition), denoiser(latents, time, **padded))
    assert same is (family.name not in SEEING_PADDING)


@families
def test_training_mode_predicts_the_same(family):
    denoiser = make(family)
    latents, time, condition = given(family, denoiser)
    if any("labels" in name for name in condition):
        pytest.skip("labels are dropped at random in training")
    with torch.no_grad():
        torch.testing.assert_close(
            denoiser.train()(latents, time, **condition), denoiser.eval()(latents, time, **condition)
        )


@families
def test_gradients_are_those_without_checkpointing(family):
    denoiser = make(family)
    latents, time, condition = given(family, denoiser)
    block = blocks_of(family, denoiser)[-1]

    def gradients() -> dict[str, torch.Tensor]:
        torch.manual_seed(1)  # some drop labels
        denoiser.zero_grad()
        tap = denoiser.tap(block)
        (denoiser(latents, time, **condition).square().mean() + tap.take().values.square().mean()).backward()
        tap.remove()
        return {name: p.grad.clone() for name, p in denoiser.named_parameters() if p.grad is not None}

    if not getattr(denoiser.net, "_supports_gradient_checkpointing", False):
        pytest.skip(f"diffusers' {type(denoiser.net).__name__} cannot be checkpointed")
    if network_of(family).uncheckpointed:
        pytest.skip(f"diffusers' {type(denoiser.net).__name__}: {network_of(family).uncheckpointed}")
    denoiser.train()
    plain = gradients()
    denoiser.net.enable_gradient_checkpointing()
    found = gradients()
    assert plain.keys() == found.keys()
    assert plain
    assert all(torch.equal(plain[name], found[name]) for name in plain)


@families
def test_a_block_that_is_not_there_is_refused(family):
    denoiser = make(family)
    depth = len(blocks_of(family, denoiser))
    allowed = "'mid'" if family.kind == "unet" else f"0 to {depth - 1}"
    for index in (-1, 999, "mad"):
        with pytest.raises(TapError, match=f"{family.name}: block_index must be {allowed}, got"):
            denoiser.tap(index)


@pytest.mark.parametrize("family", [one for one in OURS if network_of(one).square], ids=lambda family: family.name)
def test_an_image_that_is_not_square_is_refused_where_it_must_be(family):
    denoiser = make(family)
    latents, time, condition = given(family, denoiser)
    with pytest.raises(ValueError, match=f"{family.name} takes square images only, got a grid of 2x3 tokens"):
        denoiser(latents[:, :, : 2 * family.shapes[""].stride], time, **condition)


def without_values(monkeypatch) -> None:
    """What goes by values, or by a device's autocast: meta lacks both."""
    monkeypatch.setattr(MOEFeedForwardSwiGLU, "moe_infer", lambda self, tokens, *choice: tokens)
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())


@families
def test_the_released_model_is_what_the_facts_say(family, monkeypatch):
    without_values(monkeypatch)
    network, shape = network_of(family), family.shapes[""]
    with torch.device("meta"):
        net = build_net(family, network.config)
    assert sum(p.numel() for p in net.parameters()) == network.parameters
    denoiser = DiffusersDenoiser(net, family).eval()
    if family.kind == "transformer":
        assert len(blocks_of(family, denoiser)) == shape.depth
    side = network.native // family.latent_stride
    latents = torch.empty(1, network.channels, *((FRAMES,) if family.is_video else ()), side, side, device="meta")
    condition = meta_condition(family, net.config, 77)
    tap = denoiser.tap(shape.block)
    with torch.no_grad(), apart() if network.lengths else nullcontext():
        denoiser(latents, torch.empty(1, device="meta"), **condition)
    tokens = tap.take()
    assert tokens.dim == shape.width
    assert tokens.grid == (side // shape.stride, side // shape.stride)


def test_pixart_alpha_at_1024_is_told_the_size_though_its_config_is_silent():
    network = network_of(FAMILIES["pixart"])
    for side, told in ((128, True), (64, False)):
        with torch.device("meta"):
            net = build_net(FAMILIES["pixart"], {"sample_size": side, "caption_channels": 4096, "num_layers": 1})
        names = network.condition(net.config, 77)
        assert ({"resolution", "aspect_ratio"} <= set(names)) is told
        assert net.use_additional_conditions is told


@pytest.mark.parametrize("size", [(4, 4), (6, 4)])
def test_hidream_is_given_what_it_would_make_of_a_map_itself(size):
    denoiser = make(FAMILIES["hidream"])
    _, time, condition = given(FAMILIES["hidream"], denoiser)
    latents = torch.randn(2, 4, *size)
    text = {**condition, "encoder_hidden_states_llama3": condition["encoder_hidden_states_llama3"].transpose(0, 1)}
    with torch.no_grad():
        (expected,) = denoiser.net(latents, timesteps=time * 1000, **text, return_dict=False)
        torch.testing.assert_close(denoiser(latents, time, **condition), -expected)


# A UNet, a transformer of two lists of blocks, and one that is told classes; the others take a second or more each.
@pytest.mark.parametrize(
    "family",
    [one if one.name in ("sd15", "flux", "dit") else pytest.param(one, marks=pytest.mark.slow) for one in OURS],
    ids=lambda family: family.name,
)
def test_a_tap_set_before_compiling_captures_the_same(family):
    torch.compiler.reset()
    denoiser = make(family)
    latents, time, condition = given(family, denoiser)
    taps = [denoiser.tap(block) for block in {blocks_of(family, denoiser)[0], blocks_of(family, denoiser)[-1]}]
    with torch.no_grad():
        expected = denoiser(latents, time, **condition), *(tap.take().values for tap in taps)
        found = (
            torch.compile(denoiser, backend="eager")(latents, time, **condition),
            *(tap.take().values for tap in taps),
        )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=rounding(other, DENOISER))


@families
def test_one_step_with_its_regularizer_reaches_what_lies_before_the_tap_and_nothing_behind(family):
    denoiser = make(family).train()
    latents, time, condition = given(family, denoiser)
    block = blocks_of(family, denoiser)[0]
    tap = denoiser.tap(block)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        denoiser(latents, time, **condition)
    student = tap.take()
    kind = UREPA if family.regularizer == "urepa" else REPA
    regularizer = kind(student.dim, 5, projector={"width": 8})
    teacher = type(student)(torch.randn(2, 20 * student.frames, 5), (5, 4), student.frames)
    loss = regularizer(Signals(taps=(student,), encoders=(teacher,)), 0)
    loss.value.backward()
    assert loss.value.dtype == torch.float32
    reached = {name for name, p in denoiser.net.named_parameters() if p.grad is not None and p.grad.any()}
    lists = [blocks.path for blocks in family.network.blocks]
    behind = [
        n
        for n in reached
        if any(n.startswith(f"{path}.1.") for path in lists) or n.startswith(("up_blocks", "proj_out"))
    ]
    assert reached
    assert behind == []
    assert all(p.grad.isfinite().all() for name, p in denoiser.net.named_parameters() if name in reached)
