"""Chroma: FLUX.1 without pooled text or guidance, its padding masked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from repa_lab.models.facts import Family, Shape
from repa_lab.models.families.parts import T5_TOKENIZER, TEXT_ATTENTION, flow_scheduler, kl_autoencoder, t5_text
from repa_lab.models.layout import pack, positions, unpack
from repa_lab.models.network import Blocks, Network
from repa_lab.models.pipeline import ATTENTION, Pipeline

if TYPE_CHECKING:
    import torch

    from repa_lab.models.network import Condition


def _inputs(config: Any, latents: torch.Tensor, time: torch.Tensor, condition: Condition) -> dict[str, Any]:
    height, width = latents.shape[-2:]
    text = condition["encoder_hidden_states"]
    image = pack(latents)
    return {
        "hidden_states": image,
        "timestep": time,
        "img_ids": positions((height // 2, width // 2), 3, latents),
        "txt_ids": latents.new_zeros(text.shape[1], 3),
        "encoder_hidden_states": text,
        "attention_mask": _with_image(condition["attention_mask"], image.shape[1]),
    }


def _with_image(mask: torch.Tensor, tokens: int) -> torch.Tensor:
    """The text's mask followed by an image's; as truth values, for attention would add numbers to its logits."""
    batch, words = mask.shape
    whole = mask.bool().new_ones(batch, words + tokens)
    whole[:, :words] = mask
    return whole


def _condition(config: Any, tokens: int) -> dict[str, tuple[int, ...]]:
    # As its pipeline encodes a prompt, the mask leaves the first token of the padding in.
    return {"encoder_hidden_states": (tokens, config.joint_attention_dim), "attention_mask": (tokens,)}


def _encode(pipeline: Any, captions: Sequence[str]) -> dict[str, torch.Tensor]:
    text, _, mask, *_ = pipeline.encode_prompt(list(captions), do_classifier_free_guidance=False)
    return {"encoder_hidden_states": text, "attention_mask": mask.long()}


def _call(condition: Condition, null: Condition, guidance: float) -> dict[str, Any]:
    # Truth values again: what its pipeline encodes itself are numbers, which attention adds and so masks nothing
    # (https://github.com/huggingface/diffusers/issues/12116).
    return {
        "prompt_embeds": condition["encoder_hidden_states"],
        "prompt_attention_mask": condition["attention_mask"].bool(),
        "negative_prompt_embeds": null["encoder_hidden_states"],
        "negative_prompt_attention_mask": null["attention_mask"].bool(),
        "guidance_scale": guidance,
    }


CHROMA = Family(
    "chroma",
    "transformer",
    {"": Shape(57, 3072, 2, 8)},
    network=Network(
        model="ChromaTransformer2DModel",
        depths=("num_layers", "num_single_layers"),
        blocks=(Blocks("transformer_blocks", item=1), Blocks("single_transformer_blocks", place="tail")),
        inputs=_inputs,
        condition=_condition,
        output=unpack,
        channels=16,
        uncheckpointed="its single blocks are run without the text's mask",
        parameters=8_899_983_424,  # Chroma1-HD is the constructor's defaults
        tiny={
            "in_channels": 16,
            "num_layers": 2,
            "num_single_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 12,
            "axes_dims_rope": (4, 6, 6),
            "approximator_num_channels": 16,
            "approximator_hidden_dim": 16,
            "approximator_layers": 1,
        },
    ),
    pipeline=Pipeline(
        released="lodestones/Chroma1-HD",
        classes=("ChromaPipeline",),
        encode=_encode,
        call=_call,
        tiny={
            "vae": kl_autoencoder(4, 0.3611, 0.1159),
            "tokenizer": T5_TOKENIZER,
            "text_encoder": t5_text(12),
            "scheduler": flow_scheduler(shift=3.0),
        },
        adapted=(*ATTENTION, *TEXT_ATTENTION),
    ),
)
