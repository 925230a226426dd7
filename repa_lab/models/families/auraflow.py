"""AuraFlow: joint blocks that return text and image apart, then single ones: eight registers, the text, the image."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from repa_lab.models.facts import Family, Shape
from repa_lab.models.network import Blocks, Network

if TYPE_CHECKING:
    import torch

    from repa_lab.models.network import Condition


def _inputs(config: Any, latents: torch.Tensor, time: torch.Tensor, condition: Condition) -> dict[str, Any]:
    return {"hidden_states": latents, "timestep": time, **condition}


def _condition(config: Any, tokens: int) -> dict[str, tuple[int, ...]]:
    # It takes no mask: its pipeline puts the padding's embeddings to zero.
    return {"encoder_hidden_states": (tokens, config.joint_attention_dim)}


AURAFLOW = Family(
    "auraflow",
    "transformer",
    {"": Shape(36, 3072, 2, 8)},  # 4 joint blocks
    network=Network(
        model="AuraFlowTransformer2DModel",
        blocks=(Blocks("joint_transformer_blocks", item=1), Blocks("single_transformer_blocks", place="tail")),
        inputs=_inputs,
        condition=_condition,
        parameters=6_858_605_568,
        config={"pos_embed_max_size": 9216},  # AuraFlow-v0.3
        tiny={
            "sample_size": 16,
            "num_mmdit_layers": 2,
            "num_single_dit_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 12,
            "caption_projection_dim": 32,
            "pos_embed_max_size": 64,
        },
    ),
)
