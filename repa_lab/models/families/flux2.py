"""FLUX.2: like FLUX.1, but the text has positions and the single blocks return one sequence, text first.

The 32 channels of its VAE are cut into 2x2 patches before they are normalised, so a latent cell here covers 16 pixels
along each side and has 128 channels.
"""

from __future__ import annotations

from typing import Any

from repa_lab.models.families.shared import (
    JOINT_ATTENTION,
    JOINT_BLOCKS,
    encode_prompt,
    flatten,
    full_guidance,
    numbers,
    positions,
    text_shapes,
    unflatten,
)
from repa_lab.models.family import Blocks, Condition, Family, Network, Pipeline, Shape, Tensor
from repa_lab.models.tiny import (
    FLUX2_AUTOENCODER,
    PIXTRAL_PROCESSOR,
    flow_scheduler,
    mistral_vl,
    tiny_pipeline,
    tiny_transformer,
)

_AXES = 4  # of the positions: image, row, column, word


def _inputs(config: Any, latents: Tensor, time: Tensor, condition: Condition) -> dict[str, Any]:
    words = condition["encoder_hidden_states"].shape[1]
    text_positions = latents.new_zeros(words, _AXES)
    text_positions[:, -1] = numbers(latents, words)
    return {
        "hidden_states": flatten(latents),
        "timestep": time,
        "img_ids": positions(latents, _AXES, patch=1),
        "txt_ids": text_positions,
        **condition,
        **full_guidance(config, time),
    }


FLUX2 = Family(
    "flux2",
    "transformer",
    {"": Shape(56, 6144, 1, 8)},  # 8 double blocks, so the suggested one is the first single block
    latent_stride=16,
    network=Network(
        model="Flux2Transformer2DModel",
        blocks=(JOINT_BLOCKS, Blocks("single_transformer_blocks", place="tail", depth="num_single_layers")),
        inputs=_inputs,
        condition=text_shapes("joint_attention_dim"),
        output=unflatten,
        channels=128,
        parameters=32_223_281_152,  # FLUX.2-dev has the constructor's defaults
        tiny=tiny_transformer(
            in_channels=8,
            num_layers=2,
            num_single_layers=2,
            joint_attention_dim=12,
            timestep_guidance_channels=16,
            axes_dims_rope=(4, 4, 4, 4),
        ),
    ),
    pipeline=Pipeline(
        released="black-forest-labs/FLUX.2-dev",
        classes=("Flux2Pipeline",),  # not Klein's, which needs a negative text and has another language model
        encode=encode_prompt("encoder_hidden_states"),
        negative=False,  # the model is distilled from guidance
        tiny=tiny_pipeline(
            FLUX2_AUTOENCODER,
            flow_scheduler(use_dynamic_shifting=True, shift=3.0),
            # The pipeline reads the outputs of layers 10, 20 and 30.
            (PIXTRAL_PROCESSOR, mistral_vl("Mistral3ForConditionalGeneration", 4, num_hidden_layers=31)),
        ),
        adapted=(
            *JOINT_ATTENTION,
            "to_qkv_mlp_proj",
            *(f"single_transformer_blocks.{block}.attn.to_out" for block in range(48)),
        ),
    ),
)
