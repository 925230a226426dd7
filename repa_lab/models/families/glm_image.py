"""GLM-Image: blocks that return image and text apart. A language model draws a token per patch, which is added to the patch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from repa_lab.models.facts import Family, Shape
from repa_lab.models.network import PER_TOKEN, Blocks, Network

if TYPE_CHECKING:
    import torch

    from repa_lab.models.network import Condition


def _inputs(config: Any, latents: torch.Tensor, time: torch.Tensor, condition: Condition) -> dict[str, Any]:
    return {
        "hidden_states": latents,
        "timestep": time * 1000 - 1,
        "prior_token_id": condition["prior_token_ids"],
        "prior_token_drop": time.new_zeros(0).long(),  # indices of none, which needs no look at values as truth values do
        **{name: condition[name] for name in ("encoder_hidden_states", "target_size", "crop_coords")},
    }


def _condition(config: Any, tokens: int) -> dict[str, tuple[int, ...]]:
    # The text is of glyphs alone. Its mask is left out as its pipeline does it: it would be added to attention's logits.
    text = (tokens, config.text_embed_dim)
    return {"encoder_hidden_states": text, "prior_token_ids": (PER_TOKEN,), "target_size": (2,), "crop_coords": (2,)}


GLM_IMAGE = Family(
    "glm_image",
    "transformer",
    {"": Shape(30, 4096, 2, 8)},
    network=Network(
        model="GlmImageTransformer2DModel",
        blocks=(Blocks("transformer_blocks", item=0),),
        inputs=_inputs,
        condition=_condition,
        channels=16,
        parameters=6_926_882_880,
        # GLM-Image, as other programs have it; 7 billion parameters agree
        config={"attention_head_dim": 128, "num_attention_heads": 32},
        tiny={
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 3,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "text_embed_dim": 12,
            "time_embed_dim": 16,
            "condition_dim": 8,
            "prior_vq_quantizer_codebook_size": 16,
        },
    ),
)
