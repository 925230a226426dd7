"""FLUX.1 and two families that are made like it, Chroma and LongCat-Image. A token is 2x2 latent cells.

Text and image go through separate streams, then in one sequence, text first. Chroma has neither pooled text nor
guidance, and masks its padding. LongCat-Image has no pooled text, and the positions of its image begin behind those of
the longest text.
"""

from __future__ import annotations

from typing import Any

from repa_lab.models.families.components import (
    CLIP_TOKENIZER,
    FLUX_AUTOENCODER,
    QWEN_PROCESSOR,
    QWEN_TOKENIZER,
    T5_TOKENIZER,
    clip_text,
    flow_scheduler,
    kl_autoencoder,
    qwen_vl,
    t5_text,
)
from repa_lab.models.families.shared import (
    JOINT_ATTENTION,
    encode_prompt,
    full_guidance,
    numbers,
    pack,
    positions,
    rename,
    shapes,
    unpack,
)
from repa_lab.models.family import Blocks, Condition, Family, Network, Pipeline, Shape, Tensor


def _packed_inputs(latents: Tensor, time: Tensor, condition: Condition) -> dict[str, Any]:
    """Return the arguments of FLUX.1 and its relatives: packed latents, time, positions, and the conditioning."""
    return {
        "hidden_states": pack(latents),
        "timestep": time,
        "img_ids": positions(latents),
        "txt_ids": latents.new_zeros(condition["encoder_hidden_states"].shape[1], 3),
        **condition,
    }


def _inputs(config: Any, latents: Tensor, time: Tensor, condition: Condition) -> dict[str, Any]:
    return {**_packed_inputs(latents, time, condition), **full_guidance(config, time)}


_TINY: dict[str, Any] = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "axes_dims_rope": (4, 6, 6),
}

FLUX = Family(
    "flux",
    "transformer",
    {"": Shape(57, 3072, 2, 8)},
    network=Network(
        model="FluxTransformer2DModel",
        depths=("num_layers", "num_single_layers"),
        blocks=(Blocks("transformer_blocks", item=1), Blocks("single_transformer_blocks", item=1)),
        inputs=_inputs,
        condition=shapes(
            encoder_hidden_states=("tokens", "joint_attention_dim"), pooled_projections=("pooled_projection_dim",)
        ),
        output=unpack,
        config={"guidance_embeds": True},  # FLUX.1-dev
        channels=16,
        parameters=11_901_408_320,
        tiny={**_TINY, "pooled_projection_dim": 10, "guidance_embeds": True},
    ),
    pipeline=Pipeline(
        released="black-forest-labs/FLUX.1-dev",
        classes=("FluxPipeline",),
        encode=encode_prompt("encoder_hidden_states", "pooled_projections", prompt_2=None),
        prompt=rename(prompt_embeds="encoder_hidden_states", pooled_prompt_embeds="pooled_projections"),
        negative=False,  # the model is distilled from guidance
        tiny={
            "vae": FLUX_AUTOENCODER,
            "tokenizer": CLIP_TOKENIZER,
            "text_encoder": clip_text(10),
            "tokenizer_2": T5_TOKENIZER,
            "text_encoder_2": t5_text(12),
            "scheduler": flow_scheduler(use_dynamic_shifting=True, shift=3.0),
        },
        adapted=JOINT_ATTENTION,
    ),
)

# ---- Chroma


def _chroma_inputs(config: Any, latents: Tensor, time: Tensor, condition: Condition) -> dict[str, Any]:
    inputs, mask = _packed_inputs(latents, time, condition), condition["attention_mask"]
    batch, words = mask.shape
    # Attention adds a mask of numbers to its logits, so this one is of truth values. The image follows the text.
    whole = mask.bool().new_ones(batch, words + inputs["hidden_states"].shape[1])
    whole[:, :words] = mask
    return {**inputs, "attention_mask": whole}


