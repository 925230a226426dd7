"""Encoders by name, as data, the checks that `plan` makes of them, and their FLOPs. Imports no torch.

SimpleTuner's names map to timm's models. Any other name is taken as timm's own and checked when it is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

from repa_lab.registry import Registry
from repa_lab.timm_models import TINY, TINY_DIM, TimmModel, needs_file, tiny

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Resize = Literal["bicubic", "bilinear", "bicubic-antialias", "bilinear-antialias"]
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class EncoderFacts(TimmModel):
    """An encoder as data: a timm model, the source of its weights, and its patch grid.

    Attributes:
        stride: pixels per patch token along each side.
        dim: width D of a token.
        norm: whether tokens are taken after the model's final norm, or before it.
        build: builds the module of a plugin's encoder; see :func:`encoder`.
        mean: per-channel mean of pixels in [0, 1], for a plugin's encoder; otherwise timm's, as for ``std``.
        resize: filter that resizes images to the encoder's input size.
    """

    stride: int
    dim: int
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
    """Register an encoder under the name used in ``regularizer.encoder.name``.

    Decorates a function that takes ``encoder.weights`` (a file name, or None) and returns a module, which maps
    normalised images ``(B, 3, H, W)`` to a feature map ``(B, dim, H / patch_size, W / patch_size)``.

    Args:
        patch_size: pixels per token along each side.
        dim: width of a token.
        mean: per-channel mean of pixels in [0, 1]; ``std`` is their standard deviation.
        resize: filter that resizes images to the encoder's input size.

    Raises:
        PluginError: the name is taken.
    """

    def register(build: F) -> F:
        ENCODERS.add(name, EncoderFacts(name, patch_size, dim, build=build, mean=mean, std=std, resize=resize))
        return build

    return register


def _mocov3(timm_name: str, dim: int, options: dict[str, int], renames: dict[str, str]) -> EncoderFacts:
    """Return an encoder of MoCo v3, which timm lacks, as timm's ViT of the same shape and pixel statistics."""
    source: dict[str, Any] = {"weights": "file", "prefix": "base_encoder."}
    return EncoderFacts(timm_name, 16, dim, options=options, renames=renames, **source)


# In the file that the REPA authors use for ViT-L, four layers are named after the number of their block.
_MOCOV3_L = {"norm13": "norm1", "fc13": "fc1", "norm14": "norm2", "fc14": "fc2"}

# OpenAI trained CLIP with QuickGELU; timm's names without it apply GELU to the same weights. Each SigLIP 2 is the one
# trained on 16x16 patches, the grid that the papers' rule gives for images of 256 px.
#
# Tokens are taken after the final norm, as DINOv2's publisher defines its patch features (`x_norm_patchtokens`) and as
# REPA's code takes those of DINOv2, MoCo v3 and I-JEPA. REPA's code takes those of MAE and CLIP before it: norm=False.
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
    "mocov3_vits16": _mocov3("vit_small_patch16_224.dino", 384, {"num_heads": 12}, {}),  # 12 heads, timm's has 6
    "mocov3_vitb16": _mocov3("vit_base_patch16_224.dino", 768, {}, {}),
    "mocov3_vitl16": _mocov3("vit_large_patch16_224.mae", 1024, {}, _MOCOV3_L),
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


def facts_of(name: str) -> EncoderFacts | None:
    """Return the facts of an encoder; None for a name that only timm may know."""
    if not name.startswith(TINY):
        facts: EncoderFacts | None = ENCODERS.get(name)
        return facts
    original = name.removeprefix(TINY)
    return replace(tiny(ENCODERS.get(original) or EncoderFacts(original, 0, 0)), dim=TINY_DIM)


def token_identity(name: str) -> dict[str, Any]:
    """Return what determines an encoder's tokens beside its name, for the identity of caches and protocols."""
    facts, origin = facts_of(name), ENCODERS.origin(name)
    before_norm = {} if facts is None or facts.norm else {"norm": False}
    return {**before_norm, **({"plugin": origin.digest} if origin else {})}


