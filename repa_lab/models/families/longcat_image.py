"""LongCat-Image: FLUX.1 without pooled text, whose image stands, by its places, behind the longest text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from repa_lab.models.facts import Family, Shape
from repa_lab.models.layout import pack, positions, unpack, word_positions
from repa_lab.models.network import Blocks, Network

if TYPE_CHECKING:
    import torch

    from repa_lab.models.network import Condition

_LONGEST = 512  # words of a text


def _inputs(config: Any, latents: torch.Tensor, time: torch.Tensor, condition: Condition) -> dict[str, Any]:
    height, width = latents.shape[-2:]
    words = condition["encoder_hidden_states"].shape[1]
    image = positions((height // 2, width // 2), 3, latents).float()  # exact up to 256 only in half precision
    image[:, 0], image[:, 1:] = 1, image[:, 1:] + _LONGEST
    return {
        "hidden_states": pack(latents),
        "timestep": time,
        "img_ids": image,
        "txt_ids": word_positions(words, 3, (1, 2), latents),
        **condition,
    }


def _condition(config: Any, tokens: int) -> dict[str, tuple[int, ...]]:
    return {"encoder_hidden_states": (tokens, config.joint_attention_dim)}


LONGCAT_IMAGE = Family(
    "longcat_image",
    "transformer",
    {"": Shape(30, 3072, 2, 8)},
    network=Network(
        model="LongCatImageTransformer2DModel",
        blocks=(Blocks("transformer_blocks", item=1), Blocks("single_transformer_blocks", item=1)),
        inputs=_inputs,
        condition=_condition,
        output=unpack,
        channels=16,
        parameters=6_270_668_864,
        # LongCat-Image, as other programs have it; 6 billion parameters agree
        config={"num_layers": 10, "num_single_layers": 20},
        tiny={
            "in_channels": 16,
            "num_layers": 2,
            "num_single_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 12,
            "axes_dims_rope": (4, 6, 6),
        },
    ),
)
