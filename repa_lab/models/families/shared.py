"""Arguments that several families take alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from repa_lab.models.network import Condition


def map_inputs(config: Any, latents: torch.Tensor, time: torch.Tensor, condition: Condition) -> dict[str, Any]:
    """Of a model that takes latents ``(B, C, H, W)``, times ``(B,)`` from 0 to 1,000, and conditioning under its own names."""
    return {"hidden_states": latents, "timestep": time * 1000, **condition}


def full_guidance(config: Any, time: torch.Tensor) -> dict[str, Any]:
    """Of a model distilled from guidance, if it is one: the guidance of training, 1, ``(B,)``."""
    return {"guidance": time.new_ones(time.shape)} if config.guidance_embeds else {}


def masked_text(config: Any, tokens: int) -> dict[str, tuple[int, ...]]:
    """The conditioning of a model that cuts each text off where its mask ends."""
    return {"encoder_hidden_states": (tokens, config.cap_feat_dim), "encoder_attention_mask": (tokens,)}


def text_lengths(condition: Condition) -> torch.Tensor:
    """Tokens of each text ``(B,)``, by its mask; padding stands on the right."""
    return condition["encoder_attention_mask"].sum(dim=1)


def masked_call(condition: Condition, null: Condition, guidance: float) -> dict[str, Any]:
    """Arguments of a pipeline that takes a text and its mask."""
    return {
        "prompt_embeds": condition["encoder_hidden_states"],
        "prompt_attention_mask": condition["encoder_attention_mask"],
        "negative_prompt_embeds": null["encoder_hidden_states"],
        "negative_prompt_attention_mask": null["encoder_attention_mask"],
        "guidance_scale": guidance,
    }


def zeroed_where_empty(
    pipeline: Any, captions: Sequence[str], encoded: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The encoded captions with zeros for empty ones, where the pipeline gives its model zeros for no text."""
    if not pipeline.config.force_zeros_for_empty_prompt:
        return encoded
    empty = [number for number, caption in enumerate(captions) if not caption]
    for values in encoded.values():
        values[empty] = 0
    return encoded
