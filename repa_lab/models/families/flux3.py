"""FLUX.3: text and image in blocks of their own, without a look at each other, then in one sequence. Latents of FLUX.2."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from repa_lab.models.facts import Family, Shape
from repa_lab.models.layout import flatten, positions, unflatten, word_positions
from repa_lab.models.network import Blocks, Network

if TYPE_CHECKING:
    import torch

    from repa_lab.models.network import Condition

_AXES = 4  # of the positions: time, row, column, word
_SCALE = 0.5  # of rows and columns


def _inputs(config: Any, latents: torch.Tensor, time: torch.Tensor, condition: Condition) -> dict[str, Any]:
    height, width = latents.shape[-2:]
    words = condition["encoder_hidden_states"].shape[1]
    return {
        "hidden_states": flatten(latents),
        "timestep": time,
        "img_ids": positions((height, width), _AXES, latents) * _SCALE,
        "txt_ids": word_positions(words, _AXES, (3,), latents),
        **condition,
    }


def _condition(config: Any, tokens: int) -> dict[str, tuple[int, ...]]:
    return {"encoder_hidden_states": (tokens, config.joint_attention_dim)}


FLUX3 = Family(
    "flux3",
    "transformer",
    {"": Shape(33, 3072, 1, 8)},  # 5 blocks of the image alone, so the suggested one is a joint block
    latent_stride=16,
    network=Network(
        model="Flux3Transformer2DModel",
        blocks=(Blocks("mode_blocks.image"), Blocks("single_transformer_blocks", item=1)),
        inputs=_inputs,
        condition=_condition,
        output=unflatten,
        channels=128,
        parameters=5_538_458_368,  # FLUX.3, not distilled, is taken to be the constructor's defaults
        tiny={
            "in_channels": 8,
            "cond_in_channels": 8,
            "num_layers": 2,
            "num_single_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 12,
            "timestep_channels": 16,
            "axes_dims_rope": (4, 4, 4, 4),
        },
    ),
)
