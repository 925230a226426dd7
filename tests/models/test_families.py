"""Every family of diffusers, from a tiny model of its class: what is tapped are the image's tokens, in their order, alone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import SanaLinearAttnProcessor2_0
from diffusers.models.embeddings import LuminaCombinedTimestepCaptionEmbedding
from diffusers.models.transformers.sana_transformer import SanaAttnProcessor2_0
from diffusers.models.transformers.transformer_hidream_image import MOEFeedForwardSwiGLU
from diffusers.models.transformers.transformer_omnigen import OmniGenSuScaledRotaryEmbedding
from torch import nn

from repa_lab.models.denoiser import Denoiser, build_net, tap_block
from repa_lab.models.facts import Family, network_of
from repa_lab.models.families import FAMILIES
from repa_lab.models.network import PER_TOKEN
from repa_lab.models.tap import TapError

OURS = [family for family in FAMILIES.values() if family.network]
families = pytest.mark.parametrize("family", OURS, ids=lambda family: family.name)
TOKENS = 7
GRID = (3, 2)  # of what is tapped: not square
# Their classes see padding: the one pools it, the others cannot be masked and see it up to the longest text of a batch.
SEEING_PADDING = {"hunyuan_dit", "cogview4", "kandinsky5"}
INTEGERS = re.compile("mask|labels|token_ids")
LAID_OUT_BY_VALUES = {"qwen_image21"}
SORTED_BY_VALUES = {"encoder_hidden_states_2", "encoder_attention_mask_2"}  # a text that may be left out


def grid_of(family: Family) -> tuple[int, int]:
    """Of what is tapped in the tests."""
    sides = (3, 3) if network_of(family).square else GRID
    return sides[0] * network_of(family).multiple, sides[1] * network_of(family).multiple


def make(family: Family) -> Denoiser:
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
    return Denoiser(net, family).eval()


def given(family: Family, denoiser: Denoiser, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Latents, times and conditioning; where texts are masked, the second is two tokens shorter."""
    stride, config = family.shapes[""].stride, denoiser.net.config
    channels = network_of(family).tiny.get("latent_channels") or latent_channels(family, denoiser)
    height, width = grid_of(family)
    latents = torch.randn(batch, channels, height * stride, width * stride)
    shapes = shapes_of(family, config, TOKENS, height * width)
    condition = {name: torch.randn(batch, *shape) for name, shape in shapes.items()}
    for ids in (name for name in condition if "token_ids" in name):
        condition[ids] = torch.randint(1, 9, condition[ids].shape)
    for mask in (name for name in condition if "mask" in name):
        condition[mask] = torch.ones_like(condition[mask], dtype=torch.long)
        condition[mask][1, -2:] = 0
    for labels in (name for name in condition if "labels" in name):
        condition[labels] = torch.arange(batch)
    return latents, torch.tensor([0.3, 0.7])[:batch], condition


def shapes_of(family: Family, config, tokens: int, cells: int) -> dict[str, tuple[int, ...]]:
    """Of the conditioning, for a number of words and of the image's tokens."""
    shapes = network_of(family).condition(config, tokens)
    return {name: tuple(cells if size == PER_TOKEN else size for size in shape) for name, shape in shapes.items()}


def texts_of(condition: dict[str, torch.Tensor]) -> list[str]:
    """The conditioning by words: their embeddings, or their numbers."""
    return [name for name, value in condition.items() if value.ndim > 2 or name == "text_token_ids"]


def change(text: torch.Tensor, words: int | slice, samples: int | slice = slice(None)) -> None:
    """Other words in a text, in place."""
    text[(samples, words) if text.ndim == 2 else (samples, ..., words, slice(None))] += 1


def latent_channels(family: Family, denoiser: Denoiser) -> int:
    """Of the tiny model: what is packed 2x2 has four values a cell."""
    packed = "unpack" in network_of(family).output.__name__
    config = denoiser.net.config
    return int(config.get("in_channels") or config["in_visual_dim"]) // (4 if packed else 1)


