"""Krea 2: one sequence, text first; the text is a stack of layers of a language model. A token is 2x2 latent cells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from repa_lab.models.families.shared import pack, positions, shapes, unpack
from repa_lab.models.family import Blocks, Condition, Family, Network, Pipeline, Shape, Tensor
from repa_lab.models.tiny import (
    QWEN_AUTOENCODER,
    QWEN_TOKENIZER,
    flow_scheduler,
    qwen3_vl,
    tiny_pipeline,
    tiny_transformer,
)


def _inputs(config: Any, latents: Tensor, time: Tensor, condition: Condition) -> dict[str, Any]:
    text = condition["encoder_hidden_states"].transpose(1, 2)
    image = positions(latents)
    ids = image.new_zeros(text.shape[1] + image.shape[0], 3)
    ids[text.shape[1] :] = image
    return {
        "hidden_states": pack(latents),
        "timestep": time,
        "encoder_hidden_states": text,
        "position_ids": ids,
        "encoder_attention_mask": condition["encoder_attention_mask"].bool(),
    }


def _encode(pipeline: Any, captions: Sequence[str]) -> dict[str, Tensor]:
    text, mask = pipeline.encode_prompt(list(captions))
    return {"encoder_hidden_states": text.transpose(1, 2), "encoder_attention_mask": mask.long()}


KREA2 = Family(
    "krea2",
    "transformer",
    {"": Shape(28, 6144, 2, 8)},
    network=Network(
        model="Krea2Transformer2DModel",
        blocks=(Blocks("transformer_blocks", place="tail"),),
        inputs=_inputs,
        condition=shapes(
            encoder_hidden_states=("num_text_layers", "tokens", "text_hidden_dim"), encoder_attention_mask=("tokens",)
        ),
        output=unpack,
        channels=16,
        parameters=12_820_073_036,  # Krea 2 is assumed to have the constructor's defaults
        tiny=tiny_transformer(
            in_channels=16,
            num_key_value_heads=1,
            intermediate_size=48,
            timestep_embed_dim=16,
            text_hidden_dim=12,
            text_num_attention_heads=2,
            text_num_key_value_heads=2,
            text_intermediate_size=16,
            num_layerwise_text_blocks=1,
            num_refiner_text_blocks=1,
            axes_dims_rope=(4, 6, 6),
        ),
    ),
    pipeline=Pipeline(
        released="krea/Krea-2-Raw",
        classes=("Krea2Pipeline",),
        encode=_encode,
        prompt=lambda condition: {
            "prompt_embeds": condition["encoder_hidden_states"].transpose(1, 2),
            "prompt_embeds_mask": condition["encoder_attention_mask"].bool(),
        },
        unguided=0,
        tiny=tiny_pipeline(
            QWEN_AUTOENCODER,
            flow_scheduler(use_dynamic_shifting=True, max_image_seq_len=6400),
            (QWEN_TOKENIZER, qwen3_vl(12, layers=35)),  # the pipeline reads every third layer from the second
        ),
    ),
)
