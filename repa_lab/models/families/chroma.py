"""Chroma: FLUX.1 without pooled text or guidance, its padding masked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from repa_lab.models.facts import Family, Shape
from repa_lab.models.layout import pack, positions, unpack
from repa_lab.models.network import Blocks, Network

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


CHROMA = Family(
    "chroma",
    "transformer",
    {"": Shape(57, 3072, 2, 8)},
    network=Network(
        model="ChromaTransformer2DModel",
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
)
