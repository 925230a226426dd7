"""Lumina-Next: text by cross-attention and, pooled, beside the time; its rotary positions are the caller's to make."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from repa_lab.models.facts import Family, Shape
from repa_lab.models.network import Blocks, Network

if TYPE_CHECKING:
    import torch

    from repa_lab.models.network import Condition


def _inputs(config: Any, latents: torch.Tensor, time: torch.Tensor, condition: Condition) -> dict[str, Any]:
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

    height, width = latents.shape[-2:]
    head = config.hidden_size // config.num_attention_heads
    return {
        "hidden_states": latents,
        "timestep": 1 - time,
        "image_rotary_emb": get_2d_rotary_pos_embed_lumina(head, height // config.patch_size, width // config.patch_size),
        "cross_attention_kwargs": {},  # not None: its blocks unpack it
        **condition,
    }


def _output(output: Any, latents: torch.Tensor) -> torch.Tensor:
    velocity: torch.Tensor = -output[:, : latents.shape[1]]  # the variance's channels come last
    return velocity


def _condition(config: Any, tokens: int) -> dict[str, tuple[int, ...]]:
    return {"encoder_hidden_states": (tokens, config.cross_attention_dim), "encoder_mask": (tokens,)}


LUMINA_NEXT = Family(
    "lumina_next",
    "transformer",
    {"": Shape(24, 2304, 2, 8)},
    network=Network(
        model="LuminaNextDiT2DModel",
        blocks=(Blocks("layers"),),
        inputs=_inputs,
        condition=_condition,
        output=_output,
        parameters=1_754_898_976,
        config={"num_layers": 24, "num_kv_heads": 8},  # Lumina-Next-SFT, by diffusers' conversion script
        tiny={
            "sample_size": 16,
            "in_channels": 4,
            "hidden_size": 32,
            "num_layers": 3,
            "num_attention_heads": 4,
            "num_kv_heads": 2,
            "multiple_of": 8,
            "cross_attention_dim": 12,
        },
    ),
)