@contextmanager
def apart() -> Iterator[None]:
    """Every token attends to itself alone, none to another sequence, no text is pooled, and nothing is normalised over an
    image: what is left maps tokens one by one."""
    attend, normalise = F.scaled_dot_product_attention, F.group_norm

    def alone(query, key, value, *args, **kwargs):
        if query.shape[-2] != key.shape[-2]:
            return query * 0
        repeat = query.shape[-3] // value.shape[-3]
        return value.repeat_interleave(repeat, dim=-3) if repeat > 1 else value

    linear, pool = SanaLinearAttnProcessor2_0.__call__, LuminaCombinedTimestepCaptionEmbedding.forward
    F.scaled_dot_product_attention, F.group_norm = alone, lambda values, *args, **kwargs: values
    SanaLinearAttnProcessor2_0.__call__ = SanaAttnProcessor2_0.__call__
    LuminaCombinedTimestepCaptionEmbedding.forward = lambda self, time, text, mask: pool(self, time, text * 0, mask)
    try:
        yield
    finally:
        F.scaled_dot_product_attention, F.group_norm = attend, normalise
        SanaLinearAttnProcessor2_0.__call__, LuminaCombinedTimestepCaptionEmbedding.forward = linear, pool


def blocks_of(family: Family, denoiser: Denoiser) -> list[int | str]:
    if family.kind == "unet":
        return ["mid"]
    return list(range(sum(len(denoiser.net.get_submodule(blocks.path)) for blocks in network_of(family).blocks)))


def captured(denoiser: Denoiser, block: int | str, latents, time, condition) -> torch.Tensor:
    tap = tap_block(denoiser, block)
    with torch.no_grad():
        denoiser(latents, time, **condition)
    tokens = tap.take()
    tap.remove()
    assert tokens.grid == grid_of(denoiser.family)
    return tokens.values


@families
def test_the_prediction_has_the_latents_shape_and_every_block_the_grids_tokens(family):
    denoiser = make(family)
    latents, time, condition = given(family, denoiser)
    with torch.no_grad():
        assert denoiser(latents, time, **condition).shape == latents.shape
    for block in blocks_of(family, denoiser):
        values = captured(denoiser, block, latents, time, condition)
        assert values.shape[:2] == (2, grid_of(family)[0] * grid_of(family)[1])
        assert values.isfinite().all()


@families
def test_a_marked_patch_shows_at_its_own_row(family):
    denoiser, stride = make(family), family.shapes[""].stride
    latents, time, condition = given(family, denoiser)
    height, width = grid_of(family)
    for block in blocks_of(family, denoiser):
        for row in range(height * width):
            y, x = row // width, row % width
            marked = latents.clone()
            marked[:, :, y * stride : (y + 1) * stride, x * stride : (x + 1) * stride] += 1.0
            with apart():
                before, after = (captured(denoiser, block, one, time, condition) for one in (latents, marked))
            change = (after - before).norm(dim=-1)
            assert [sample.nonzero().flatten().tolist() for sample in change] == [[row], [row]], (block, row)


@families
def test_a_marked_word_shows_at_no_row(family):
    denoiser = make(family)
    latents, time, condition = given(family, denoiser)
    sequences = texts_of(condition)
    assert sequences or family.name == "dit"
    for name in sequences:
        for position in (0, TOKENS - 3):  # which no text lacks
            marked = {**condition, name: condition[name].clone()}
            change(marked[name], position)
            for block in blocks_of(family, denoiser):
                with apart():
                    before, after = (captured(denoiser, block, latents, time, one) for one in (condition, marked))
                assert torch.equal(before, after), (name, position, block)


@families
def test_padding_changes_nothing(family):
    denoiser = make(family)
    latents, time, condition = given(family, denoiser)
    if not any("mask" in name for name in condition):
        pytest.skip("its text has no mask")
    padded = {name: value.clone() for name, value in condition.items()}
    for name in texts_of(condition):
        change(padded[name], slice(-2, None), samples=1)
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
        torch.testing.assert_close(denoiser.train()(latents, time, **condition), denoiser.eval()(latents, time, **condition))


@families
def test_gradients_are_those_without_checkpointing(family):
    denoiser = make(family)
    latents, time, condition = given(family, denoiser)
    block = blocks_of(family, denoiser)[-1]

    def gradients() -> dict[str, torch.Tensor]:
        torch.manual_seed(1)  # some drop labels
        denoiser.zero_grad()
        tap = tap_block(denoiser, block)
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
@pytest.mark.parametrize("index", [-1, 999, "mad"])
def test_a_block_that_is_not_there_is_refused(family, index):
    denoiser = make(family)
    depth = len(blocks_of(family, denoiser))
    allowed = "'mid'" if family.kind == "unet" else f"0 to {depth - 1}"
    with pytest.raises(TapError, match=f"{family.name}: block_index must be {allowed}, got"):
        tap_block(denoiser, index)


