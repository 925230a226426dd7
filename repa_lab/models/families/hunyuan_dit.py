"""Hunyuan-DiT: two texts by cross-attention, padded to lengths of its own; its later blocks take the earlier ones' outputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from repa_lab.models.facts import Family, Shape
from repa_lab.models.network import Blocks, Network

if TYPE_CHECKING:
    import torch

    from repa_lab.models.network import Condition

_BASE = 32  # tokens along a side of the 512 px image that positions are scaled to


def _rotary(config: Any, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    from diffusers.models.embeddings import get_2d_rotary_pos_embed
    from diffusers.pipelines.hunyuandit.pipeline_hunyuandit import get_resize_crop_region_for_grid

    grid = (latents.shape[2] // config.patch_size, latents.shape[3] // config.patch_size)
    region = get_resize_crop_region_for_grid(grid, _BASE)
    rotary: tuple[torch.Tensor, torch.Tensor] = get_2d_rotary_pos_embed(
        config.attention_head_dim, region, grid, device=latents.device, output_type="pt"
    )
    return rotary


def _inputs(config: Any, latents: torch.Tensor, time: torch.Tensor, condition: Condition) -> dict[str, Any]:
    sized = {"style": time.new_zeros(time.shape).long()} if config.use_style_cond_and_image_meta_size else {}
    return {
        "hidden_states": latents,
        "timestep": (time * 1000).to(latents.dtype),  # in which the model embeds it
        "image_rotary_emb": _rotary(config, latents),
        **condition,
        **sized,
    }


def _condition(config: Any, tokens: int) -> dict[str, tuple[int, ...]]:
    short, long = config.text_len, config.text_len_t5
    sizes: dict[str, tuple[int, ...]] = {"image_meta_size": (6,)} if config.use_style_cond_and_image_meta_size else {}
    return {
        "encoder_hidden_states": (short, config.cross_attention_dim),
        "text_embedding_mask": (short,),
        "encoder_hidden_states_t5": (long, config.cross_attention_dim_t5),
        "text_embedding_mask_t5": (long,),
        **sizes,
    }


HUNYUAN_DIT = Family(
    "hunyuan_dit",
    "transformer",
    {"": Shape(40, 1408, 2, 8)},
    network=Network(
        model="HunyuanDiT2DModel",
        blocks=(Blocks("blocks"),),
        inputs=_inputs,
        condition=_condition,
        parameters=1_499_952_032,
        config={  # HunyuanDiT-v1.2, which predicts the variance too
            "in_channels": 4,
            "patch_size": 2,
            "sample_size": 128,
            "hidden_size": 1408,
            "num_layers": 40,
            "mlp_ratio": 4.3637,
            "use_style_cond_and_image_meta_size": False,
        },
        tiny={
            "in_channels": 4,
            "patch_size": 2,
            "sample_size": 16,
            "hidden_size": 32,
            "num_layers": 4,  # the last takes the first one's output
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "cross_attention_dim": 12,
            "cross_attention_dim_t5": 16,
            "pooled_projection_dim": 10,
            "text_len": 7,
            "text_len_t5": 7,
        },
    ),
)
