"""PixArt Alpha and Sigma: text by cross-attention; Alpha at 1024 px also takes the image's size and aspect ratio."""

from __future__ import annotations

from typing import Any

from repa_lab.models.families.shared import MASKED_TEXT, encode_prompt, masked_text
from repa_lab.models.family import Blocks, Component, Family, Network, Pipeline, Shape, Tensor
from repa_lab.models.tiny import kl_autoencoder, t5, tiny_pipeline, tiny_transformer

_ALPHA_1024 = 128  # sample_size of the only checkpoint that takes sizes although its config does not say so


def _takes_sizes(config: Any) -> bool:
    stated = config.use_additional_conditions
    return bool(config.sample_size == _ALPHA_1024 if stated is None else stated)


def _condition(config: Any, tokens: int) -> dict[str, tuple[int, ...]]:
    text, size = masked_text("caption_channels")(config, tokens), {"resolution": (2,), "aspect_ratio": (1,)}
    return {**text, **size} if _takes_sizes(config) else text


def _sizes(config: Any, frames: Tensor) -> dict[str, Tensor]:
    if not _takes_sizes(config):
        return {}
    return {"resolution": frames[:, :2], "aspect_ratio": frames[:, 4:5] / frames[:, 5:6]}


PIXART = Family(
    "pixart",
    "transformer",
    {"": Shape(28, 1152, 2, 10)},
    network=Network(
        model="PixArtTransformer2DModel",
        blocks=(Blocks("transformer_blocks"),),
        inputs=lambda config, latents, time, condition: {
            "hidden_states": latents,
            "timestep": time * 1000,
            **{name: condition[name] for name in MASKED_TEXT},
            "added_cond_kwargs": {name: condition.get(name) for name in ("resolution", "aspect_ratio")},
        },
        condition=_condition,
        parameters=610_856_096,
        config={  # PixArt-Sigma-XL-2-1024-MS
            "caption_channels": 4096,
            "interpolation_scale": 2,
            "use_additional_conditions": False,
        },
        tiny=tiny_transformer(
            sample_size=_ALPHA_1024, num_attention_heads=3, cross_attention_dim=48, caption_channels=12
        ),
    ),
    pipeline=Pipeline(
        released="PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
        classes=("PixArtAlphaPipeline", "PixArtSigmaPipeline"),
        encode=encode_prompt(*MASKED_TEXT, do_classifier_free_guidance=False),
        # Without this the pipeline encodes a negative prompt itself and samples at the nearest size of its own list.
        options={"negative_prompt": None, "use_resolution_binning": False},
        sizes=_sizes,
        tiny=tiny_pipeline(
            kl_autoencoder(4, 0.18215),
            Component("diffusers.DPMSolverMultistepScheduler", {"beta_schedule": "linear"}),
            t5(12),
        ),
    ),
)
