"""LongCat-Image: FLUX.1 without pooled text, whose image stands, by its places, behind the longest text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from repa_lab.models.facts import Family, Shape
from repa_lab.models.families.language import QWEN_PROCESSOR, QWEN_TOKENIZER, qwen_vl
from repa_lab.models.families.parts import TEXT_ATTENTION, flow_scheduler, kl_autoencoder
from repa_lab.models.layout import pack, positions, unpack
from repa_lab.models.network import Blocks, Network
from repa_lab.models.pipeline import ATTENTION, Pipeline

if TYPE_CHECKING:
    import torch

    from repa_lab.models.network import Condition

_LONGEST = 512  # words of a text


def _inputs(config: Any, latents: torch.Tensor, time: torch.Tensor, condition: Condition) -> dict[str, Any]:
    height, width = latents.shape[-2:]
    image = positions((height // 2, width // 2), 3, latents.float())  # half precision is exact up to 256 only
    image[:, 0], image[:, 1:] = 1, image[:, 1:] + _LONGEST
    text = image.new_zeros(condition["encoder_hidden_states"].shape[1], 3)
    text[:, 1:] = image.new_tensor(range(len(text))).unsqueeze(1)
    return {
        "hidden_states": pack(latents),
        "timestep": time,
        "img_ids": image,
        "txt_ids": text,
        **condition,
    }


def _condition(config: Any, tokens: int) -> dict[str, tuple[int, ...]]:
    return {"encoder_hidden_states": (tokens, config.joint_attention_dim)}


def _encode(pipeline: Any, captions: Sequence[str]) -> dict[str, torch.Tensor]:
    text, _ = pipeline.encode_prompt(list(captions))
    return {"encoder_hidden_states": text}


def _call(condition: Condition, null: Condition, guidance: float) -> dict[str, Any]:
    return {
        "prompt_embeds": condition["encoder_hidden_states"],
        "negative_prompt_embeds": null["encoder_hidden_states"],
        "guidance_scale": guidance,
        "enable_prompt_rewrite": False,
    }


def _allow(pipeline: Any, height: int, width: int) -> None:
    # The pipeline's own counts prompts to tell how many embeddings there are, and refuses prompts beside embeddings.
    encode = pipeline.encode_prompt

    def encode_prompt(prompt: Any = None, num_images_per_prompt: int = 1, prompt_embeds: Any = None) -> Any:
        prompts = prompt if prompt_embeds is None else [""] * len(prompt_embeds)
        return encode(prompts, num_images_per_prompt, prompt_embeds)

    pipeline.encode_prompt = encode_prompt


LONGCAT_IMAGE = Family(
    "longcat_image",
    "transformer",
    {"": Shape(30, 3072, 2, 8)},
    network=Network(
        model="LongCatImageTransformer2DModel",
        depths=("num_layers", "num_single_layers"),
        blocks=(Blocks("transformer_blocks", item=1), Blocks("single_transformer_blocks", item=1)),
        inputs=_inputs,
        condition=_condition,
        output=unpack,
        channels=16,
        parameters=6_270_668_864,
        # LongCat-Image, as other programs have it; 6 billion parameters agree
        config={"num_layers": 10, "num_single_layers": 20},
        tiny={
            "in_channels": 64,  # the pipeline draws 16 channels, whatever the model takes
            "num_layers": 2,
            "num_single_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 12,
            "axes_dims_rope": (4, 6, 6),
        },
    ),
    pipeline=Pipeline(
        released="meituan-longcat/LongCat-Image",
        classes=("LongCatImagePipeline",),
        allow=_allow,
        encode=_encode,
        call=_call,
        tiny={
            "vae": kl_autoencoder(16, 0.3611, 0.1159),
            "tokenizer": QWEN_TOKENIZER,
            "text_encoder": qwen_vl(12),
            "text_processor": QWEN_PROCESSOR,
            "scheduler": flow_scheduler(use_dynamic_shifting=True, shift=3.0),  # not checked against the released one
        },
        adapted=(*ATTENTION, *TEXT_ATTENTION),
    ),
)
