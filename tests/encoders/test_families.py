"""Each family's patch tokens, against timm's whole sequence of the same model: random weights, few blocks, real classes."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from repa_lab.encoders.encoder import Encoder, EncoderOptions, require_patch_tokens
from repa_lab.encoders.registry import ENCODERS, EncoderFacts

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


@pytest.mark.parametrize("name", PREFIX)
def test_tokens_are_the_normed_patches_and_nothing_else(name):
    facts = ENCODERS[name]
    encoder = Encoder(tiny(facts), 0, facts.stride, None)
    pixels = noise(2, 3, 48, 80)
    tokens = require_patch_tokens(encoder, name, pixels)
    assert (tokens.grid, tuple(tokens.values.shape)) == ((3, 5), (2, 15, facts.dim))
    with torch.no_grad():
        everything = encoder.model.forward_features(encoder.preprocess(pixels))
    assert everything.shape[1] == PREFIX[name] + 15
    assert torch.equal(tokens.values, everything[:, PREFIX[name] :])


@pytest.mark.parametrize("name", PREFIX)
def test_the_final_norm_was_applied(name):
    encoder = Encoder(tiny(ENCODERS[name]), 0, ENCODERS[name].stride, None)
    norm = encoder.model.norm
    assert isinstance(norm, nn.LayerNorm)
    values = encoder(noise(1, 3, 32, 32)).values
    plain = (values - norm.bias) / norm.weight
    assert plain.mean(-1).abs().max() < 1e-2
    torch.testing.assert_close(plain.std(-1, correction=0), torch.ones(1, 4), rtol=0, atol=1e-2)


@pytest.mark.parametrize("name", ["dinov2_vits14_reg", "dinov3_vits16", "clip_vitb16"])
def test_what_cls_and_registers_are_does_not_stand_among_the_tokens(name):
    # Without attention no token hears of another: then changing them must change nothing.
    facts = ENCODERS[name]
    model = tiny(facts)
    nn.init.zeros_(model.blocks[0].attn.proj.weight)
    encoder, pixels = Encoder(model, 0, facts.stride, None), noise(1, 3, 32, 32)
    before = encoder(pixels).values
    for token in ("cls_token", "reg_token"):
        if getattr(model, token, None) is not None:
            getattr(model, token).data.add_(7)
    assert torch.equal(encoder(pixels).values, before)


@pytest.mark.parametrize("name", ["dinov3_vits16", "clip_vitb16", "siglip2_vitb16", "mae_vitb16"])
def test_bf16_is_close_to_float32(name):
    facts, pixels = ENCODERS[name], noise(2, 3, 48, 80)
    exact, rounded = (Encoder(tiny(facts, 2), 1, facts.stride, None, EncoderOptions(precision=p)) for p in ("fp32", "bf16"))
    assert nn.functional.cosine_similarity(rounded(pixels).values, exact(pixels).values, dim=-1).min() > 0.99


@pytest.mark.parametrize(
    "resolution, image_size, shape",
    [(256, None, (1, 256, 768)), (512, None, (1, 1024, 768)), (64, 518, (1, 1369, 768))],
    ids=["224", "448", "518"],
)
def test_dinov2_b_has_the_papers_token_counts(resolution, image_size, shape):
    encoder = Encoder(tiny(ENCODERS["dinov2_vitb14"]), 0, 14, image_size)
    tokens = encoder(noise(1, 3, resolution, resolution))
    assert tuple(tokens.values.shape) == shape
    assert tokens.grid[0] == tokens.grid[1]
