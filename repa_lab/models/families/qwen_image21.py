"""Qwen-Image 2.1: one sequence, text first, in and out; a latent cell is a token, and four of them a slot of the sequence."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from repa_lab.models.facts import Family, Shape
from repa_lab.models.layout import flatten, unflatten
from repa_lab.models.network import Blocks, Network

if TYPE_CHECKING:
    import torch

    from repa_lab.models.network import Condition

_SLOT = 4  # cells


def _inputs(config: Any, latents: torch.Tensor, time: torch.Tensor, condition: Condition) -> dict[str, Any]:
    batch, _, height, width = latents.shape
    mask = condition["encoder_hidden_states_mask"].bool()
    slots = mask.new_ones(batch, mask.shape[1] + height * width // _SLOT)
    slots[:, : mask.shape[1]] = False
    return {
        "hidden_states": flatten(latents),
        "timestep": time,
        "img_shapes": [[(1, height, width)]] * batch,
        "img_mask": slots,
        "encoder_hidden_states": condition["encoder_hidden_states"],
        "encoder_hidden_states_mask": mask,
    }


def _output(output: Any, latents: torch.Tensor) -> torch.Tensor:
    return unflatten(output[:, -latents.shape[2] * latents.shape[3] :], latents)


def _condition(config: Any, tokens: int) -> dict[str, tuple[int, ...]]:
    return {"encoder_hidden_states": (tokens, config.context_in_dim), "encoder_hidden_states_mask": (tokens,)}


QWEN_IMAGE21 = Family(
    "qwen_image21",
    "transformer",
    {"": Shape(32, 4096, 1, 8)},
    latent_stride=16,
    network=Network(
        model="QwenImage21Transformer2DModel",
        blocks=(Blocks("transformer_blocks", place="tail"),),
        inputs=_inputs,
        condition=_condition,
        output=_output,
        channels=64,
        multiple=2,
        parameters=7_115_124_736,  # Qwen-Image-2.1 is taken to be the constructor's defaults
        tiny={
            "in_channels": 8,
            "out_channels": 8,
            "num_layers": 3,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "context_in_dim": 12,
            "axes_dims_rope": (4, 6, 6),
        },
    ),
)
