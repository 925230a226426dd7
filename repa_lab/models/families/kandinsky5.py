"""Kandinsky 5 for images: videos of one frame, channels last; text by cross-attention, after blocks of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from repa_lab.models.facts import Family, Shape
from repa_lab.models.network import Blocks, Network

if TYPE_CHECKING:
    import torch

    from repa_lab.models.network import Condition


def _inputs(config: Any, latents: torch.Tensor, time: torch.Tensor, condition: Condition) -> dict[str, Any]:
    import torch

    _, rows, columns = config.patch_size
    frames = (1, latents.shape[2] // rows, latents.shape[3] // columns)
    words = condition["encoder_hidden_states"].shape[1]
    return {
        "hidden_states": latents.permute(0, 2, 3, 1).unsqueeze(1),
        "timestep": time * 1000,
        "visual_rope_pos": [torch.arange(count, device=latents.device) for count in frames],
        "text_rope_pos": torch.arange(words, device=latents.device),
        **condition,
    }


def _condition(config: Any, tokens: int) -> dict[str, tuple[int, ...]]:
    return {"encoder_hidden_states": (tokens, config.in_text_dim), "pooled_projections": (config.in_text_dim2,)}


def _output(output: Any, latents: torch.Tensor) -> torch.Tensor:
    image: torch.Tensor = output.squeeze(1).permute(0, 3, 1, 2)
    return image


KANDINSKY5 = Family(
    "kandinsky5",
    "transformer",
    {"": Shape(50, 2560, 2, 8)},
    network=Network(
        model="Kandinsky5Transformer3DModel",
        blocks=(Blocks("visual_transformer_blocks"),),
        inputs=_inputs,
        condition=_condition,
        output=_output,
        channels=16,
        parameters=6_022_080_576,
        config={  # Kandinsky-5.0-T2I-Lite
            "in_visual_dim": 16,
            "out_visual_dim": 16,
            "model_dim": 2560,
            "ff_dim": 10240,
            "num_visual_blocks": 50,
            "axes_dims": (32, 48, 48),
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
        },
    ),
)
