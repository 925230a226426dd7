"""FIBO 2: a text is squeezed into gists, of which a longer text has more; the image follows them.

Where the texts of a batch have different numbers of gists, diffusers puts the image first instead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from repa_lab.models.facts import Family, Shape
from repa_lab.models.network import Blocks, Network

if TYPE_CHECKING:
    import torch

    from repa_lab.models.network import Condition

# How many gists a text of so many words has, as released.
_GISTS = {
    "min_num_gist_tokens": 256,
    "max_num_gist_tokens": 512,
    "gist_step": 64,
    "gist_min_text_len": 256,
    "gist_max_text_len": 2048,
}


def _inputs(config: Any, latents: torch.Tensor, time: torch.Tensor, condition: Condition) -> dict[str, Any]:
    if any(config[name] != value for name, value in _GISTS.items()):
        raise ValueError(f"bria_fibo2: the image cannot be found in a model whose gists are others than {_GISTS}")
    mask = condition["encoder_attention_mask"].bool()
    text = condition["encoder_hidden_states"]
    return {"hidden_states": latents, "timestep": time, "encoder_hidden_states": text, "encoder_attention_mask": mask}


def _before_the_image(condition: Condition) -> torch.Tensor:
    from diffusers.models.transformers.transformer_bria_fibo2 import compute_gist_count

    words = condition["encoder_attention_mask"].sum(dim=1)
    gists = compute_gist_count(words.tolist(), *_GISTS.values())
    return words.new_tensor(gists if min(gists) == max(gists) else [0] * len(gists))


def _condition(config: Any, tokens: int) -> dict[str, tuple[int, ...]]:
    text = (1 + len(config.injection_layer_ids), tokens, config.cap_feat_dim)
    return {"encoder_hidden_states": text, "encoder_attention_mask": (tokens,)}


BRIA_FIBO2 = Family(
    "bria_fibo2",
    "transformer",
    {"": Shape(44, 3584, 2, 8)},
    network=Network(
        model="BriaFibo2Transformer2DModel",
        blocks=(Blocks("layers", place="after_text"),),
        inputs=_inputs,
        condition=_condition,
        lengths=_before_the_image,
        channels=32,
        parameters=8_127_342_213,  # FIBO 2 is taken to be the constructor's defaults
        tiny={
            "in_channels": 4,
            "dim": 32,
            "n_layers": 3,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "cap_feat_dim": 12,
            "injection_layer_ids": (1,),
            "perceiver_num_layers": 1,
            "axes_dims": (4, 6, 6),
            "axes_lens": (1024, 16, 16),
        },
    ),
)
