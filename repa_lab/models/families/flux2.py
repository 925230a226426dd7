"""FLUX.2: as FLUX.1, but the text is told its places and the single blocks return one sequence, text first.

Its VAE's 32 channels are cut into 2x2 patches before they are normalised, so a latent cell here is 16 pixels in 128
channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from repa_lab.models.facts import Family, Shape
from repa_lab.models.families.language import PIXTRAL_PROCESSOR, mistral_vl
from repa_lab.models.families.parts import FLUX2_AUTOENCODER, TEXT_ATTENTION, flow_scheduler
from repa_lab.models.families.shared import full_guidance
from repa_lab.models.layout import flatten, positions, unflatten
from repa_lab.models.network import Blocks, Network
from repa_lab.models.pipeline import ATTENTION, Pipeline

if TYPE_CHECKING:
    import torch

    from repa_lab.models.network import Condition

_AXES = 4  # of the positions: image, row, column, word


def _inputs(config: Any, latents: torch.Tensor, time: torch.Tensor, condition: Condition) -> dict[str, Any]:
    height, width = latents.shape[-2:]
    words = condition["encoder_hidden_states"].shape[1]
    places = latents.new_zeros(words, _AXES)
    places[:, -1] = latents.new_tensor(range(words))
    return {
        "hidden_states": flatten(latents),
        "timestep": time,
        "img_ids": positions((height, width), _AXES, latents),
        "txt_ids": places,
        **condition,
        **full_guidance(config, time),
    }


def _condition(config: Any, tokens: int) -> dict[str, tuple[int, ...]]:
    return {"encoder_hidden_states": (tokens, config.joint_attention_dim)}


def _encode(pipeline: Any, captions: Sequence[str]) -> dict[str, torch.Tensor]:
    text, _ = pipeline.encode_prompt(list(captions))
    return {"encoder_hidden_states": text}


def _call(condition: Condition, null: Condition, guidance: float) -> dict[str, Any]:
    # The model was distilled from guidance, so nothing is computed without text.
    return {"prompt_embeds": condition["encoder_hidden_states"], "guidance_scale": guidance}


_SINGLE_BLOCKS = 48
_SINGLE_ATTENTION = (
    "to_qkv_mlp_proj",
    *(f"single_transformer_blocks.{block}.attn.to_out" for block in range(_SINGLE_BLOCKS)),
)

FLUX2 = Family(
    "flux2",
    "transformer",
    {"": Shape(56, 6144, 1, 8)},  # 8 double blocks, so the suggested one is the first single block
    latent_stride=16,
    network=Network(
        model="Flux2Transformer2DModel",
        blocks=(Blocks("transformer_blocks", item=1), Blocks("single_transformer_blocks", place="tail")),
        inputs=_inputs,
        condition=_condition,
        output=unflatten,
        depths=("num_layers", "num_single_layers"),
        channels=128,
        parameters=32_223_281_152,  # FLUX.2-dev is the constructor's defaults
        tiny={
            "in_channels": 8,
            "num_layers": 2,
            "num_single_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 12,
            "timestep_guidance_channels": 16,
            "axes_dims_rope": (4, 4, 4, 4),
        },
    ),
    pipeline=Pipeline(
        released="black-forest-labs/FLUX.2-dev",
        classes=("Flux2Pipeline",),  # Klein's needs a text to be without, and reads it with another language model
        encode=_encode,
        call=_call,
        tiny={
            "vae": FLUX2_AUTOENCODER,
            "tokenizer": PIXTRAL_PROCESSOR,
            # The pipeline reads the outputs of layers 10, 20 and 30.
            "text_encoder": mistral_vl("Mistral3ForConditionalGeneration", 4, num_hidden_layers=31),
            "scheduler": flow_scheduler(use_dynamic_shifting=True, shift=3.0),
        },
        adapted=(*ATTENTION, *TEXT_ATTENTION, *_SINGLE_ATTENTION),
    ),
)
