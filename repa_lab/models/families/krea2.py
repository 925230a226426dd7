"""Krea 2: one sequence, text first; its text is a stack of a language model's layers. 2x2 latent cells are a token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from repa_lab.models.facts import Family, Shape
from repa_lab.models.families.language import QWEN_TOKENIZER, qwen3_vl
from repa_lab.models.families.parts import QWEN_AUTOENCODER, flow_scheduler
from repa_lab.models.layout import pack, positions, unpack
from repa_lab.models.network import Blocks, Network
from repa_lab.models.pipeline import Pipeline

if TYPE_CHECKING:
    import torch

    from repa_lab.models.network import Condition


def _inputs(config: Any, latents: torch.Tensor, time: torch.Tensor, condition: Condition) -> dict[str, Any]:
    height, width = latents.shape[-2:]
    text = condition["encoder_hidden_states"].transpose(1, 2)
    image = positions((height // 2, width // 2), 3, latents)
    places = image.new_zeros(text.shape[1] + image.shape[0], 3)
    places[text.shape[1] :] = image
    return {
        "hidden_states": pack(latents),
        "timestep": time,
        "encoder_hidden_states": text,
        "position_ids": places,
        "encoder_attention_mask": condition["encoder_attention_mask"].bool(),
    }


def _condition(config: Any, tokens: int) -> dict[str, tuple[int, ...]]:
    text = (config.num_text_layers, tokens, config.text_hidden_dim)
    return {"encoder_hidden_states": text, "encoder_attention_mask": (tokens,)}


def _encode(pipeline: Any, captions: Sequence[str]) -> dict[str, torch.Tensor]:
    text, mask = pipeline.encode_prompt(list(captions))
    return {"encoder_hidden_states": text.transpose(1, 2), "encoder_attention_mask": mask.long()}


def _call(condition: Condition, null: Condition, guidance: float) -> dict[str, Any]:
    given: dict[str, Any] = {"guidance_scale": guidance - 1}  # it adds the difference to the prediction with text
    for prefix, texts in (("", condition), ("negative_", null)):
        given[f"{prefix}prompt_embeds"] = texts["encoder_hidden_states"].transpose(1, 2)
        given[f"{prefix}prompt_embeds_mask"] = texts["encoder_attention_mask"].bool()
    return given


KREA2 = Family(
    "krea2",
    "transformer",
    {"": Shape(28, 6144, 2, 8)},
    network=Network(
        model="Krea2Transformer2DModel",
        blocks=(Blocks("transformer_blocks", place="tail"),),
        inputs=_inputs,
        condition=_condition,
        output=unpack,
        channels=16,
        parameters=12_820_073_036,  # Krea 2 is taken to be the constructor's defaults
        tiny={
            "in_channels": 16,
            "num_layers": 3,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "intermediate_size": 48,
            "timestep_embed_dim": 16,
            "text_hidden_dim": 12,
            "text_num_attention_heads": 2,
            "text_num_key_value_heads": 2,
            "text_intermediate_size": 16,
            "num_layerwise_text_blocks": 1,
            "num_refiner_text_blocks": 1,
            "axes_dims_rope": (4, 6, 6),
        },
    ),
    pipeline=Pipeline(
        released="krea/Krea-2-Raw",
        classes=("Krea2Pipeline",),
        encode=_encode,
        call=_call,
        tiny={
            "vae": QWEN_AUTOENCODER,
            "tokenizer": QWEN_TOKENIZER,
            "text_encoder": qwen3_vl(12, layers=35),  # the pipeline reads every third layer from the second
            "scheduler": flow_scheduler(use_dynamic_shifting=True, max_image_seq_len=6400),
        },
    ),
)
