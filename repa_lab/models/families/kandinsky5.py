"""Kandinsky 5 for images: videos of one frame, channels last; text by cross-attention, after blocks of its own.

The model sees the padding of a text that is shorter than the longest one of its batch: it takes no mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from repa_lab.models.families.shared import longest_text, masked_text, text_lengths
from repa_lab.models.family import Blocks, Condition, Family, Network, Pipeline, Shape, Tensor
from repa_lab.models.tiny import FLUX_AUTOENCODER, QWEN_PROCESSOR, clip, flow_scheduler, qwen_vl, tiny_pipeline


def _inputs(config: Any, latents: Tensor, time: Tensor, condition: Condition) -> dict[str, Any]:
    import torch

    _, rows, columns = config.patch_size
    video = (1, latents.shape[2] // rows, latents.shape[3] // columns)
    text = longest_text(condition)
    return {
        "hidden_states": latents.permute(0, 2, 3, 1).unsqueeze(1),
        "timestep": time * 1000,
        "visual_rope_pos": [torch.arange(count, device=latents.device) for count in video],
        "text_rope_pos": torch.arange(text.shape[1], device=latents.device),
        "encoder_hidden_states": text,
        "pooled_projections": condition["pooled_projections"],
    }


def _encode(pipeline: Any, captions: Sequence[str]) -> dict[str, Tensor]:
    # As `encode_prompt`, which however pads to the longest text of a batch and cuts short texts if one is too long.
    from diffusers.pipelines.kandinsky5.pipeline_kandinsky_t2i import prompt_clean

    cleaned, start = [prompt_clean(caption) for caption in captions], pipeline.prompt_template_encode_start_idx
    texts = [pipeline.prompt_template.format(caption) for caption in cleaned]
    length = {"max_length": start + 512, "truncation": True, "padding": "max_length", "return_tensors": "pt"}
    tokens = pipeline.tokenizer(text=texts, images=None, videos=None, **length).to(pipeline.text_encoder.device)
    states = pipeline.text_encoder(input_ids=tokens["input_ids"], output_hidden_states=True).hidden_states[-1]
    text = {"encoder_hidden_states": states[:, start:], "encoder_attention_mask": tokens["attention_mask"][:, start:]}
    return {**text, "pooled_projections": pipeline._encode_prompt_clip(cleaned)}


def _prompt(condition: Condition) -> dict[str, Any]:
    from torch.nn.functional import pad

    return {
        "prompt_embeds_qwen": longest_text(condition),
        "prompt_embeds_clip": condition["pooled_projections"],
        "prompt_cu_seqlens": pad(text_lengths(condition).cumsum(0), (1, 0)).int(),
    }


def _allow(pipeline: Any, height: int, width: int) -> None:
    pipeline.resolutions = [(width, height)]  # the pipeline draws no others


KANDINSKY5 = Family(
    "kandinsky5",
    "transformer",
    {"": Shape(50, 2560, 2, 8)},
    network=Network(
        model="Kandinsky5Transformer3DModel",
        blocks=(Blocks("visual_transformer_blocks", depth="num_visual_blocks"),),
        inputs=_inputs,
        condition=masked_text("in_text_dim", pooled_projections=("in_text_dim2",)),
        output=lambda output, latents: output.squeeze(1).permute(0, 3, 1, 2),
        lengths=text_lengths,
        channels=16,
        parameters=6_022_080_576,
        config={  # Kandinsky-5.0-T2I-Lite
            "in_visual_dim": 16,
            "out_visual_dim": 16,
            "model_dim": 2560,
            "ff_dim": 10240,
            "num_visual_blocks": 50,
            "axes_dims": (32, 48, 48),
        },
        tiny={
            "in_visual_dim": 4,
            "out_visual_dim": 4,
            "in_text_dim": 12,
            "in_text_dim2": 10,
            "time_dim": 16,
            "model_dim": 32,
            "ff_dim": 48,
            "num_text_blocks": 2,
            "num_visual_blocks": 3,
            "axes_dims": (4, 6, 6),
        },
    ),
    pipeline=Pipeline(
        released="kandinskylab/Kandinsky-5.0-T2I-Lite-sft-Diffusers",
        classes=("Kandinsky5T2IPipeline",),
        allow=_allow,
        shifted=False,
        encode=_encode,
        prompt=_prompt,
        tiny=tiny_pipeline(
            FLUX_AUTOENCODER,
            flow_scheduler(shift=3.0),  # not checked against the released one
            (QWEN_PROCESSOR, qwen_vl(12)),
            clip(10),
        ),
        adapted=("to_query", "to_key", "to_value", "self_attention.out_layer", "cross_attention.out_layer"),
    ),
)
