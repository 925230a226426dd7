"""Each family's patch tokens, against timm's whole sequence of the same model: random weights, few blocks, real classes."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from repa_lab.encoders.encoder import Encoder, EncoderOptions, load_encoder, require_patch_tokens
from repa_lab.encoders.registry import ENCODERS, EncoderFacts
from tests.rounding import rounding

# The smallest of each family: its tokens that are no patches come first in the sequence.
PREFIX = {
    "dinov2_vits14": 1,
    "dinov2_vits14_reg": 5,
    "dinov3_vits16": 5,
    "dinov3_vits16plus": 5,
    "dino_vits16": 1,
    "dino_vits8": 1,
    "mae_vitb16": 1,
    "mocov3_vits16": 1,
    "clip_vitb16": 1,
    "siglip2_vitb16": 0,
    "siglip2_so400m14": 0,
    "ijepa_vith14": 0,
}
# REPA's code takes their tokens before the final norm.
BEFORE_NORM = ["mae_vitb16", "clip_vitb16"]
AFTER_NORM = [name for name in PREFIX if name not in BEFORE_NORM]
PLAIN = EncoderOptions()


def tiny(facts: EncoderFacts, depth: int = 1) -> nn.Module:
    """A model of the class with few blocks; every norm, and what timm leaves at 0, at values that would show."""
    torch.manual_seed(0)
    arch = facts.timm_name.split(".")[0]
    model = timm.create_model(arch, num_classes=0, depth=depth, dynamic_img_size=True, **facts.options).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 or name in ("pos_embed", "cls_token", "reg_token"):
            nn.init.normal_(parameter, mean=0.5)
    return model


def noise(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def make(name: str, depth: int = 1, image_size: int | None = None, options: EncoderOptions = PLAIN) -> Encoder:
    facts = ENCODERS[name]
    return Encoder(tiny(facts, depth), depth - 1, facts.stride, image_size, options, facts.norm)


def blocks_by_hand(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """All tokens after the last block, at the size that the model was made for: no final norm."""
    patches = model.patch_embed.proj(images).flatten(2).mT
    x = torch.cat([model.cls_token.expand(len(images), -1, -1), patches], dim=1) + model.pos_embed
    x = model.norm_pre(x)  # CLIP's; MAE has none
    for block in model.blocks:
        x = block(x)
    return x


@pytest.mark.parametrize("name", AFTER_NORM)
def test_tokens_are_the_normed_patches_and_nothing_else(name):
    encoder, pixels = make(name), noise(2, 3, 48, 80)
    tokens = require_patch_tokens(encoder, name, pixels)
    assert (tokens.grid, tuple(tokens.values.shape)) == ((3, 5), (2, 15, ENCODERS[name].dim))
    with torch.no_grad():
        everything = encoder.model.forward_features(encoder.preprocess(pixels))
    assert everything.shape[1] == PREFIX[name] + 15
    assert torch.equal(tokens.values, everything[:, PREFIX[name] :])


@pytest.mark.parametrize("name", BEFORE_NORM)
def test_maes_and_clips_tokens_are_the_last_blocks_as_in_repas_code(name):
    encoder, pixels = make(name, depth=2), noise(1, 3, 224, 224)
    tokens = require_patch_tokens(encoder, name, pixels)
    with torch.no_grad():
        everything = blocks_by_hand(encoder.model, encoder.preprocess(pixels))
        normed = encoder.model.forward_features(encoder.preprocess(pixels))[:, 1:]
    assert (tokens.grid, everything.shape[1]) == ((14, 14), 1 + 14 * 14)
    assert torch.equal(tokens.values, everything[:, 1:])
    torch.testing.assert_close(encoder.model.norm(tokens.values), normed)
    assert nn.functional.cosine_similarity(tokens.values, normed, dim=-1).mean() < 0.99


@pytest.mark.parametrize("name", [f"tiny-{name}" for name in PREFIX])
def test_the_final_norm_is_applied_by_the_encoders_row(name):
    """By what loads an encoder: its norm's parameters reach the tokens, or have no influence at all."""
    encoder, pixels = load_encoder(name, None, 48), noise(1, 3, 48, 80)
    assert isinstance(encoder.model.norm, nn.LayerNorm)
    before = encoder(pixels).values
    nn.init.constant_(encoder.model.norm.weight, 3.0)
    nn.init.constant_(encoder.model.norm.bias, 5.0)
    expected = before if name.removeprefix("tiny-") in BEFORE_NORM else before * 3 + 5
    torch.testing.assert_close(encoder(pixels).values, expected, rtol=0, atol=rounding(expected, (8, 1)))


@pytest.mark.parametrize("name", AFTER_NORM)
def test_normed_tokens_have_mean_0_and_deviation_1(name):
    encoder = make(name)
    norm = encoder.model.norm
    values = encoder(noise(1, 3, 32, 32)).values
    plain = (values - norm.bias) / norm.weight
    assert plain.mean(-1).abs().max() < 1e-2  # the norm adds its epsilon to the variance of tiny tokens
    torch.testing.assert_close(plain.std(-1, correction=0), torch.ones(1, 4), rtol=0, atol=1e-2)


@pytest.mark.parametrize("name", ["dinov2_vits14_reg", "dinov3_vits16", "clip_vitb16"])
def test_what_cls_and_registers_are_does_not_stand_among_the_tokens(name):
    # Without attention no token hears of another: then changing them must change nothing.
    encoder, pixels = make(name), noise(1, 3, 32, 32)
    model = encoder.model
    nn.init.zeros_(model.blocks[0].attn.proj.weight)
    before = encoder(pixels).values
    for token in ("cls_token", "reg_token"):
        if getattr(model, token, None) is not None:
            getattr(model, token).data.add_(7)
    assert torch.equal(encoder(pixels).values, before)


@pytest.mark.parametrize("name", ["dinov3_vits16", "clip_vitb16", "siglip2_vitb16", "mae_vitb16"])
def test_bf16_is_close_to_float32(name):
    pixels = noise(2, 3, 48, 80)
    exact, rounded = (make(name, 2, options=EncoderOptions(precision=precision)) for precision in ("fp32", "bf16"))
    assert nn.functional.cosine_similarity(rounded(pixels).values, exact(pixels).values, dim=-1).min() > 0.99


@pytest.mark.parametrize(
    "resolution, image_size, shape",
    [(256, None, (1, 256, 768)), (512, None, (1, 1024, 768)), (64, 518, (1, 1369, 768))],
    ids=["224", "448", "518"],
)
def test_dinov2_b_has_the_papers_token_counts(resolution, image_size, shape):
    encoder = make("dinov2_vitb14", image_size=image_size)
    tokens = encoder(noise(1, 3, resolution, resolution))
    assert tuple(tokens.values.shape) == shape
    assert tokens.grid[0] == tokens.grid[1]
