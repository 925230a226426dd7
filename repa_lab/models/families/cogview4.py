"""CogView4: blocks that return image and text apart, told the image's original size, its target size and its crop.

Its text has padding that the model sees, and no mask: up to a multiple of 16 tokens, and up to the longest text of a
batch. A text is as long here as it is alone, and so is a batch as long as its longest; what stands behind shorter ones
is padding too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from repa_lab.models.facts import Family, Shape
from repa_lab.models.families.language import LEFT_TOKENIZER, language_model, longest, padded
from repa_lab.models.families.parts import flow_scheduler, kl_autoencoder
from repa_lab.models.families.shared import map_inputs, text_lengths
from repa_lab.models.network import Blocks, Network
from repa_lab.models.pipeline import Pipeline

if TYPE_CHECKING:
    import torch

    from repa_lab.models.network import Condition

_WORDS = 1024  # of a text at most


def _text(condition: Condition) -> torch.Tensor:
    return longest(condition["encoder_hidden_states"], condition["encoder_attention_mask"])


def _inputs(config: Any, latents: torch.Tensor, time: torch.Tensor, condition: Condition) -> dict[str, Any]:
    sizes = {name: condition[name] for name in ("original_size", "target_size", "crop_coords")}
    return map_inputs(config, latents, time, {"encoder_hidden_states": _text(condition), **sizes})


def _condition(config: Any, tokens: int) -> dict[str, tuple[int, ...]]:
    text = {"encoder_hidden_states": (tokens, config.text_embed_dim), "encoder_attention_mask": (tokens,)}
    return {**text, "original_size": (2,), "target_size": (2,), "crop_coords": (2,)}


def _read(pipeline: Any, text: str) -> torch.Tensor:
    """A text alone: its language model sees the padding before it, of which company brings more."""
    read: torch.Tensor = pipeline.encode_prompt(text, do_classifier_free_guidance=False)[0][0]
    return read


def _encode(pipeline: Any, captions: Sequence[str]) -> dict[str, torch.Tensor]:
    import torch

    texts, tokenizer = [_read(pipeline, caption) for caption in captions], pipeline.tokenizer
    padding = _read(pipeline, tokenizer.pad_token * (_WORDS - len(tokenizer("").input_ids)))
    rows = torch.stack([torch.cat([text, padding[len(text) :]]) for text in texts])
    masks = torch.cat([padded(text.new_ones(1, len(text)).long(), _WORDS) for text in texts])
    return {"encoder_hidden_states": rows, "encoder_attention_mask": masks}


def _call(condition: Condition, null: Condition, guidance: float) -> dict[str, Any]:
    return {"prompt_embeds": _text(condition), "negative_prompt_embeds": _text(null), "guidance_scale": guidance}


def _sizes(config: Any, frames: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"original_size": frames[:, :2], "crop_coords": frames[:, 2:4], "target_size": frames[:, 4:]}


# As its conversion to diffusers sets them.
_DYNAMIC = {"use_dynamic_shifting": True, "base_shift": 0.25, "max_shift": 0.75, "time_shift_type": "linear"}

COGVIEW4 = Family(
    "cogview4",
    "transformer",
    {"": Shape(28, 4096, 2, 8)},
    network=Network(
        model="CogView4Transformer2DModel",
        blocks=(Blocks("transformer_blocks", item=0),),
        inputs=_inputs,
        condition=_condition,
        lengths=text_lengths,
        channels=16,
        parameters=6_369_118_272,
        config={"num_layers": 28, "num_attention_heads": 32, "attention_head_dim": 128},  # CogView4-6B
        tiny={
            "sample_size": 16,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 3,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "text_embed_dim": 12,
            "time_embed_dim": 16,
            "condition_dim": 8,
        },
    ),
    pipeline=Pipeline(
        released="zai-org/CogView4-6B",
        classes=("CogView4Pipeline",),
        encode=_encode,
        call=_call,
        sizes=_sizes,
        tiny={
            "vae": kl_autoencoder(4, 1.0),
            "tokenizer": LEFT_TOKENIZER,
            "text_encoder": language_model("GlmModel", 12),
            "scheduler": flow_scheduler(**_DYNAMIC),
        },
    ),
)
