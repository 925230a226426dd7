"""Z-Image: samples in lists, each one's image first, then its text, both padded to a multiple of 32 tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from repa_lab.models.facts import Family, Shape
from repa_lab.models.families.shared import masked_text, text_lengths
from repa_lab.models.network import Blocks, Network

if TYPE_CHECKING:
    import torch

    from repa_lab.models.network import Condition


def _inputs(config: Any, latents: torch.Tensor, time: torch.Tensor, condition: Condition) -> dict[str, Any]:
    lengths = text_lengths(condition).tolist()
    texts = zip(condition["encoder_hidden_states"], lengths, strict=True)
    return {
        "x": list(latents.unsqueeze(2)),  # (C, frames, H, W)
        "t": 1 - time,
        "cap_feats": [text[:length] for text, length in texts],
    }


def _output(output: Any, latents: torch.Tensor) -> torch.Tensor:
    import torch

    return -torch.stack(output).squeeze(2)


Z_IMAGE = Family(
    "z_image",
    "transformer",
    {"": Shape(30, 3840, 2, 8)},
    network=Network(
        model="ZImageTransformer2DModel",
        blocks=(Blocks("layers", place="head"),),
        inputs=_inputs,
        condition=masked_text,
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
            "axes_lens": (128, 16, 16),
        },
    ),
)