def _chroma_prompt(condition: Condition) -> dict[str, Any]:
    # The pipeline itself encodes masks of numbers, which mask nothing
    # (https://github.com/huggingface/diffusers/issues/12116).
    mask = condition["attention_mask"].bool()
    return {"prompt_embeds": condition["encoder_hidden_states"], "prompt_attention_mask": mask}


CHROMA = Family(
    "chroma",
    "transformer",
    {"": Shape(57, 3072, 2, 8)},
    network=Network(
        model="ChromaTransformer2DModel",
        depths=("num_layers", "num_single_layers"),
        blocks=(Blocks("transformer_blocks", item=1), Blocks("single_transformer_blocks", place="tail")),
        inputs=_chroma_inputs,
        # The pipeline's mask leaves the first token of the padding in.
        condition=shapes(encoder_hidden_states=("tokens", "joint_attention_dim"), attention_mask=("tokens",)),
        output=unpack,
        channels=16,
        uncheckpointed="its single blocks are run without the text's mask",
        parameters=8_899_983_424,  # Chroma1-HD has the constructor's defaults
        tiny={
            **_TINY,
            "approximator_num_channels": 16,
            "approximator_hidden_dim": 16,
            "approximator_layers": 1,
        },
    ),
    pipeline=Pipeline(
        released="lodestones/Chroma1-HD",
        classes=("ChromaPipeline",),
        encode=encode_prompt("encoder_hidden_states", None, "attention_mask", do_classifier_free_guidance=False),
        prompt=_chroma_prompt,
        tiny={
            "vae": FLUX_AUTOENCODER,
            "tokenizer": T5_TOKENIZER,
            "text_encoder": t5_text(12),
            "scheduler": flow_scheduler(shift=3.0),
        },
        adapted=JOINT_ATTENTION,
    ),
)

# ---- LongCat-Image

_LONGCAT_TOKENS = 512  # of a text


def _longcat_inputs(config: Any, latents: Tensor, time: Tensor, condition: Condition) -> dict[str, Any]:
    image = positions(latents.float())  # half precision is exact up to 256 only
    image[:, 0], image[:, 1:] = 1, image[:, 1:] + _LONGCAT_TOKENS
    text = image.new_zeros(condition["encoder_hidden_states"].shape[1], 3)
    text[:, 1:] = numbers(image, len(text)).unsqueeze(1)
    return {"hidden_states": pack(latents), "timestep": time, "img_ids": image, "txt_ids": text, **condition}


def _longcat_allow(pipeline: Any, height: int, width: int) -> None:
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
        depths=("num_layers", "num_single_layers"),
        blocks=(Blocks("transformer_blocks", item=1), Blocks("single_transformer_blocks", item=1)),
        inputs=_longcat_inputs,
        condition=shapes(encoder_hidden_states=("tokens", "joint_attention_dim")),
        output=unpack,
        channels=16,
        parameters=6_270_668_864,
        # LongCat-Image according to other programs, which agrees with its 6 billion parameters
        config={"num_layers": 10, "num_single_layers": 20},
        tiny={**_TINY, "in_channels": 64},  # the pipeline always draws 16 channels
    ),
    pipeline=Pipeline(
        released="meituan-longcat/LongCat-Image",
        classes=("LongCatImagePipeline",),
        allow=_longcat_allow,
        encode=encode_prompt("encoder_hidden_states"),
        prompt=rename(prompt_embeds="encoder_hidden_states"),
        options={"enable_prompt_rewrite": False},
        tiny={
            "vae": kl_autoencoder(16, 0.3611, 0.1159),
            "tokenizer": QWEN_TOKENIZER,
            "text_encoder": qwen_vl(12),
            "text_processor": QWEN_PROCESSOR,
            "scheduler": flow_scheduler(use_dynamic_shifting=True, shift=3.0),  # not checked against the released one
        },
        adapted=JOINT_ATTENTION,
    ),
)
