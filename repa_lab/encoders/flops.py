"""FLOPs and parameters of encoders by formula: a vision transformer's follow from its shape. Imports no torch."""

from __future__ import annotations

from repa_lab.encoders.registry import facts_of
from repa_lab.timm_models import TINY

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
    patches = (side // facts.stride) ** 2
    tokens = patches + _prefix_tokens(name)
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


def _prefix_tokens(name: str) -> int:
    """Return the number of tokens before the patches: the class token and registers."""
    original = name.removeprefix(TINY)
    if original.startswith(("siglip", "ijepa")):
        return 0
    return 5 if original.endswith("_reg") or original.startswith("dinov3") else 1
