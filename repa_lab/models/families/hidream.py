"""HiDream-I1: the image first, then its texts; each block sees a layer of Llama of its own. An image that is not square is
padded to the largest, as the released model does it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from repa_lab.models.facts import Family, Shape
from repa_lab.models.layout import pack, positions, unpack
from repa_lab.models.network import Blocks, Network

if TYPE_CHECKING:
    import torch

    from repa_lab.models.network import Condition


def _inputs(config: Any, latents: torch.Tensor, time: torch.Tensor, condition: Condition) -> dict[str, Any]:
    batch, channels, height, width = latents.shape
    image = pack(latents).unflatten(2, (channels, -1)).transpose(2, 3).flatten(2)
    ids = positions((height // 2, width // 2), 3, latents).expand(batch, -1, -1)
    length = image.shape[1] if height == width else config.max_resolution[0] * config.max_resolution[1] // 4
    return {
        "hidden_states": _padded(image, length),
        "hidden_states_masks": _padded(image.new_ones(image.shape[:2]), length),
        "img_ids": _padded(ids, length),
        "img_sizes": [(length, 1)] * batch,  # a column, so that what comes out is a list of patches in any mode
        "timesteps": time * 1000,
        "encoder_hidden_states_t5": condition["encoder_hidden_states_t5"],
        "encoder_hidden_states_llama3": condition["encoder_hidden_states_llama3"].transpose(0, 1),
        "pooled_embeds": condition["pooled_embeds"],
    }


def _padded(values: torch.Tensor, length: int) -> torch.Tensor:
    padded = values.new_zeros(values.shape[0], length, *values.shape[2:])
    padded[:, : values.shape[1]] = values
    return padded


def _output(output: Any, latents: torch.Tensor) -> torch.Tensor:
    batch, channels, height, width = latents.shape
    patches = output.reshape(batch, channels, -1, 4).transpose(1, 2)
    return -unpack(patches[:, : height * width // 4], latents)


def _condition(config: Any, tokens: int) -> dict[str, tuple[int, ...]]:
    t5, llama = config.caption_channels
    return {
        "encoder_hidden_states_t5": (tokens, t5),
        "encoder_hidden_states_llama3": (max(config.llama_layers) + 1, tokens, llama),
        "pooled_embeds": (config.text_emb_dim,),
    }


HIDREAM = Family(
    "hidream",
    "transformer",
    {"": Shape(48, 2560, 2, 8)},
    network=Network(
        model="HiDreamImageTransformer2DModel",
        blocks=(
            Blocks("double_stream_blocks", item=0, place="head"),
            Blocks("single_stream_blocks", place="head"),
        ),
        inputs=_inputs,
        condition=_condition,
        output=_output,
        channels=16,
        parameters=17_105_733_184,
        config={  # HiDream-I1-Full
            "patch_size": 2,
            "in_channels": 16,
            "caption_channels": (4096, 4096),
            "axes_dims_rope": (64, 32, 32),
            "llama_layers": (*range(32), *(31,) * 16),
        },
        tiny={
            "patch_size": 2,
            "in_channels": 4,
            "num_layers": 2,
            "num_single_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "caption_channels": (12, 10),
            "text_emb_dim": 8,
            "num_routed_experts": 2,
            "axes_dims_rope": (8, 4, 4),
            "max_resolution": (8, 8),
            "llama_layers": (0, 1, 2, 2),
        },
    ),
)
