"""Encoders by name, as data: what `plan` can check of them without loading anything.

The guide's names lead to timm's models. Any other name is taken as timm's own and checked when it is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

from repa_lab.registry import Registry

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Resize = Literal["bicubic", "bilinear", "bicubic-antialias", "bilinear-antialias"]
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class EncoderFacts:
    """What is known of an encoder by its name.

    Attributes:
        timm_name: the model and weights in timm; its mean and standard deviation are the encoder's.
        stride: pixels per patch token along each side.
        dim: width D of a token.
        options: further arguments of `timm.create_model`.
        weights: where they come from unless a file is given: timm's hub, a package the lab depends on, a file alone, or
            nowhere, for what is random.
        prefix: where the encoder stands in its publisher's file, next to what else was trained.
        renames: words in that file's names, and what they mean.
        norm: whether the tokens are taken after the model's final norm, or before.
        build: makes the encoder that a plugin registers; see :func:`encoder`.
        mean, std: of the pixels in [0, 1], by channel, of an encoder that a plugin builds.
        resize: how images are brought to the encoder's input size.
    """

    timm_name: str
    stride: int
    dim: int
    options: Mapping[str, int] = field(default_factory=dict)
    weights: Literal["hub", "package", "file", "none"] = "hub"
    prefix: str = ""
    renames: Mapping[str, str] = field(default_factory=dict)
    norm: bool = True
    build: Callable[[str | None], Any] | None = None
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    resize: Resize = "bicubic"


ENCODERS: Registry[EncoderFacts] = Registry("encoder")


def encoder(
    name: str,
    *,
    patch_size: int,
    dim: int,
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = IMAGENET_STD,
    resize: Resize = "bicubic",
) -> Callable[[F], F]:
    """Register an encoder under the name by which ``regularizer.encoder.name`` calls it.

    Decorates a function that is given ``encoder.weights`` (a file's name, or None) and returns a module, which maps
    normalised images ``(B, 3, H, W)`` to a feature map ``(B, dim, H / patch_size, W / patch_size)``.

    Args:
        name: the encoder's name.
        patch_size: pixels per token along each side.
        dim: width of a token.
        mean: of the pixels in [0, 1], by channel.
        std: of the pixels in [0, 1], by channel.
        resize: how images are brought to the encoder's input size.

    Raises:
        PluginError: the name is taken.
    """

    def register(build: F) -> F:
        ENCODERS.add(name, EncoderFacts(name, patch_size, dim, build=build, mean=mean, std=std, resize=resize))
        return build

    return register


# MoCo v3 is not in timm, but a ViT of its shape and with its statistics is; its ViT-S has 12 heads, not 6. In the file
# that the REPA authors use for ViT-L, four layers go by the number of their block.
_MOCOV3_L = {"norm13": "norm1", "fc13": "fc1", "norm14": "norm2", "fc14": "fc2"}

# OpenAI trained CLIP with QuickGELU: timm's names without it compute GELU with the same weights. Each SigLIP 2 is the
# one that was trained on 16x16 patches, the grid that the papers' rule gives for images of 256 px.
#
# Tokens are those after the final norm, as DINOv2's publisher defines its patch features (`x_norm_patchtokens`) and
# REPA's code takes DINOv2's, MoCo v3's and I-JEPA's. REPA's code takes MAE's and CLIP's before it, and so do their
# rows.
_BUILT_IN: dict[str, EncoderFacts] = {
    "efficientnet_lite0": EncoderFacts("tf_efficientnet_lite0", 16, 112, weights="package"),
    "dinov2_vits14": EncoderFacts("vit_small_patch14_dinov2.lvd142m", 14, 384),
    "dinov2_vitb14": EncoderFacts("vit_base_patch14_dinov2.lvd142m", 14, 768),
    "dinov2_vitl14": EncoderFacts("vit_large_patch14_dinov2.lvd142m", 14, 1024),
    "dinov2_vitg14": EncoderFacts("vit_giant_patch14_dinov2.lvd142m", 14, 1536),
    "dinov2_vits14_reg": EncoderFacts("vit_small_patch14_reg4_dinov2.lvd142m", 14, 384),
    "dinov2_vitb14_reg": EncoderFacts("vit_base_patch14_reg4_dinov2.lvd142m", 14, 768),
    "dinov2_vitl14_reg": EncoderFacts("vit_large_patch14_reg4_dinov2.lvd142m", 14, 1024),
    "dinov2_vitg14_reg": EncoderFacts("vit_giant_patch14_reg4_dinov2.lvd142m", 14, 1536),
    "dinov3_vits16": EncoderFacts("vit_small_patch16_dinov3.lvd1689m", 16, 384),
    "dinov3_vits16plus": EncoderFacts("vit_small_plus_patch16_dinov3.lvd1689m", 16, 384),
    "dinov3_vitb16": EncoderFacts("vit_base_patch16_dinov3.lvd1689m", 16, 768),
    "dinov3_vitl16": EncoderFacts("vit_large_patch16_dinov3.lvd1689m", 16, 1024),
    "dinov3_vith16plus": EncoderFacts("vit_huge_plus_patch16_dinov3.lvd1689m", 16, 1280),
    "dinov3_vit7b16": EncoderFacts("vit_7b_patch16_dinov3.lvd1689m", 16, 4096),
    "dino_vits16": EncoderFacts("vit_small_patch16_224.dino", 16, 384),
    "dino_vits8": EncoderFacts("vit_small_patch8_224.dino", 8, 384),
    "dino_vitb16": EncoderFacts("vit_base_patch16_224.dino", 16, 768),
    "dino_vitb8": EncoderFacts("vit_base_patch8_224.dino", 8, 768),
    "mae_vitb16": EncoderFacts("vit_base_patch16_224.mae", 16, 768, norm=False),
    "mae_vitl16": EncoderFacts("vit_large_patch16_224.mae", 16, 1024, norm=False),
    "mae_vith14": EncoderFacts("vit_huge_patch14_224.mae", 14, 1280, norm=False),
    "mocov3_vits16": EncoderFacts("vit_small_patch16_224.dino", 16, 384, {"num_heads": 12}, "file", "base_encoder."),
    "mocov3_vitb16": EncoderFacts("vit_base_patch16_224.dino", 16, 768, {}, "file", "base_encoder."),
    "mocov3_vitl16": EncoderFacts("vit_large_patch16_224.mae", 16, 1024, {}, "file", "base_encoder.", _MOCOV3_L),
    "clip_vitb16": EncoderFacts("vit_base_patch16_clip_quickgelu_224.openai", 16, 768, norm=False),
    "clip_vitl14": EncoderFacts("vit_large_patch14_clip_quickgelu_224.openai", 14, 1024, norm=False),
    "clip_vitl14_336": EncoderFacts("vit_large_patch14_clip_quickgelu_336.openai", 14, 1024, norm=False),
    "siglip2_vitb16": EncoderFacts("vit_base_patch16_siglip_256.v2_webli", 16, 768),
    "siglip2_vitl16": EncoderFacts("vit_large_patch16_siglip_256.v2_webli", 16, 1024),
    "siglip2_vitg16": EncoderFacts("vit_giantopt_patch16_siglip_256.v2_webli", 16, 1536),
    "siglip2_so400m14": EncoderFacts("vit_so400m_patch14_siglip_224.v2_webli", 14, 1152),
    "siglip2_so400m16": EncoderFacts("vit_so400m_patch16_siglip_256.v2_webli", 16, 1152),
    "ijepa_vith14": EncoderFacts("vit_huge_patch14_gap_224.in1k_ijepa", 14, 1280),
}

for _name, _facts in _BUILT_IN.items():
    ENCODERS.add(_name, _facts)


# Before a name: a vision transformer of its patches and tokens, but two narrow blocks of random weights; for
# rehearsals.
TINY = "tiny-"
_TINY_OPTIONS = {"depth": 2, "embed_dim": 48, "num_heads": 2}


def facts_of(name: str) -> EncoderFacts | None:
    """What is known of an encoder, or None of a name that is timm's own."""
    if not name.startswith(TINY):
        found: EncoderFacts | None = ENCODERS.get(name)
        return found
    like = name.removeprefix(TINY)
    known: EncoderFacts = ENCODERS.get(like) or EncoderFacts(like, 0, 0)
    return replace(known, dim=_TINY_OPTIONS["embed_dim"], options={**known.options, **_TINY_OPTIONS}, weights="none")


def token_identity(name: str) -> dict[str, Any]:
    """Return what a name alone does not say of an encoder's tokens, for the identity of caches and protocols.

    Empty for built-in encoders whose tokens are taken after the final norm; of a plugin's, the digest of its file.
    """
    facts, origin = facts_of(name), ENCODERS.origin(name)
    before_norm = {} if facts is None or facts.norm else {"norm": False}
    return {**before_norm, **({"plugin": origin.digest} if origin else {})}


def input_size(stride: int, shape: tuple[int, int], image_size: int | None = None) -> tuple[int, int]:
    """The pixels (height, width) at which an encoder sees an image, its aspect kept.

    Without ``image_size`` it is the papers' rule: as many patches as there are 16-pixel cells in the image (256 px ->
    224 for patch 14), so that a ``SiT-*/2`` over 8x latents has exactly the encoder's grid (REPA, preprocessing in the
    released code). A side below 16 pixels gives 0, which is no size. With it, a square image is seen at ``image_size``
    and any other at about as many tokens: the multiples of the stride nearest to ``image_size * sqrt(height / width)``
    and its reverse, one at least.

    Args:
        stride: pixels per patch.
        shape: pixels (height, width) of the image.
        image_size: pixels along each side of a square input, or None.
    """
    height, width = shape
    if image_size is None:
        return stride * (height // 16), stride * (width // 16)
    if height == width:
        return image_size, image_size
    aspect = math.sqrt(height / width)
    return _nearest(image_size * aspect, stride), _nearest(image_size / aspect, stride)


def _nearest(side: float, stride: int) -> int:
    return stride * max(1, math.floor(side / stride + 0.5))


def grid_problem(name: str, image_size: int | None, resolution: int) -> str | None:
    """Why a known encoder cannot give a patch grid at this size, or None if it can or is not known."""
    facts = facts_of(name)
    if facts is None or facts.stride == 0:
        return None
    size, _ = input_size(facts.stride, (resolution, resolution), image_size)
    if size == 0:
        return (
            f"the papers' rule has no size for {resolution} px images; set image_size to a multiple of {facts.stride}"
        )
    if size % facts.stride:
        lower = size // facts.stride * facts.stride
        allowed = f"{lower or facts.stride}, {lower + facts.stride}, ..."
        return f"{name} has patches of {facts.stride}: {size} is no multiple; allowed: {allowed}"
    if size < 2 * facts.stride:
        return f"{name} gives one token at {size} px; patch tokens are required: use {2 * facts.stride} px or more"
    return None


def weights_problem(name: str, weights: str | None) -> str | None:
    """Why a known encoder cannot be had without a file of weights, or None if it can or is not known."""
    facts = facts_of(name)
    if facts is None or facts.weights != "file" or weights is not None:
        return None
    return f"the weights of '{name}' are on no model hub; give weights: FILE, the publisher's .pth.tar"
