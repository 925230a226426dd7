"""LTX-Video: blocks over the tokens of all frames of a clip; text by cross-attention. A token is a latent cell."""

from __future__ import annotations

from repa_lab.models.families.shared import encode_prompt, flatten, masked_text, unflatten
from repa_lab.models.family import Blocks, Component, Family, Network, Pipeline, Shape
from repa_lab.models.tiny import flow_scheduler, t5, tiny_pipeline, tiny_transformer

_FRAME_STRIDE, _LATENT_STRIDE = 8, 32
_FRAMES_PER_SECOND = 25  # of clips, as the pipeline takes them if it is told nothing

_VAE = {
    "latent_channels": 8,
    "block_out_channels": (8,) * 4,
    "decoder_block_out_channels": (8,) * 4,
    "layers_per_block": (1,) * 5,
    "decoder_layers_per_block": (1,) * 5,
}
_SHIFTS = {"base_image_seq_len": 1024, "max_image_seq_len": 4096, "base_shift": 0.95, "max_shift": 2.05}

LTXVIDEO = Family(
    "ltxvideo",
    "transformer",
    {"": Shape(28, 2048, 1, 8)},
    latent_stride=_LATENT_STRIDE,
    frame_stride=_FRAME_STRIDE,
    network=Network(
        model="LTXVideoTransformer3DModel",
        blocks=(Blocks("transformer_blocks"),),
        inputs=lambda config, latents, time, condition: {
            "hidden_states": flatten(latents),
            "timestep": time * 1000,
            "num_frames": latents.shape[2],
            "height": latents.shape[3],
            "width": latents.shape[4],
            "rope_interpolation_scale": (_FRAME_STRIDE / _FRAMES_PER_SECOND, _LATENT_STRIDE, _LATENT_STRIDE),
            **condition,
        },
        condition=masked_text("caption_channels"),
        output=unflatten,
        channels=128,
        native=512,
        parameters=1_923_385_472,  # LTX-Video 0.9 has the constructor's defaults
        tiny=tiny_transformer(in_channels=8, out_channels=8, cross_attention_dim=32, caption_channels=12),
    ),
    pipeline=Pipeline(
        released="Lightricks/LTX-Video",
        classes=("LTXPipeline",),
        encode=encode_prompt("encoder_hidden_states", "encoder_attention_mask", do_classifier_free_guidance=False),
        tiny=tiny_pipeline(
            Component("diffusers.AutoencoderKLLTXVideo", _VAE),
            flow_scheduler(use_dynamic_shifting=True, shift_terminal=0.1, **_SHIFTS),
            t5(12),
        ),
    ),
)
