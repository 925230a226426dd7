"""PixArt, Alpha and Sigma: text by cross-attention; Alpha at 1024 px is told the image's size and aspect ratio too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from repa_lab.models.facts import Family, Shape
from repa_lab.models.families.parts import T5_TOKENIZER, kl_autoencoder, t5_text
from repa_lab.models.families.shared import masked_call
from repa_lab.models.network import Blocks, Network
from repa_lab.models.pipeline import Part, Pipeline

if TYPE_CHECKING:
    import torch

    from repa_lab.models.network import Condition

_ALPHA_1024 = 128  # sample_size of the one checkpoint that, where its config is silent, is told the size


def _is_told_the_size(config: Any) -> bool:
    told = config.use_additional_conditions
    return bool(config.sample_size == _ALPHA_1024 if told is None else told)


def _inputs(config: Any, latents: torch.Tensor, time: torch.Tensor, condition: Condition) -> dict[str, Any]:
    return {
        "hidden_states": latents,
        "timestep": time * 1000,
        "encoder_hidden_states": condition["encoder_hidden_states"],
        "encoder_attention_mask": condition["encoder_attention_mask"],
        "added_cond_kwargs": {name: condition.get(name) for name in ("resolution", "aspect_ratio")},
    }


def _condition(config: Any, tokens: int) -> dict[str, tuple[int, ...]]:
    text = {"encoder_hidden_states": (tokens, config.caption_channels), "encoder_attention_mask": (tokens,)}
    size: dict[str, tuple[int, ...]] = {"resolution": (2,), "aspect_ratio": (1,)}
    return {**text, **(size if _is_told_the_size(config) else {})}


def _encode(pipeline: Any, captions: Sequence[str]) -> dict[str, torch.Tensor]:
    text, mask, _, _ = pipeline.encode_prompt(list(captions), do_classifier_free_guidance=False)
    return {"encoder_hidden_states": text, "encoder_attention_mask": mask}


def _sizes(config: Any, frames: torch.Tensor) -> dict[str, torch.Tensor]:
    if not _is_told_the_size(config):
        return {}
    return {"resolution": frames[:, :2], "aspect_ratio": frames[:, 4:5] / frames[:, 5:6]}


def _call(condition: Condition, null: Condition, guidance: float) -> dict[str, Any]:
    # Its empty caption is one that it would encode itself; and the size that is asked for is the one that is sampled.
    return {**masked_call(condition, null, guidance), "negative_prompt": None, "use_resolution_binning": False}


PIXART = Family(
    "pixart",
    "transformer",
    {"": Shape(28, 1152, 2, 10)},
    network=Network(
        model="PixArtTransformer2DModel",
        blocks=(Blocks("transformer_blocks"),),
        inputs=_inputs,
        condition=_condition,
        parameters=610_856_096,
        config={  # PixArt-Sigma-XL-2-1024-MS
            "caption_channels": 4096,
            "interpolation_scale": 2,
            "use_additional_conditions": False,
        },
        tiny={
            "sample_size": _ALPHA_1024,
            "num_layers": 3,
            "attention_head_dim": 16,
            "num_attention_heads": 3,
            "cross_attention_dim": 48,
            "caption_channels": 12,
        },
    ),
    pipeline=Pipeline(
        released="PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
        classes=("PixArtAlphaPipeline", "PixArtSigmaPipeline"),
        encode=_encode,
        call=_call,
        sizes=_sizes,
        tiny={
            "vae": kl_autoencoder(4, 0.18215),
            "tokenizer": T5_TOKENIZER,
            "text_encoder": t5_text(12),
            "scheduler": Part("diffusers.DPMSolverMultistepScheduler", {"beta_schedule": "linear"}),
        },
    ),
)
