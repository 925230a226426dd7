"""Bria 3: FLUX.1 without pooled text or guidance, its times from 0 to 1,000."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from repa_lab.models.facts import Family, Shape
from repa_lab.models.layout import pack, positions, unpack
from repa_lab.models.network import Blocks, Network

if TYPE_CHECKING:
    import torch

    from repa_lab.models.network import Condition


def _inputs(config: Any, latents: torch.Tensor, time: torch.Tensor, condition: Condition) -> dict[str, Any]:
    height, width = latents.shape[-2:]
    words = condition["encoder_hidden_states"].shape[1]
    return {
        "hidden_states": pack(latents),
        "timestep": time * 1000,
        "img_ids": positions((height // 2, width // 2), 3, latents),
        "txt_ids": latents.new_zeros(words, 3),
        **condition,
    }


def _condition(config: Any, tokens: int) -> dict[str, tuple[int, ...]]:
    # It takes no mask: its pipeline puts the padding's embeddings to zero.
    return {"encoder_hidden_states": (tokens, config.joint_attention_dim)}


BRIA = Family(
    "bria",
    "transformer",
    # Of the constructor's defaults: the configuration of BRIA-3.2, of 4 billion parameters, is behind a gate.
    {"": Shape(57, 3072, 2, 8)},
    network=Network(
        model="BriaTransformer2DModel",
        blocks=(Blocks("transformer_blocks", item=1), Blocks("single_transformer_blocks", item=1)),
        inputs=_inputs,
        condition=_condition,
        output=unpack,
        channels=16,
        parameters=11_879_375_936,
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
