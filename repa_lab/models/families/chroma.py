"""Chroma: FLUX.1 without pooled text or guidance, its padding masked."""

from __future__ import annotations

from typing import Any

from repa_lab.models.families.flux import TINY, packed_inputs
from repa_lab.models.families.shared import JOINT_ATTENTION, JOINT_BLOCKS, encode_prompt, text_shapes, unpack
from repa_lab.models.family import Blocks, Condition, Family, Network, Pipeline, Shape, Tensor
from repa_lab.models.tiny import FLUX_AUTOENCODER, flow_scheduler, t5, tiny_pipeline


def _inputs(config: Any, latents: Tensor, time: Tensor, condition: Condition) -> dict[str, Any]:
    inputs, mask = packed_inputs(latents, time, condition), condition["attention_mask"]
    batch, words = mask.shape
    # Attention adds a mask of numbers to its logits, so this one is of truth values. The image follows the text.
    whole = mask.bool().new_ones(batch, words + inputs["hidden_states"].shape[1])
    whole[:, :words] = mask
    return {**inputs, "attention_mask": whole}


def _prompt(condition: Condition) -> dict[str, Any]:
    # The pipeline itself encodes masks of numbers, which mask nothing
    # (https://github.com/huggingface/diffusers/issues/12116).
    mask = condition["attention_mask"].bool()
    return {"prompt_embeds": condition["encoder_hidden_states"], "prompt_attention_mask": mask}


CHROMA = Family(
    "chroma",
    "transformer",
    {"": Shape(57, 3072, 2, 8)},
    network=Network(
        model="ChromaTransformer2DModel",
        blocks=(JOINT_BLOCKS, Blocks("single_transformer_blocks", place="tail", depth="num_single_layers")),
        inputs=_inputs,
        # The pipeline's mask leaves the first token of the padding in.
        condition=text_shapes("joint_attention_dim", attention_mask=("tokens",)),
        output=unpack,
        channels=16,
        uncheckpointed="its single blocks are run without the text's mask",
        parameters=8_899_983_424,  # Chroma1-HD has the constructor's defaults
        tiny={**TINY, "approximator_num_channels": 16, "approximator_hidden_dim": 16, "approximator_layers": 1},
    ),
    pipeline=Pipeline(
        released="lodestones/Chroma1-HD",
        classes=("ChromaPipeline",),
        encode=encode_prompt("encoder_hidden_states", None, "attention_mask", do_classifier_free_guidance=False),
        prompt=_prompt,
        tiny=tiny_pipeline(FLUX_AUTOENCODER, flow_scheduler(shift=3.0), t5(12)),
        adapted=JOINT_ATTENTION,
    ),
)
