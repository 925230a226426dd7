"""AuraFlow: joint blocks that return text and image apart, then single blocks: eight registers, the text, the image."""

from __future__ import annotations

from repa_lab.models.families.shared import JOINT_ATTENTION, encode_prompt, map_inputs, text_shapes
from repa_lab.models.family import Blocks, Component, Family, Network, Pipeline, Shape
from repa_lab.models.tiny import flow_scheduler, kl_autoencoder, t5, tiny_pipeline

_TOKENIZER = {"pad_token": "<pad>", "padding_side": "right"}

AURAFLOW = Family(
    "auraflow",
    "transformer",
    {"": Shape(36, 3072, 2, 8)},  # 4 joint blocks
    network=Network(
        model="AuraFlowTransformer2DModel",
        blocks=(
            Blocks("joint_transformer_blocks", item=1, depth="num_mmdit_layers"),
            Blocks("single_transformer_blocks", place="tail", depth="num_single_dit_layers"),
        ),
        inputs=map_inputs(times=1),
        # There is no mask: the pipeline sets the embeddings of the padding to zero.
        condition=text_shapes("joint_attention_dim"),
        parameters=6_858_605_568,
        config={"pos_embed_max_size": 9216},  # AuraFlow-v0.3
        tiny={
            "sample_size": 16,
            "num_mmdit_layers": 2,
            "num_single_dit_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 12,
            "caption_projection_dim": 32,
            "pos_embed_max_size": 64,
        },
    ),
    pipeline=Pipeline(
        released="fal/AuraFlow-v0.3",
        classes=("AuraFlowPipeline",),
        encode=encode_prompt("encoder_hidden_states", do_classifier_free_guidance=False),
        prompt=lambda condition: {
            "prompt_embeds": condition["encoder_hidden_states"],
            "prompt_attention_mask": condition["encoder_hidden_states"][..., 0],  # required but not used
        },
        tiny=tiny_pipeline(
            kl_autoencoder(4, 0.13025),
            flow_scheduler(shift=1.73),
            t5(12, "UMT5EncoderModel", Component("transformers.LlamaTokenizer", _TOKENIZER)),
        ),
        adapted=JOINT_ATTENTION,
    ),
)