@pytest.mark.parametrize("family", [one for one in OURS if network_of(one).square], ids=lambda family: family.name)
def test_an_image_that_is_not_square_is_refused_where_it_must_be(family):
    denoiser = make(family)
    latents, time, condition = given(family, denoiser)
    with pytest.raises(ValueError, match=f"{family.name} takes square images only, got a grid of 2x3 tokens"):
        denoiser(latents[:, :, : 2 * family.shapes[""].stride], time, **condition)


def test_qwen_image21_refuses_an_image_whose_sides_are_not_even():
    denoiser = make(FAMILIES["qwen_image21"])
    latents, time, condition = given(FAMILIES["qwen_image21"], denoiser)
    with pytest.raises(ValueError, match="qwen_image21 takes a multiple of 2 tokens along each side only, got a grid of 5x4"):
        denoiser(latents[:, :, :5], time, **condition)


def without_values(monkeypatch) -> None:
    """What goes by values, or by a device's autocast: meta lacks both."""
    monkeypatch.setattr(MOEFeedForwardSwiGLU, "moe_infer", lambda self, tokens, *choice: tokens)
    monkeypatch.setattr(OmniGenSuScaledRotaryEmbedding, "forward", lambda self, tokens, ids: (tokens[0, :, : self.dim],) * 2)
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())


@families
def test_the_released_model_is_what_the_facts_say(family, monkeypatch):
    without_values(monkeypatch)
    network, shape = network_of(family), family.shapes[""]
    with torch.device("meta"):
        net = build_net(family, network.config)
    assert sum(p.numel() for p in net.parameters()) == network.parameters
    denoiser = Denoiser(net, family).eval()
    if family.kind == "transformer":
        assert len(blocks_of(family, denoiser)) == shape.depth
    if family.name in LAID_OUT_BY_VALUES:
        assert net.inner_dim == shape.width
        pytest.skip("its sequence is laid out by values, which meta lacks")
    side = network.native // family.latent_stride
    latents = torch.empty(1, network.channels, side, side, device="meta")
    condition = {
        name: torch.empty(1, *size, device="meta", dtype=torch.long if INTEGERS.search(name) else None)
        for name, size in shapes_of(family, net.config, 77, (side // shape.stride) ** 2).items()
        if name not in SORTED_BY_VALUES
    }
    if network.lengths:  # words are counted, so these masks have values, which attention over meta refuses
        condition |= {name: torch.ones(mask.shape, dtype=torch.long) for name, mask in condition.items() if "mask" in name}
    tap = tap_block(denoiser, shape.block)
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


def test_glm_images_own_tokens_show_each_at_its_patch():
    denoiser = make(FAMILIES["glm_image"])
    latents, time, condition = given(FAMILIES["glm_image"], denoiser)
    for row in range(GRID[0] * GRID[1]):
        drawn = condition["prior_token_ids"].clone()
        drawn[:, row] += 1
        with apart():
            before, after = (captured(denoiser, 2, latents, time, {**condition, "prior_token_ids": ids}) for ids in (condition["prior_token_ids"], drawn))
        assert [sample.nonzero().flatten().tolist() for sample in (after - before).norm(dim=-1)] == [[row], [row]]


@pytest.mark.parametrize("lengths", [(300, 280), (300, 200)])
def test_the_image_of_fibo_2_is_found_whether_its_texts_have_as_many_gists_or_not(lengths):
    family = FAMILIES["bria_fibo2"]
    denoiser = make(family)
    latents, time, _ = given(family, denoiser)
    text = torch.randn(2, 2, 300, 12)
    condition = {"encoder_hidden_states": text, "encoder_attention_mask": torch.arange(300) < torch.tensor(lengths)[:, None]}
    marked = latents.clone()
    marked[:, :, 2:4, :2] += 1.0  # the second row's first patch
    with apart():
        before, after = (captured(denoiser, 2, one, time, condition) for one in (latents, marked))
    assert [sample.nonzero().flatten().tolist() for sample in (after - before).norm(dim=-1)] == [[2], [2]]


def test_fibo_2_refuses_a_model_with_other_gists():
    family = FAMILIES["bria_fibo2"]
    denoiser = Denoiser(build_net(family, {**network_of(family).tiny, "gist_step": 32}), family)
    latents, time, condition = given(family, denoiser)
    with pytest.raises(ValueError, match="bria_fibo2: the image cannot be found in a model whose gists are others than"):
        denoiser(latents, time, **condition)
