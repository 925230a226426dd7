"""Wan 2.1: blocks over the tokens of all frames of a clip; text by cross-attention. A token is 2x2 latent cells."""

from __future__ import annotations

from repa_lab.models.families.shared import encode_prompt, map_inputs, text_shapes
from repa_lab.models.family import Blocks, Component, Family, Network, Pipeline, Shape
from repa_lab.models.tiny import FLOW_SIGMAS, WAN_AUTOENCODER, t5, tiny_pipeline, tiny_transformer

WAN = Family(
    "wan",
    "transformer",
    {"": Shape(30, 1536, 2, 8)},
    frame_stride=4,
    network=Network(
        model="WanTransformer3DModel",
        blocks=(Blocks("blocks"),),
        inputs=map_inputs(),
        # There is no mask: the embeddings of the padding are zero.
        condition=text_shapes("text_dim"),
        channels=16,
        native=480,
        parameters=1_418_996_800,
        config={"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},  # Wan2.1-T2V-1.3B
        tiny=tiny_transformer(in_channels=4, out_channels=4, text_dim=12, freq_dim=32, ffn_dim=32, rope_max_seq_len=64),
    ),
    pipeline=Pipeline(
        released="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        classes=("WanPipeline",),
        encode=encode_prompt("encoder_hidden_states", do_classifier_free_guidance=False, max_sequence_length=512),
        tiny=tiny_pipeline(
            WAN_AUTOENCODER, Component("diffusers.UniPCMultistepScheduler", FLOW_SIGMAS), t5(12, "UMT5EncoderModel")
        ),
    ),
)
