"""Qwen-Image: joint blocks that return text and image apart. 2x2 latent cells are a token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from repa_lab.models.facts import Family, Shape
from repa_lab.models.families.language import QWEN_TOKENIZER, longest, padded, qwen_vl
from repa_lab.models.families.parts import QWEN_AUTOENCODER, TEXT_ATTENTION, flow_scheduler
from repa_lab.models.layout import pack, unpack
from repa_lab.models.network import Blocks, Network
from repa_lab.models.pipeline import ATTENTION, Pipeline

if TYPE_CHECKING:
    import torch

    from repa_lab.models.network import Condition

_WORDS = 512  # of a text at most, as its call has it


def _inputs(config: Any, latents: torch.Tensor, time: torch.Tensor, condition: Condition) -> dict[str, Any]:
    batch, _, height, width = latents.shape
    shapes = [[(1, height // 2, width // 2)]] * batch
    return {"hidden_states": pack(latents), "timestep": time, "img_shapes": shapes, **condition}


def _condition(config: Any, tokens: int) -> dict[str, tuple[int, ...]]:
    return {"encoder_hidden_states": (tokens, config.joint_attention_dim), "encoder_hidden_states_mask": (tokens,)}


def _encode(pipeline: Any, captions: Sequence[str]) -> dict[str, torch.Tensor]:
    text, mask = pipeline.encode_prompt(list(captions), max_sequence_length=_WORDS)
    mask = text.new_ones(text.shape[:2]).long() if mask is None else mask
    return {"encoder_hidden_states": padded(text, _WORDS), "encoder_hidden_states_mask": padded(mask, _WORDS)}


def _call(condition: Condition, null: Condition, guidance: float) -> dict[str, Any]:
    given: dict[str, Any] = {"true_cfg_scale": guidance}
    for prefix, texts in (("", condition), ("negative_", null)):
        text, mask = texts["encoder_hidden_states"], texts["encoder_hidden_states_mask"]
        given |= {f"{prefix}prompt_embeds": longest(text, mask), f"{prefix}prompt_embeds_mask": longest(mask, mask)}
    return given


# As recalled. The last of them stretches the steps of sampling, and is no part of training.
_SHIFTS = {"base_shift": 0.5, "max_shift": 0.9, "max_image_seq_len": 8192, "shift_terminal": 0.02}

QWEN_IMAGE = Family(
    "qwen_image",
    "transformer",
    {"": Shape(60, 3072, 2, 8)},
    network=Network(
        model="QwenImageTransformer2DModel",
        blocks=(Blocks("transformer_blocks", item=1),),
        inputs=_inputs,
        condition=_condition,
        output=unpack,
        channels=16,
        parameters=20_430_401_088,  # Qwen-Image is the constructor's defaults
        tiny={
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 3,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 12,
            "axes_dims_rope": (4, 6, 6),
        },
    ),
    pipeline=Pipeline(
        released="Qwen/Qwen-Image",
        classes=("QwenImagePipeline",),
        encode=_encode,
        call=_call,
        tiny={
            "vae": QWEN_AUTOENCODER,
            "tokenizer": QWEN_TOKENIZER,
            "text_encoder": qwen_vl(12),
            "scheduler": flow_scheduler(use_dynamic_shifting=True, **_SHIFTS),
        },
        adapted=(*ATTENTION, *TEXT_ATTENTION),
    ),
)
