"""HiDream-I1: the image first, then its texts; each block sees a layer of Llama of its own. An image that is not square
is padded to the largest, as the released model does it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from repa_lab.models.facts import Family, Shape
from repa_lab.models.families.language import LLAMA_TOKENIZER, language_model, padded
from repa_lab.models.families.parts import (
    CLIP_TOKENIZER,
    T5_TOKENIZER,
    clip_text,
    flow_scheduler,
    kl_autoencoder,
    t5_text,
)
from repa_lab.models.layout import pack, positions, unpack
from repa_lab.models.network import Blocks, Network
from repa_lab.models.pipeline import Pipeline

if TYPE_CHECKING:
    import torch

    from repa_lab.models.network import Condition


def _inputs(config: Any, latents: torch.Tensor, time: torch.Tensor, condition: Condition) -> dict[str, Any]:
    batch, channels, height, width = latents.shape
    image = pack(latents).unflatten(2, (channels, -1)).transpose(2, 3).flatten(2)
    ids = positions((height // 2, width // 2), 3, latents).expand(batch, -1, -1)
    length = image.shape[1] if height == width else config.max_resolution[0] * config.max_resolution[1] // 4
    return {
        "hidden_states": padded(image, length),
        "hidden_states_masks": padded(image.new_ones(image.shape[:2]), length),
        "img_ids": padded(ids, length),
        "img_sizes": [(length, 1)] * batch,  # a column, so that what comes out is a list of patches in any mode
        "timesteps": time * 1000,
        "encoder_hidden_states_t5": condition["encoder_hidden_states_t5"],
        "encoder_hidden_states_llama3": condition["encoder_hidden_states_llama3"].transpose(0, 1),
        "pooled_embeds": condition["pooled_embeds"],
    }


def _output(output: Any, latents: torch.Tensor) -> torch.Tensor:
    batch, channels, height, width = latents.shape
    patches = output.reshape(batch, channels, -1, 4).transpose(1, 2)
    return -unpack(patches[:, : height * width // 4], latents)


def _condition(config: Any, tokens: int) -> dict[str, tuple[int, ...]]:
    t5, llama = config.caption_channels
    return {
        "encoder_hidden_states_t5": (tokens, t5),
        "encoder_hidden_states_llama3": (max(config.llama_layers) + 1, tokens, llama),
        "pooled_embeds": (config.text_emb_dim,),
    }


def _encode(pipeline: Any, captions: Sequence[str]) -> dict[str, torch.Tensor]:
    texts = list(dict.fromkeys(captions))  # each once, as its call reads the empty one
    rows = [texts.index(caption) for caption in captions]
    t5, _, llama, _, pooled, _ = pipeline.encode_prompt(texts, do_classifier_free_guidance=False)
    return {
        "encoder_hidden_states_t5": t5[rows],
        "encoder_hidden_states_llama3": llama.transpose(0, 1)[rows],
        "pooled_embeds": pooled[rows],
    }


def _call(condition: Condition, null: Condition, guidance: float) -> dict[str, Any]:
    given: dict[str, Any] = {"guidance_scale": guidance}
    for prefix, texts in (("", condition), ("negative_", null)):
        given[f"{prefix}prompt_embeds_t5"] = texts["encoder_hidden_states_t5"]
        given[f"{prefix}prompt_embeds_llama3"] = texts["encoder_hidden_states_llama3"].transpose(0, 1)
        given[f"{prefix}pooled_prompt_embeds"] = texts["pooled_embeds"]
    return given


_CLIP = clip_text(8, projection_dim=4, max_position_embeddings=248)


def _allow(pipeline: Any, height: int, width: int) -> None:
    # It scales what it is asked for to the area of this size, rounding down, for which the thousandth of a pixel is.
    pipeline.default_sample_size = math.sqrt(height * width + 1e-3) / pipeline.vae_scale_factor


HIDREAM = Family(
    "hidream",
    "transformer",
    {"": Shape(48, 2560, 2, 8)},
    network=Network(
        model="HiDreamImageTransformer2DModel",
        blocks=(
            Blocks("double_stream_blocks", item=0, place="head"),
            Blocks("single_stream_blocks", place="head"),
        ),
        inputs=_inputs,
        condition=_condition,
        output=_output,
        depths=("num_layers", "num_single_layers"),
        per_block=("llama_layers",),
        channels=16,
        parameters=17_105_733_184,
        config={  # HiDream-I1-Full
            "patch_size": 2,
            "in_channels": 16,
            "caption_channels": (4096, 4096),
            "axes_dims_rope": (64, 32, 32),
            "llama_layers": (*range(32), *(31,) * 16),
        },
        tiny={
            "patch_size": 2,
            "in_channels": 4,
            "num_layers": 2,
            "num_single_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "caption_channels": (12, 10),
            "text_emb_dim": 8,
            "num_routed_experts": 2,
            "axes_dims_rope": (8, 4, 4),
            "max_resolution": (8, 16),
            "llama_layers": (0, 1, 2, 2),
        },
    ),
    pipeline=Pipeline(
        released="HiDream-ai/HiDream-I1-Full",
        classes=("HiDreamImagePipeline",),
        allow=_allow,
        encode=_encode,
        call=_call,
        tiny={
            "vae": kl_autoencoder(4, 0.3611, 0.1159),
            "tokenizer": CLIP_TOKENIZER,
            "text_encoder": _CLIP,
            "tokenizer_2": CLIP_TOKENIZER,
            "text_encoder_2": _CLIP,
            "tokenizer_3": T5_TOKENIZER,
            "text_encoder_3": t5_text(12),
            "tokenizer_4": LLAMA_TOKENIZER,
            "text_encoder_4": language_model("LlamaForCausalLM", 10, num_hidden_layers=3),
            "scheduler": flow_scheduler(shift=3.0),  # as recalled, and as diffusers trains it
        },
        adapted=("to_q", "to_k", "to_v", "to_out"),
    ),
)
