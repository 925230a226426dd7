"""HunyuanImage 2.1: joint blocks, then single ones, that all return image and text apart; a token per cell of 32x32 pixels.

A second text, of the letters that the image is to show, goes before the first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from repa_lab.models.facts import Family, Shape
from repa_lab.models.network import Blocks, Network

if TYPE_CHECKING:
    import torch

    from repa_lab.models.network import Condition


def _inputs(config: Any, latents: torch.Tensor, time: torch.Tensor, condition: Condition) -> dict[str, Any]:
    # The time's type is the one in which the model embeds it.
    return {"hidden_states": latents, "timestep": (time * 1000).to(latents.dtype), **condition}


def _condition(config: Any, tokens: int) -> dict[str, tuple[int, ...]]:
    text = {"encoder_hidden_states": (tokens, config.text_embed_dim), "encoder_attention_mask": (tokens,)}
    if config.text_embed_2_dim is None:
        return text
    return {**text, "encoder_hidden_states_2": (tokens, config.text_embed_2_dim), "encoder_attention_mask_2": (tokens,)}


HUNYUAN_IMAGE = Family(
    "hunyuan_image",
    "transformer",
    {"": Shape(60, 3584, 1, 8)},
    latent_stride=32,
    network=Network(
        model="HunyuanImageTransformer2DModel",
        blocks=(Blocks("transformer_blocks", item=0), Blocks("single_transformer_blocks", item=0)),
        inputs=_inputs,
        condition=_condition,
        channels=64,
        uncheckpointed="its blocks are given arguments by name, which diffusers' own checkpointing does not take",
        native=2048,
        parameters=17_425_795_520,
        config={"text_embed_2_dim": 1472},  # HunyuanImage-2.1, not distilled; the width is ByT5-small's
        tiny={
            "in_channels": 8,
            "out_channels": 8,
            "num_layers": 2,
            "num_single_layers": 2,
            "num_refiner_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "text_embed_dim": 12,
            "text_embed_2_dim": 10,
            "rope_axes_dim": (8, 8),
        },
    ),
)
