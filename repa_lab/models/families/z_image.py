"""Z-Image: samples in lists, each one's image first, then its text, both padded to a multiple of 32 tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from repa_lab.models.facts import Family, Shape
from repa_lab.models.families.language import QWEN_TOKENIZER, language_model, padded_texts, texts_alone
from repa_lab.models.families.parts import flow_scheduler, kl_autoencoder
from repa_lab.models.families.shared import masked_text, text_lengths
from repa_lab.models.network import Blocks, Network
from repa_lab.models.pipeline import Pipeline

if TYPE_CHECKING:
    import torch

    from repa_lab.models.network import Condition

_WORDS = 512  # of a text at most


def _inputs(config: Any, latents: torch.Tensor, time: torch.Tensor, condition: Condition) -> dict[str, Any]:
    frames = list(latents.unsqueeze(2))  # (C, frames, H, W)
    return {"x": frames, "t": 1 - time, "cap_feats": texts_alone(condition)}


def _output(output: Any, latents: torch.Tensor) -> torch.Tensor:
    import torch

    return -torch.stack(output).squeeze(2)


def _encode(pipeline: Any, captions: Sequence[str]) -> dict[str, torch.Tensor]:
    texts, _ = pipeline.encode_prompt(list(captions), do_classifier_free_guidance=False)
    return padded_texts(texts, _WORDS)


def _call(condition: Condition, null: Condition, guidance: float) -> dict[str, Any]:
    texts = {"prompt_embeds": texts_alone(condition), "negative_prompt_embeds": texts_alone(null)}
    # The pipeline adds the difference to the prediction with text, not to that without.
    return {**texts, "guidance_scale": guidance - 1}


Z_IMAGE = Family(
    "z_image",
    "transformer",
    {"": Shape(30, 3840, 2, 8)},
    network=Network(
        model="ZImageTransformer2DModel",
        depths=("n_layers",),
        blocks=(Blocks("layers", place="head"),),
        inputs=_inputs,
        condition=masked_text,
        output=_output,
        lengths=text_lengths,
        channels=16,
        parameters=6_154_908_736,
        config={"axes_lens": (1536, 512, 512)},  # Z-Image-Turbo
        tiny={
            "in_channels": 4,
            "dim": 32,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "n_kv_heads": 2,
            "cap_feat_dim": 12,
            "axes_dims": (4, 6, 6),
            "axes_lens": (640, 16, 16),
        },
    ),
    pipeline=Pipeline(
        released="Tongyi-MAI/Z-Image-Turbo",
        classes=("ZImagePipeline",),
        encode=_encode,
        call=_call,
        tiny={
            "vae": kl_autoencoder(4, 0.3611, 0.1159),
            "tokenizer": QWEN_TOKENIZER,
            "text_encoder": language_model("Qwen3Model", 12),
            "scheduler": flow_scheduler(shift=3.0),  # of Z-Image-Turbo, as recalled
        },
    ),
)
