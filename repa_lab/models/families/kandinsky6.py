"""Kandinsky 6 for images: videos of one frame without sound, channels last; its blocks return image and sound apart."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from repa_lab.models.facts import Family, Shape
from repa_lab.models.network import Blocks, Network

if TYPE_CHECKING:
    import torch

    from repa_lab.models.network import Condition


def _inputs(config: Any, latents: torch.Tensor, time: torch.Tensor, condition: Condition) -> dict[str, Any]:
    frame = latents.permute(0, 2, 3, 1).unsqueeze(1)
    channels = frame.shape[-1]
    given = frame.new_zeros(*frame.shape[:-1], 2 * channels + 1 if config.visual_cond else channels)
    given[..., :channels] = frame  # behind it, a frame to start from and its mask: none
    return {
        "hidden_states": given,
        "timestep": time * 1000,
        "encoder_hidden_states": condition["encoder_hidden_states"],
        "pooled_projections": condition["pooled_projections"],
        "encoder_attention_mask": condition["encoder_attention_mask"].bool(),
    }


def _output(output: Any, latents: torch.Tensor) -> torch.Tensor:
    image: torch.Tensor = output.squeeze(1).permute(0, 3, 1, 2)
    return image


def _condition(config: Any, tokens: int) -> dict[str, tuple[int, ...]]:
    text = {"encoder_hidden_states": (tokens, config.in_text_dim), "encoder_attention_mask": (tokens,)}
    return {**text, "pooled_projections": (config.in_text_dim2,)}


KANDINSKY6 = Family(
    "kandinsky6",
    "transformer",
    {"": Shape(60, 4096, 2, 8)},
    network=Network(
        model="Kandinsky6Transformer3DModel",
        blocks=(Blocks("visual_transformer_blocks", item=0),),
        inputs=_inputs,
        condition=_condition,
        output=_output,
        channels=16,
        native=512,
        parameters=30_136_326_248,
        config={  # Kandinsky 6 for video and sound, from a copy of its configuration
            "in_audio_dim": 40,
            "out_audio_dim": 40,
            "model_dim_a": 2048,
            "ff_dim_a": 7168,
            "text_token_padding": True,
            "ca_rope": True,
            "cross_gates": True,
            "fix_modulation": True,
            "visual_token_type_num_embeddings": 2,
        },
        tiny={
            "in_visual_dim": 4,
            "out_visual_dim": 4,
            "in_text_dim": 12,
            "in_text_dim2": 10,
            "time_dim": 16,
            "model_dim": 32,
            "ff_dim": 48,
            "num_text_blocks": 2,
            "num_visual_blocks": 3,
            "axes_dims": (4, 6, 6),
            "in_audio_dim": 4,
            "out_audio_dim": 4,
            "ca_rope": True,
            "cross_gates": True,
            "fix_modulation": True,
        },
    ),
)
