"""Arguments that several families take alike."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from repa_lab.models.network import Condition


def map_inputs(config: Any, latents: torch.Tensor, time: torch.Tensor, condition: Condition) -> dict[str, Any]:
    """Of a model that takes latents as a map, times from 0 to 1,000, and conditioning under its own names."""
    return {"hidden_states": latents, "timestep": time * 1000, **condition}


def full_guidance(config: Any, time: torch.Tensor) -> dict[str, Any]:
    """Of a model distilled from guidance, if it is one: the guidance of training, 1."""
    return {"guidance": time.new_ones(time.shape)} if config.guidance_embeds else {}


def masked_text(config: Any, tokens: int) -> dict[str, tuple[int, ...]]:
    """The conditioning of a model that cuts each text off where its mask ends."""
    return {"encoder_hidden_states": (tokens, config.cap_feat_dim), "encoder_attention_mask": (tokens,)}


def text_lengths(condition: Condition) -> torch.Tensor:
    """Tokens of each text ``(B,)``, by its mask; padding stands on the right."""
    return condition["encoder_attention_mask"].sum(dim=1)
