"""FIBO: as Bria 3, but every block sees a layer of the language model of its own, and a latent cell is a token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from repa_lab.models.facts import Family, Shape
from repa_lab.models.families.shared import with_image
from repa_lab.models.layout import flatten, positions, unflatten
from repa_lab.models.network import Blocks, Network

if TYPE_CHECKING:
    import torch

    from repa_lab.models.network import Condition


def _inputs(config: Any, latents: torch.Tensor, time: torch.Tensor, condition: Condition) -> dict[str, Any]:
    height, width = latents.shape[-2:]
    text = condition["encoder_hidden_states"]
    mask = with_image(condition["encoder_attention_mask"], height * width)
    return {
        "hidden_states": flatten(latents),
        "timestep": time * 1000,
        "img_ids": positions((height, width), 3, latents),
        "txt_ids": latents.new_zeros(text.shape[1], 3),
        "encoder_hidden_states": text,
        "text_encoder_layers": condition["text_encoder_layers"].unbind(1),
        "joint_attention_kwargs": {"attention_mask": mask[:, None, None]},
    }


def _condition(config: Any, tokens: int) -> dict[str, tuple[int, ...]]:
    return {
        "encoder_hidden_states": (tokens, config.joint_attention_dim),
        "text_encoder_layers": (config.num_layers + config.num_single_layers, tokens, config.text_encoder_dim),
        "encoder_attention_mask": (tokens,),
    }


BRIA_FIBO = Family(
    "bria_fibo",
    "transformer",
    {"": Shape(46, 3072, 1, 8)},  # 8 double blocks, so the suggested one is the first single block
    latent_stride=16,
    network=Network(
        model="BriaFiboTransformer2DModel",
        blocks=(Blocks("transformer_blocks", item=1), Blocks("single_transformer_blocks", place="tail")),
        inputs=_inputs,
        condition=_condition,
        output=unflatten,
        channels=48,
        parameters=8_285_836_848,
        config={"num_layers": 8, "in_channels": 48},  # FIBO, recalled; 8 billion parameters agree
        tiny={
            "in_channels": 8,
            "num_layers": 2,
            "num_single_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 12,
            "text_encoder_dim": 10,
            "axes_dims_rope": (4, 6, 6),
        },
    ),
)
