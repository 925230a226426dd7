"""LongCat-Image: FLUX.1 without pooled text; the positions of the image begin behind those of the longest text."""

from __future__ import annotations

from typing import Any

from repa_lab.models.families.flux import TINY
from repa_lab.models.families.shared import (
    JOINT_ATTENTION,
    JOINT_BLOCKS,
    encode_prompt,
    numbers,
    pack,
    positions,
    text_shapes,
    unpack,
)
from repa_lab.models.family import Blocks, Condition, Family, Network, Pipeline, Shape, Tensor
from repa_lab.models.tiny import QWEN_PROCESSOR, QWEN_TOKENIZER, flow_scheduler, kl_autoencoder, qwen_vl, tiny_pipeline


def _inputs(config: Any, latents: Tensor, time: Tensor, condition: Condition) -> dict[str, Any]:
    image = positions(latents.float())  # half precision is exact up to 256 only
    image[:, 0], image[:, 1:] = 1, image[:, 1:] + 512  # the longest text has so many tokens
    text = image.new_zeros(condition["encoder_hidden_states"].shape[1], 3)
    text[:, 1:] = numbers(image, len(text)).unsqueeze(1)
    return {"hidden_states": pack(latents), "timestep": time, "img_ids": image, "txt_ids": text, **condition}


def _allow(pipeline: Any, height: int, width: int) -> None:
    # The pipeline's method needs prompts to know the number of embeddings, and its call refuses prompts beside them.
    encode = pipeline.encode_prompt

    def encode_embeddings(prompt: Any = None, num_images_per_prompt: int = 1, prompt_embeds: Any = None) -> Any:
        prompts = prompt if prompt_embeds is None else [""] * len(prompt_embeds)
        return encode(prompts, num_images_per_prompt, prompt_embeds)

    pipeline.encode_prompt = encode_embeddings


LONGCAT_IMAGE = Family(
    "longcat_image",
    "transformer",
    {"": Shape(30, 3072, 2, 8)},
    network=Network(
        model="LongCatImageTransformer2DModel",
        blocks=(JOINT_BLOCKS, Blocks("single_transformer_blocks", item=1, depth="num_single_layers")),
        inputs=_inputs,
        condition=text_shapes("joint_attention_dim"),
        output=unpack,
        channels=16,
        parameters=6_270_668_864,
        # LongCat-Image according to other programs, which agrees with its 6 billion parameters
        config={"num_layers": 10, "num_single_layers": 20},
        tiny={**TINY, "in_channels": 64},  # the pipeline always draws 16 channels
    ),
    pipeline=Pipeline(
        released="meituan-longcat/LongCat-Image",
        classes=("LongCatImagePipeline",),
        allow=_allow,
        encode=encode_prompt("encoder_hidden_states"),
        options={"enable_prompt_rewrite": False},
        tiny=tiny_pipeline(
            kl_autoencoder(16, 0.3611, 0.1159),
            flow_scheduler(use_dynamic_shifting=True, shift=3.0),  # not checked against the released one
            (QWEN_TOKENIZER, qwen_vl(12)),
            text_processor=QWEN_PROCESSOR,
        ),
        adapted=JOINT_ATTENTION,
    ),
)
