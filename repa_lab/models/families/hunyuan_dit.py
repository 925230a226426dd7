"""Hunyuan-DiT: two texts by cross-attention, each padded to its own length; late blocks take outputs of early ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from repa_lab.models.families.shared import rename
from repa_lab.models.family import Blocks, Component, Condition, Family, Network, Pipeline, Shape, Tensor
from repa_lab.models.tiny import LATENT_BETAS, VOCABULARY, kl_autoencoder, t5, tiny_pipeline, tiny_transformer

_BASE = 32  # tokens along a side of the 512 px image to which positions are scaled


def _inputs(config: Any, latents: Tensor, time: Tensor, condition: Condition) -> dict[str, Any]:
    from diffusers.models.embeddings import get_2d_rotary_pos_embed
    from diffusers.pipelines.hunyuandit.pipeline_hunyuandit import get_resize_crop_region_for_grid

    grid = (latents.shape[2] // config.patch_size, latents.shape[3] // config.patch_size)
    region = get_resize_crop_region_for_grid(grid, _BASE)
    rotary = get_2d_rotary_pos_embed(config.attention_head_dim, region, grid, device=latents.device, output_type="pt")
    style = {"style": time.new_zeros(time.shape).long()} if config.use_style_cond_and_image_meta_size else {}
    times = (time * 1000).to(latents.dtype)  # the model embeds them in this dtype
    return {"hidden_states": latents, "timestep": times, "image_rotary_emb": rotary, **condition, **style}


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


def _encode(pipeline: Any, captions: Sequence[str]) -> dict[str, Tensor]:
    encoded: dict[str, Tensor] = {}
    for index, suffix in enumerate(("", "_t5")):
        text, _, mask, _ = pipeline.encode_prompt(
            list(captions), do_classifier_free_guidance=False, text_encoder_index=index
        )
        encoded |= {f"encoder_hidden_states{suffix}": text, f"text_embedding_mask{suffix}": mask}
    return encoded


def _sizes(config: Any, frames: Tensor) -> dict[str, Tensor]:
    # The pipeline's order: height and width of the original and of the target, then top and left of the crop.
    return {"image_meta_size": frames[:, [0, 1, 4, 5, 2, 3]]} if config.use_style_cond_and_image_meta_size else {}


_SCHEDULER = {
    **LATENT_BETAS,
    "beta_end": 0.018,  # 0.03 before v1.2
    "prediction_type": "v_prediction",
    "clip_sample": False,
    "timestep_spacing": "leading",
}
_BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 12,
    "intermediate_size": 12,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
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
        tiny=tiny_transformer(
            in_channels=4,
            patch_size=2,
            sample_size=16,
            hidden_size=32,
            num_layers=4,  # the last takes the first one's output
            cross_attention_dim=12,
            cross_attention_dim_t5=16,
            pooled_projection_dim=10,
        ),
    ),
    pipeline=Pipeline(
        released="Tencent-Hunyuan/HunyuanDiT-v1.2-Diffusers",
        classes=("HunyuanDiTPipeline",),
        encode=_encode,
        prompt=rename(
            prompt_embeds="encoder_hidden_states",
            prompt_attention_mask="text_embedding_mask",
            prompt_embeds_2="encoder_hidden_states_t5",
            prompt_attention_mask_2="text_embedding_mask_t5",
        ),
        options={"use_resolution_binning": False},
        sizes=_sizes,
        tiny=tiny_pipeline(
            kl_autoencoder(4, 0.13025),
            Component("diffusers.DDPMScheduler", _SCHEDULER),
            (
                Component("transformers.BertTokenizer", {"model_max_length": 77}),
                Component("transformers.BertModel", _BERT),
            ),
            t5(16),
        ),
    ),
)
