"""Ovis-Image: FLUX.1 without pooled text or guidance, its text told its places."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from repa_lab.models.facts import Family, Shape
from repa_lab.models.layout import pack, positions, unpack, word_positions
from repa_lab.models.network import Blocks, Network

if TYPE_CHECKING:
    import torch

    from repa_lab.models.network import Condition


def _inputs(config: Any, latents: torch.Tensor, time: torch.Tensor, condition: Condition) -> dict[str, Any]:
    height, width = latents.shape[-2:]
    words = condition["encoder_hidden_states"].shape[1]
    return {
        "hidden_states": pack(latents),
        "timestep": time,
        "img_ids": positions((height // 2, width // 2), 3, latents),
        "txt_ids": word_positions(words, 3, (1, 2), latents),
        **condition,
    }


def _condition(config: Any, tokens: int) -> dict[str, tuple[int, ...]]:
    # It takes no mask: its pipeline puts the padding's embeddings to zero.
    return {"encoder_hidden_states": (tokens, config.joint_attention_dim)}


OVIS_IMAGE = Family(
    "ovis_image",
    "transformer",
    {"": Shape(33, 3072, 2, 8)},  # 6 double blocks, so the suggested one is a single block
    network=Network(
        model="OvisImageTransformer2DModel",
        blocks=(Blocks("transformer_blocks", item=1), Blocks("single_transformer_blocks", item=1)),
        inputs=_inputs,
        condition=_condition,
        output=unpack,
        channels=16,
        parameters=7_370_449_728,  # Ovis-Image-7B is the constructor's defaults
        tiny={
            "in_channels": 16,
            "out_channels": 16,
            "num_layers": 2,
            "num_single_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 12,
            "axes_dims_rope": (4, 6, 6),
        },
    ),
)
