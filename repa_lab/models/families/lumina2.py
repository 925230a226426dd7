"""Lumina-Image 2.0: one sequence in which each sample's image follows its own text, without the padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from repa_lab.models.facts import Family, Shape
from repa_lab.models.families.language import GEMMA_TOKENIZER, language_model, negative_where_empty
from repa_lab.models.families.parts import flow_scheduler, kl_autoencoder
from repa_lab.models.families.shared import masked_call, masked_text, text_lengths
from repa_lab.models.network import Blocks, Network
from repa_lab.models.pipeline import Pipeline

if TYPE_CHECKING:
    import torch

    from repa_lab.models.network import Condition


def _inputs(config: Any, latents: torch.Tensor, time: torch.Tensor, condition: Condition) -> dict[str, Any]:
    return {"hidden_states": latents, "timestep": 1 - time, **condition}


def _output(output: Any, latents: torch.Tensor) -> torch.Tensor:
    velocity: torch.Tensor = -output
    return velocity


def _encode(pipeline: Any, captions: Sequence[str]) -> dict[str, torch.Tensor]:
    text, mask, _, _ = pipeline.encode_prompt(list(captions), do_classifier_free_guidance=False)
    return negative_where_empty(pipeline, captions, text, mask)


LUMINA2 = Family(
    "lumina2",
    "transformer",
    {"": Shape(26, 2304, 2, 8)},
    network=Network(
        model="Lumina2Transformer2DModel",
        blocks=(Blocks("layers", place="after_text"),),
        inputs=_inputs,
        condition=masked_text,
        output=_output,
        lengths=text_lengths,
        channels=16,
        parameters=2_609_769_152,
        config={"cap_feat_dim": 2304},  # Lumina-Image-2.0
        tiny={
            "sample_size": 16,
            "in_channels": 4,
            "hidden_size": 36,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "num_attention_heads": 3,
            "num_kv_heads": 1,
            "multiple_of": 8,
            "axes_dim_rope": (4, 4, 4),
            "axes_lens": (300, 16, 16),
            "cap_feat_dim": 10,
        },
    ),
    pipeline=Pipeline(
        released="Alpha-VLLM/Lumina-Image-2.0",
        classes=("Lumina2Pipeline",),
        encode=_encode,
        call=masked_call,
        tiny={
            "vae": kl_autoencoder(4, 0.3611, 0.1159),
            "tokenizer": GEMMA_TOKENIZER,
            "text_encoder": language_model("Gemma2Model", 10, num_attention_heads=2),
            "scheduler": flow_scheduler(shift=6.0),  # as recalled
        },
    ),
)
