"""ERNIE-Image: one sequence, the image first, the batch as the second dimension; its latents are those of FLUX.2."""

from __future__ import annotations

from repa_lab.models.families.shared import masked_text, padded_texts, text_lengths, texts_alone
from repa_lab.models.family import Blocks, Family, Network, Pipeline, Shape
from repa_lab.models.tiny import FLUX2_AUTOENCODER, LLAMA_TOKENIZER, flow_scheduler, mistral_vl, tiny_pipeline

ERNIE_IMAGE = Family(
    "ernie_image",
    "transformer",
    {"": Shape(36, 4096, 1, 8)},
    latent_stride=16,
    network=Network(
        model="ErnieImageTransformer2DModel",
        blocks=(Blocks("layers", place="head", samples=1),),
        inputs=lambda config, latents, time, condition: {
            "hidden_states": latents,
            "timestep": time * 1000,
            "text_bth": condition["encoder_hidden_states"],
            "text_lens": text_lengths(condition),
        },
        condition=masked_text("text_in_dim"),
        channels=128,
        parameters=8_033_490_048,
        config={  # ERNIE-Image, from a copy of its configuration
            "hidden_size": 4096,
            "num_attention_heads": 32,
            "num_layers": 36,
            "ffn_hidden_size": 12288,
            "text_in_dim": 3072,
        },
        tiny={
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_layers": 3,
            "ffn_hidden_size": 48,
            "in_channels": 8,
            "out_channels": 8,
            "text_in_dim": 12,
            "rope_axes_dim": (4, 6, 6),
        },
    ),
    pipeline=Pipeline(
        released="baidu/ERNIE-Image",
        classes=("ErnieImagePipeline",),
        encode=lambda pipeline, captions: padded_texts(
            pipeline.encode_prompt(list(captions), pipeline.text_encoder.device),
            length=512,  # the pipeline itself has no limit
        ),
        prompt=texts_alone,
        options={"use_pe": False},  # no prompt enhancer
        tiny=tiny_pipeline(
            # The pipeline decodes with an epsilon of 1e-5, whatever the config says, which changes nothing visible.
            FLUX2_AUTOENCODER,
            flow_scheduler(shift=3.0),  # not checked against the released one
            (LLAMA_TOKENIZER, mistral_vl("Mistral3Model", 12)),
        ),
    ),
)
