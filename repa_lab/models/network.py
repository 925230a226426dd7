"""How a family says what its diffusers model takes and where the image's tokens stand in it: data, and no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

    Condition = Mapping[str, torch.Tensor]
    Inputs = Callable[[Any, torch.Tensor, torch.Tensor, Condition], dict[str, Any]]
    Output = Callable[[Any, torch.Tensor], torch.Tensor]
    Lengths = Callable[[Condition], torch.Tensor]

# Where a sequence holds the image's tokens: alone, before or after the text's, or after as many of them as a sample
# has.
Place = Literal["all", "head", "tail", "after_text", "map"]


@dataclass(frozen=True)
class Blocks:
    """A list of blocks through which ``block_index`` counts, and what one of them returns.

    Attributes:
        path: of the list in the model; of the block itself for a UNet's mid block.
        item: which of the tensors that it returns has the image's tokens; None if it returns one.
        place: where they stand in it; ``map`` is a map ``(B, C, h, w)``.
        samples: along which of its dimensions the samples are counted; 1 where sequences come first.
    """

    path: str
    item: int | None = None
    place: Place = "all"
    samples: Literal[0, 1] = 0


def as_it_comes(output: Any, latents: torch.Tensor) -> torch.Tensor:
    """A prediction of the latents' own shape; where the variance is predicted too, its channels come last and are left out."""
    prediction: torch.Tensor = output[:, : latents.shape[1]]
    return prediction


@dataclass(frozen=True)
class Network:
    """A model of diffusers as a denoiser.

    Attributes:
        model: its class in diffusers.
        blocks: what can be tapped, in the order of the running ``block_index``.
        inputs: the arguments of its ``forward`` from its config, noisy latents ``(B, C, H, W)``, times ``(B,)`` in [0,
            1] (1 is noise) and conditioning.
        condition: the conditioning by name: each one's shape without the batch, from the config and a number of text
            tokens. What is called a mask or labels holds integers.
        output: the prediction ``(B, C, H, W)`` from what ``forward`` returns and the latents.
        lengths: tokens before the image of each sample ``(B,)`` from the conditioning, for ``after_text``.
        config: arguments of the released model that differ from the constructor's defaults.
        tiny: arguments of a small model of the same class with every kind of its blocks.
        channels: of the latents.
        square: whether it takes square images only.
        uncheckpointed: what goes wrong when its blocks are checkpointed; empty where nothing does.
        depths: the arguments that say how many blocks each list of ``blocks`` has; none for a UNet.
        per_block: arguments that hold an entry for every block.
        native: pixels along each side of a training image of the released model.
        parameters: of the released model.
    """

    model: str
    blocks: tuple[Blocks, ...]
    inputs: Inputs
    condition: Callable[[Any, int], dict[str, tuple[int, ...]]]
    tiny: Mapping[str, Any]
    parameters: int
    output: Output = as_it_comes
    lengths: Lengths | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    channels: int = 4
    square: bool = False
    uncheckpointed: str = ""
    depths: tuple[str, ...] = ("num_layers",)
    per_block: tuple[str, ...] = ()
    native: int = 1024
