"""Qwen-Image: joint blocks that return text and image apart. A token is 2x2 latent cells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from repa_lab.models.families.shared import JOINT_ATTENTION, JOINT_BLOCKS, longest, pack, padded, text_shapes, unpack
from repa_lab.models.family import Condition, Family, Network, Pipeline, Shape, Tensor
from repa_lab.models.tiny import (
    QWEN_AUTOENCODER,
    QWEN_TOKENIZER,
    flow_scheduler,
    qwen_vl,
    tiny_pipeline,
    tiny_transformer,
)

_MOST_TOKENS = 512  # of a text, as in the pipeline's call


def _inputs(config: Any, latents: Tensor, time: Tensor, condition: Condition) -> dict[str, Any]:
    batch, _, height, width = latents.shape
    grids = [[(1, height // 2, width // 2)]] * batch
    return {"hidden_states": pack(latents), "timestep": time, "img_shapes": grids, **condition}


def _encode(pipeline: Any, captions: Sequence[str]) -> dict[str, Tensor]:
    text, mask = pipeline.encode_prompt(list(captions), max_sequence_length=_MOST_TOKENS)
    mask = text.new_ones(text.shape[:2]).long() if mask is None else mask
    text, mask = padded(text, _MOST_TOKENS), padded(mask, _MOST_TOKENS)
    return {"encoder_hidden_states": text, "encoder_hidden_states_mask": mask}


def _prompt(condition: Condition) -> dict[str, Any]:
    text, mask = condition["encoder_hidden_states"], condition["encoder_hidden_states_mask"]
    return {"prompt_embeds": longest(text, mask), "prompt_embeds_mask": longest(mask, mask)}


# Not checked against the released ones. The last one stretches the steps of sampling and does not affect training.
_SHIFTS = {"base_shift": 0.5, "max_shift": 0.9, "max_image_seq_len": 8192, "shift_terminal": 0.02}

QWEN_IMAGE = Family(
    "qwen_image",
    "transformer",
    {"": Shape(60, 3072, 2, 8)},
    network=Network(
        model="QwenImageTransformer2DModel",
        blocks=(JOINT_BLOCKS,),
        inputs=_inputs,
        condition=text_shapes("joint_attention_dim", encoder_hidden_states_mask=("tokens",)),
        output=unpack,
        unused=True,  # the text stream of the last block
        channels=16,
        parameters=20_430_401_088,  # Qwen-Image has the constructor's defaults
        tiny=tiny_transformer(in_channels=16, out_channels=4, joint_attention_dim=12, axes_dims_rope=(4, 6, 6)),
    ),
    pipeline=Pipeline(
        released="Qwen/Qwen-Image",
        classes=("QwenImagePipeline",),
        encode=_encode,
        prompt=_prompt,
        guidance="true_cfg_scale",
        tiny=tiny_pipeline(
            QWEN_AUTOENCODER, flow_scheduler(use_dynamic_shifting=True, **_SHIFTS), (QWEN_TOKENIZER, qwen_vl(12))
        ),
        adapted=JOINT_ATTENTION,
    ),
)
