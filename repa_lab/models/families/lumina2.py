"""Lumina-Image 2.0: one sequence in which each sample's image follows its own text, without the padding."""

from __future__ import annotations

from repa_lab.models.families.shared import MASKED_TEXT, encode_prompt, masked_text, negative_rows, text_lengths
from repa_lab.models.family import Blocks, Family, Network, Pipeline, Shape
from repa_lab.models.tiny import FLUX_AUTOENCODER, flow_scheduler, gemma, tiny_pipeline

LUMINA2 = Family(
    "lumina2",
    "transformer",
    {"": Shape(26, 2304, 2, 8)},
    network=Network(
        model="Lumina2Transformer2DModel",
        blocks=(Blocks("layers", place="after_text"),),
        inputs=lambda config, latents, time, condition: {
            "hidden_states": latents,
            "timestep": 1 - time,
            **{name: condition[name] for name in MASKED_TEXT},
        },
        condition=masked_text("cap_feat_dim"),
        output=lambda output, latents: -output,
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
        encode=encode_prompt(*MASKED_TEXT, if_empty=negative_rows, do_classifier_free_guidance=False),
        tiny=tiny_pipeline(
            FLUX_AUTOENCODER,
            flow_scheduler(shift=6.0),  # not checked against the released one
            gemma(10, num_attention_heads=2),
        ),
    ),
)
