"""AuraFlow: joint blocks that return text and image apart, then single ones: eight registers, the text, the image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from repa_lab.models.facts import Family, Shape
from repa_lab.models.families.parts import TEXT_ATTENTION, flow_scheduler, kl_autoencoder, t5_text
from repa_lab.models.network import Blocks, Network
from repa_lab.models.pipeline import ATTENTION, Part, Pipeline

if TYPE_CHECKING:
    import torch

    from repa_lab.models.network import Condition


def _inputs(config: Any, latents: torch.Tensor, time: torch.Tensor, condition: Condition) -> dict[str, Any]:
    return {"hidden_states": latents, "timestep": time, **condition}


def _condition(config: Any, tokens: int) -> dict[str, tuple[int, ...]]:
    # It takes no mask: its pipeline puts the padding's embeddings to zero.
    return {"encoder_hidden_states": (tokens, config.joint_attention_dim)}


def _encode(pipeline: Any, captions: Sequence[str]) -> dict[str, torch.Tensor]:
    text, *_ = pipeline.encode_prompt(list(captions), do_classifier_free_guidance=False)
    return {"encoder_hidden_states": text}


def _call(condition: Condition, null: Condition, guidance: float) -> dict[str, Any]:
    text, empty = condition["encoder_hidden_states"], null["encoder_hidden_states"]
    return {
        "prompt_embeds": text,
        "prompt_attention_mask": text[..., 0],  # it asks for masks and does nothing with them
        "negative_prompt_embeds": empty,
        "negative_prompt_attention_mask": empty[..., 0],
        "guidance_scale": guidance,
    }


AURAFLOW = Family(
    "auraflow",
    "transformer",
    {"": Shape(36, 3072, 2, 8)},  # 4 joint blocks
    network=Network(
        model="AuraFlowTransformer2DModel",
        depths=("num_mmdit_layers", "num_single_dit_layers"),
        blocks=(Blocks("joint_transformer_blocks", item=1), Blocks("single_transformer_blocks", place="tail")),
        inputs=_inputs,
        condition=_condition,
        parameters=6_858_605_568,
        config={"pos_embed_max_size": 9216},  # AuraFlow-v0.3
        tiny={
            "sample_size": 16,
            "num_mmdit_layers": 2,
            "num_single_dit_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 12,
            "caption_projection_dim": 32,
            "pos_embed_max_size": 64,
        },
    ),
    pipeline=Pipeline(
        released="fal/AuraFlow-v0.3",
        classes=("AuraFlowPipeline",),
        encode=_encode,
        call=_call,
        tiny={
            "vae": kl_autoencoder(4, 0.13025),
            "tokenizer": Part("transformers.LlamaTokenizer", {"pad_token": "<pad>", "padding_side": "right"}),
            "text_encoder": t5_text(12, "UMT5EncoderModel"),
            "scheduler": flow_scheduler(shift=1.73),
        },
        adapted=(*ATTENTION, *TEXT_ATTENTION),
    ),
)
