"""HiDream-I1: the image first, then its texts; each block takes its own layer of Llama.

The model pads an image that is not square to the largest size, and so is its input here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from repa_lab.models.families.shared import pack, padded, positions, unpack
from repa_lab.models.family import Blocks, Condition, Family, Network, Pipeline, Shape, Tensor
from repa_lab.models.tiny import (
    FLUX_AUTOENCODER,
    LLAMA_TOKENIZER,
    clip,
    flow_scheduler,
    language_model,
    t5,
    tiny_pipeline,
    tiny_transformer,
)


def _inputs(config: Any, latents: Tensor, time: Tensor, condition: Condition) -> dict[str, Any]:
    batch, channels, height, width = latents.shape
    image = pack(latents).unflatten(2, (channels, -1)).transpose(2, 3).flatten(2)
    ids = positions(latents).expand(batch, -1, -1)
    length = image.shape[1] if height == width else config.max_resolution[0] * config.max_resolution[1] // 4
    return {
        "hidden_states": padded(image, length),
        "hidden_states_masks": padded(image.new_ones(image.shape[:2]), length),
        "img_ids": padded(ids, length),
        "img_sizes": [(length, 1)] * batch,  # one column, so that the output is a list of patches in any mode
        "timesteps": time * 1000,
        "encoder_hidden_states_t5": condition["encoder_hidden_states_t5"],
        "encoder_hidden_states_llama3": condition["encoder_hidden_states_llama3"].transpose(0, 1),
        "pooled_embeds": condition["pooled_embeds"],
    }


def _output(output: Any, latents: Tensor) -> Tensor:
    batch, channels, height, width = latents.shape
    patches = output.reshape(batch, channels, -1, 4).transpose(1, 2)
    return -unpack(patches[:, : height * width // 4], latents)


def _encode(pipeline: Any, captions: Sequence[str]) -> dict[str, Tensor]:
    texts = list(dict.fromkeys(captions))  # each once, as the pipeline's call encodes the empty one
    rows = [texts.index(caption) for caption in captions]
    t5, _, llama, _, pooled, _ = pipeline.encode_prompt(texts, do_classifier_free_guidance=False)
    return {
        "encoder_hidden_states_t5": t5[rows],
        "encoder_hidden_states_llama3": llama.transpose(0, 1)[rows],
        "pooled_embeds": pooled[rows],
    }


_CLIP = clip(8, projection_dim=4, max_position_embeddings=248)


def _allow(pipeline: Any, height: int, width: int) -> None:
    # The pipeline scales a requested size to the area of this one and rounds down, hence the thousandth of a pixel.
    pipeline.default_sample_size = math.sqrt(height * width + 1e-3) / pipeline.vae_scale_factor


HIDREAM = Family(
    "hidream",
    "transformer",
    {"": Shape(48, 2560, 2, 8)},
    network=Network(
        model="HiDreamImageTransformer2DModel",
        blocks=(
            Blocks("double_stream_blocks", item=0, place="head"),
            Blocks("single_stream_blocks", place="head", depth="num_single_layers"),
        ),
        inputs=_inputs,
        condition=lambda config, tokens: {
            "encoder_hidden_states_t5": (tokens, config.caption_channels[0]),
            "encoder_hidden_states_llama3": (max(config.llama_layers) + 1, tokens, config.caption_channels[1]),
            "pooled_embeds": (config.text_emb_dim,),
        },
        output=_output,
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
        tiny=tiny_transformer(
            patch_size=2,
            in_channels=4,
            num_layers=2,
            num_single_layers=2,
            caption_channels=(12, 10),
            text_emb_dim=8,
            num_routed_experts=2,
            axes_dims_rope=(8, 4, 4),
            max_resolution=(8, 16),
            llama_layers=(0, 1, 2, 2),
        ),
    ),
    pipeline=Pipeline(
        released="HiDream-ai/HiDream-I1-Full",
        classes=("HiDreamImagePipeline",),
        allow=_allow,
        encode=_encode,
        prompt=lambda condition: {
            "prompt_embeds_t5": condition["encoder_hidden_states_t5"],
            "prompt_embeds_llama3": condition["encoder_hidden_states_llama3"].transpose(0, 1),
            "pooled_prompt_embeds": condition["pooled_embeds"],
        },
        tiny=tiny_pipeline(
            FLUX_AUTOENCODER,
            flow_scheduler(shift=3.0),  # as diffusers trains it; not checked against the released one
            _CLIP,
            _CLIP,
            t5(12),
            (LLAMA_TOKENIZER, language_model("LlamaForCausalLM", 10, num_hidden_layers=3)),
        ),
        adapted=("to_q", "to_k", "to_v", "to_out"),
    ),
)
