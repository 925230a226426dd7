"""FLUX.1: text and image in separate streams, then in one sequence, text first. A token is 2x2 latent cells."""

from __future__ import annotations

from typing import Any

from repa_lab.models.families.shared import (
    JOINT_ATTENTION,
    JOINT_BLOCKS,
    encode_prompt,
    full_guidance,
    pack,
    positions,
    text_shapes,
    unpack,
)
from repa_lab.models.family import Blocks, Condition, Family, Network, Pipeline, Shape, Tensor
from repa_lab.models.tiny import FLUX_AUTOENCODER, clip, flow_scheduler, t5, tiny_pipeline, tiny_transformer


def packed_inputs(latents: Tensor, time: Tensor, condition: Condition) -> dict[str, Any]:
    """Return the arguments of FLUX.1 and its relatives: packed latents, time, positions, and the conditioning."""
    return {
        "hidden_states": pack(latents),
        "timestep": time,
        "img_ids": positions(latents),
        "txt_ids": latents.new_zeros(condition["encoder_hidden_states"].shape[1], 3),
        **condition,
    }


TINY: dict[str, Any] = tiny_transformer(
    in_channels=16, num_layers=2, num_single_layers=2, joint_attention_dim=12, axes_dims_rope=(4, 6, 6)
)

FLUX = Family(
    "flux",
    "transformer",
    {"": Shape(57, 3072, 2, 8)},
    network=Network(
        model="FluxTransformer2DModel",
        blocks=(JOINT_BLOCKS, Blocks("single_transformer_blocks", item=1, depth="num_single_layers")),
        inputs=lambda config, latents, time, condition: {
            **packed_inputs(latents, time, condition),
            **full_guidance(config, time),
        },
        condition=text_shapes("joint_attention_dim", pooled_projections=("pooled_projection_dim",)),
        output=unpack,
        config={"guidance_embeds": True},  # FLUX.1-dev
        channels=16,
        parameters=11_901_408_320,
        tiny={**TINY, "pooled_projection_dim": 10, "guidance_embeds": True},
    ),
    pipeline=Pipeline(
        released="black-forest-labs/FLUX.1-dev",
        classes=("FluxPipeline",),
        encode=encode_prompt("encoder_hidden_states", "pooled_projections", prompt_2=None),
        negative=False,  # the model is distilled from guidance
        tiny=tiny_pipeline(FLUX_AUTOENCODER, flow_scheduler(use_dynamic_shifting=True, shift=3.0), clip(10), t5(12)),
        adapted=JOINT_ATTENTION,
    ),
)
