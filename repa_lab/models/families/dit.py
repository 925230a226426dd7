"""DiT of diffusers: conditioned on a class, over square latents."""

from __future__ import annotations

from repa_lab.models.families.shared import map_inputs, shapes
from repa_lab.models.family import Blocks, Component, Family, Network, Pipeline, Shape
from repa_lab.models.tiny import kl_autoencoder, tiny_pipeline, tiny_transformer

DIT = Family(
    "dit",
    "transformer",
    {"": Shape(28, 1152, 2, 8)},
    network=Network(
        model="DiTTransformer2DModel",
        blocks=(Blocks("transformer_blocks"),),
        inputs=map_inputs(),
        condition=shapes(class_labels=()),
        square=True,
        native=256,
        parameters=749_826_464,
        config={"out_channels": 8},  # DiT-XL-2-256, which predicts the variance too
        # The pipeline takes the number of classes, 1000, for the null label.
        tiny=tiny_transformer(sample_size=16, out_channels=8, num_embeds_ada_norm=1000),
    ),
    pipeline=Pipeline(
        released="facebook/DiT-XL-2-256",
        classes=("DiTPipeline",),
        encode=None,
        num_classes=lambda config: int(config.num_embeds_ada_norm),
        prompt=lambda condition: {"class_labels": condition["class_labels"].tolist()},
        negative=False,
        tiny=tiny_pipeline(
            kl_autoencoder(4, 0.18215),
            Component("diffusers.DDIMScheduler", {"beta_schedule": "linear", "clip_sample": False}),
        ),
    ),
)
