"""DiT of diffusers: conditioned on a class, over square latents."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from repa_lab.models.facts import Family, Shape
from repa_lab.models.families.parts import kl_autoencoder
from repa_lab.models.families.shared import map_inputs
from repa_lab.models.network import Blocks, Network
from repa_lab.models.pipeline import Part, Pipeline

if TYPE_CHECKING:
    from repa_lab.models.network import Condition


def _condition(config: Any, tokens: int) -> dict[str, tuple[int, ...]]:
    return {"class_labels": ()}


def _num_classes(config: Any) -> int:
    return int(config.num_embeds_ada_norm)


def _call(condition: Condition, null: Condition, guidance: float) -> dict[str, Any]:
    # Its pipeline knows of itself which class is none.
    return {"class_labels": condition["class_labels"].tolist(), "guidance_scale": guidance}


DIT = Family(
    "dit",
    "transformer",
    {"": Shape(28, 1152, 2, 8)},
    network=Network(
        model="DiTTransformer2DModel",
        blocks=(Blocks("transformer_blocks"),),
        inputs=map_inputs,
        condition=_condition,
        square=True,
        native=256,
        parameters=749_826_464,
        config={"out_channels": 8},  # DiT-XL-2-256, which predicts the variance too
        tiny={
            "sample_size": 16,
            "out_channels": 8,
            "num_layers": 3,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "num_embeds_ada_norm": 1000,  # of which its pipeline takes the next to be no class
        },
    ),
    pipeline=Pipeline(
        released="facebook/DiT-XL-2-256",
        classes=("DiTPipeline",),
        encode=None,
        num_classes=_num_classes,
        call=_call,
        tiny={
            "vae": kl_autoencoder(4, 0.18215),
            "scheduler": Part("diffusers.DDIMScheduler", {"beta_schedule": "linear", "clip_sample": False}),
        },
    ),
)
