"""OmniGen: a language model over words, the time and the image, in that order; it takes the words' numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from repa_lab.models.facts import Family, Shape
from repa_lab.models.network import Blocks, Network

if TYPE_CHECKING:
    import torch

    from repa_lab.models.network import Condition


def _inputs(config: Any, latents: torch.Tensor, time: torch.Tensor, condition: Condition) -> dict[str, Any]:
    height, width = latents.shape[-2:]
    seen = _seen(condition["attention_mask"], height * width // config.patch_size**2)
    return {
        "hidden_states": latents,
        "timestep": 1 - time,
        "input_ids": condition["text_token_ids"],
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": _causal(seen, condition["attention_mask"].shape[1]),
        # diffusers places every sample as it places the first
        "position_ids": (seen.cumsum(1) - 1).clamp(min=0),
    }


def _seen(mask: torch.Tensor, cells: int) -> torch.Tensor:
    """Which tokens of the sequence are no padding."""
    seen = mask.new_ones(mask.shape[0], mask.shape[1] + 1 + cells)
    seen[:, : mask.shape[1]] = mask
    return seen


def _causal(seen: torch.Tensor, words: int) -> torch.Tensor:
    """Words and time see what is before them, the image all."""
    sees = seen.new_ones(seen.shape[1], seen.shape[1]).tril()
    sees[words + 1 :] = 1
    return sees * seen.unsqueeze(1)


def _output(output: Any, latents: torch.Tensor) -> torch.Tensor:
    velocity: torch.Tensor = -output
    return velocity


def _condition(config: Any, tokens: int) -> dict[str, tuple[int, ...]]:
    return {"text_token_ids": (tokens,), "attention_mask": (tokens,)}


def _factors(count: int) -> dict[str, list[float]]:
    """Of the positions; those of the released model are others, which change no shape."""
    return {"short_factor": [1.0] * count, "long_factor": [1.0] * count}


OMNIGEN = Family(
    "omnigen",
    "transformer",
    {"": Shape(32, 3072, 2, 8)},
    network=Network(
        model="OmniGenTransformer2DModel",
        blocks=(Blocks("layers", place="tail"),),
        inputs=_inputs,
        condition=_condition,
        output=_output,
        parameters=3_762_072_592,
        config={"rope_scaling": _factors(48)},  # OmniGen-v1 is the constructor's defaults beside them
        tiny={
            "in_channels": 4,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "intermediate_size": 48,
            "num_layers": 3,
            "pad_token_id": 0,
            "vocab_size": 16,
            "pos_embed_max_size": 16,
            "time_step_dim": 16,
            "rope_scaling": _factors(8),
        },
    ),
)