def input_size(stride: int, shape: tuple[int, int], image_size: int | None = None) -> tuple[int, int]:
    """Return the height and width in pixels at which an encoder sees an image; its aspect is kept.

    Without ``image_size``, the papers' rule: one patch per 16-pixel cell of the image (256 px -> 224 for patch 14), so
    that a ``SiT-*/2`` over 8x latents has exactly the encoder's grid (REPA, preprocessing in the released code). A
    side below 16 pixels gives 0, which is no valid size. With ``image_size``, a square image is seen at that size and
    any other image at about as many tokens: each side is the multiple of the stride nearest to
    ``image_size * sqrt(height / width)`` or ``image_size / sqrt(height / width)``, one patch at least.

    ``shape`` is the image's height and width, ``stride`` the pixels per patch.
    """
    height, width = shape
    if image_size is None:
        return stride * (height // 16), stride * (width // 16)
    if height == width:
        return image_size, image_size
    aspect = math.sqrt(height / width)
    tall, wide = (max(1, math.floor(side / stride + 0.5)) for side in (image_size * aspect, image_size / aspect))
    return stride * tall, stride * wide


def grid_problem(name: str, image_size: int | None, resolution: int) -> str | None:
    """Return why a registered encoder gives no patch grid at this size; None if it gives one or is not registered."""
    facts = facts_of(name)
    if facts is None or facts.stride == 0:
        return None
    stride = facts.stride
    size, _ = input_size(stride, (resolution, resolution), image_size)
    if size == 0:
        return f"the papers' rule has no size for {resolution} px images; set image_size to a multiple of {stride}"
    if size % stride:
        lower = size // stride * stride
        allowed = f"{lower or stride}, {lower + stride}, ..."
        return f"{name} has patches of {stride}: {size} is not a multiple; allowed: {allowed}"
    if size < 2 * stride:
        return f"{name} gives one token at {size} px; patch tokens are required: use {2 * stride} px or more"
    return None


def weights_problem(name: str, weights: str | None) -> str | None:
    """Return why a registered encoder cannot be loaded without a file of weights; None if it can."""
    facts = facts_of(name)
    return needs_file(name) if facts is not None and facts.weights == "file" and weights is None else None


def attention_problem(name: str, blocks: Sequence[int], depth: int | None = None) -> str | None:
    """Return why queries and keys of these blocks cannot be captured; None if they can, or if only timm may know.

    Args:
        name: the encoder's name.
        blocks: the encoder's blocks as Python's indices: -1 is the last.
        depth: number of blocks with attention that can be captured; None is the registered encoder's.
    """
    facts = facts_of(name)
    if depth is None and facts is not None:
        # timm's DINOv3 turns queries and keys by their positions after the place where they are captured.
        is_plain = facts.build is None and facts.timm_name.startswith("vit_") and "dinov3" not in facts.timm_name
        depth = _DEPTHS.get(facts.dim) if is_plain else 0
    if depth is None or all(-depth <= block < depth for block in blocks):
        return None
    if depth:
        return f"'{name}' has {depth} blocks, and the attention of {len(blocks)} is asked"
    return f"the attention of '{name}' cannot be captured: use a vision transformer of timm, such as dinov2_vitb14"


# Blocks by width. Each block has 12 D^2 weights, except in the models of _OTHER_WEIGHTS.
_DEPTHS = {48: 2, 384: 12, 768: 12, 1024: 24, 1152: 27, 1280: 32, 1536: 40, 4096: 40}
_OTHER_WEIGHTS = {
    "dinov3_vits16plus": 28_311_552,
    "dinov3_vith16plus": 838_860_800,
    "dinov3_vit7b16": 6_710_886_400,
    "siglip2_so400m14": 411_070_464,
    "siglip2_so400m16": 411_070_464,
}
_CONVOLUTIONAL = {"efficientnet_lite0": (15_302, 3_371_008)}  # FLOPs per pixel, parameters


def encoder_flops(name: str, side: int) -> float | None:
    """Return the FLOPs of a forward pass through an encoder at ``side`` pixels; None for an unregistered encoder.

    Each token is multiplied by every weight of the blocks; attention has two products of ``tokens^2 D`` multiply-adds
    per block.
    """
    if name in _CONVOLUTIONAL:
        return _CONVOLUTIONAL[name][0] * float(side) ** 2
    facts, weights = facts_of(name), encoder_weights(name)
    if facts is None or weights is None or not facts.stride:
        return None
    patches, original = (side // facts.stride) ** 2, name.removeprefix(TINY)
    with_registers = original.endswith("_reg") or original.startswith("dinov3")
    prefix = 0 if original.startswith(("siglip", "ijepa")) else 5 if with_registers else 1  # class token and registers
    tokens = patches + prefix
    attention = 2 * _DEPTHS[facts.dim] * tokens**2 * facts.dim
    return 2.0 * (tokens * weights + attention + patches * 3 * facts.stride**2 * facts.dim)


def encoder_weights(name: str) -> int | None:
    """Return the parameters of an encoder's blocks, nearly all it has; None for an unregistered encoder."""
    if name in _CONVOLUTIONAL:
        return _CONVOLUTIONAL[name][1]
    facts = facts_of(name)
    if facts is None or facts.dim not in _DEPTHS:
        return None
    return _OTHER_WEIGHTS.get(name, 12 * _DEPTHS[facts.dim] * facts.dim**2)
