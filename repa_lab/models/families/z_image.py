"""Z-Image: samples in lists, the image first, then its text, both padded to a multiple of 32 tokens."""

from __future__ import annotations

from typing import Any

from repa_lab.models.families.shared import masked_text, padded_texts, text_lengths, texts_alone
from repa_lab.models.family import Blocks, Family, Network, Pipeline, Shape, Tensor
from repa_lab.models.tiny import FLUX_AUTOENCODER, QWEN_TOKENIZER, flow_scheduler, language_model, tiny_pipeline


def _output(output: Any, latents: Tensor) -> Tensor:
    import torch

    return -torch.stack(output).squeeze(2)


Z_IMAGE = Family(
    "z_image",
    "transformer",
    {"": Shape(30, 3840, 2, 8)},
    network=Network(
        model="ZImageTransformer2DModel",
        blocks=(Blocks("layers", place="head", depth="n_layers"),),
        inputs=lambda config, latents, time, condition: {
            "x": list(latents.unsqueeze(2)),  # videos of one frame, (C, 1, H, W)
            "t": 1 - time,
            "cap_feats": texts_alone(condition)["prompt_embeds"],
        },
        condition=masked_text("cap_feat_dim"),
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
        encode=lambda pipeline, captions: padded_texts(
            pipeline.encode_prompt(list(captions), do_classifier_free_guidance=False)[0], length=512
        ),
        prompt=texts_alone,
        unguided=0,
        tiny=tiny_pipeline(
            FLUX_AUTOENCODER,
            flow_scheduler(shift=3.0),  # of Z-Image-Turbo; not checked against the released one
            (QWEN_TOKENIZER, language_model("Qwen3Model", 12)),
        ),
    ),
)
