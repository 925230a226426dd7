"""CogView4: blocks that return image and text apart, conditioned on the image's original size, target size and crop.

The model sees the padding of its text and takes no mask. Its pipeline pads a text to a multiple of 16 tokens and to the
longest text of the batch. Here a text is encoded alone, so its length does not depend on the batch. A batch is as long
as its longest text, and the embeddings behind shorter texts are those of padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from repa_lab.models.families.shared import longest_text, masked_text, padded, text_lengths
from repa_lab.models.family import Blocks, Family, Network, Pipeline, Shape, Tensor
from repa_lab.models.tiny import (
    LEFT_TOKENIZER,
    flow_scheduler,
    kl_autoencoder,
    language_model,
    tiny_pipeline,
    tiny_transformer,
)

_MOST_TOKENS = 1024


def _encode(pipeline: Any, captions: Sequence[str]) -> dict[str, Tensor]:
    import torch

    def encode_alone(text: str) -> Tensor:
        encoded: Tensor = pipeline.encode_prompt(text, do_classifier_free_guidance=False)[0][0]
        return encoded

    texts, tokenizer = [encode_alone(caption) for caption in captions], pipeline.tokenizer
    padding = encode_alone(tokenizer.pad_token * (_MOST_TOKENS - len(tokenizer("").input_ids)))
    rows = torch.stack([torch.cat([text, padding[len(text) :]]) for text in texts])
    masks = torch.cat([padded(text.new_ones(1, len(text)).long(), _MOST_TOKENS) for text in texts])
    return {"encoder_hidden_states": rows, "encoder_attention_mask": masks}


# As the conversion to diffusers sets them.
_SHIFTS = {"use_dynamic_shifting": True, "base_shift": 0.25, "max_shift": 0.75, "time_shift_type": "linear"}

COGVIEW4 = Family(
    "cogview4",
    "transformer",
    {"": Shape(28, 4096, 2, 8)},
    network=Network(
        model="CogView4Transformer2DModel",
        blocks=(Blocks("transformer_blocks", item=0),),
        inputs=lambda config, latents, time, condition: {
            "hidden_states": latents,
            "timestep": time * 1000,
            "encoder_hidden_states": longest_text(condition),
            **{name: condition[name] for name in ("original_size", "target_size", "crop_coords")},
        },
        condition=masked_text("text_embed_dim", original_size=(2,), target_size=(2,), crop_coords=(2,)),
        lengths=text_lengths,
        channels=16,
        parameters=6_369_118_272,
        config={"num_layers": 28, "num_attention_heads": 32, "attention_head_dim": 128},  # CogView4-6B
        tiny=tiny_transformer(
            sample_size=16, in_channels=4, out_channels=4, text_embed_dim=12, time_embed_dim=16, condition_dim=8
        ),
    ),
    pipeline=Pipeline(
        released="zai-org/CogView4-6B",
        classes=("CogView4Pipeline",),
        encode=_encode,
        prompt=lambda condition: {"prompt_embeds": longest_text(condition)},
        sizes=lambda config, frames: {
            "original_size": frames[:, :2],
            "crop_coords": frames[:, 2:4],
            "target_size": frames[:, 4:],
        },
        tiny=tiny_pipeline(
            kl_autoencoder(4, 1.0), flow_scheduler(**_SHIFTS), (LEFT_TOKENIZER, language_model("GlmModel", 12))
        ),
    ),
)
