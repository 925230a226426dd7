"""How a family says what surrounds its model in a pipeline of diffusers: texts, sizes, and the call that samples. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

    from repa_lab.models.network import Condition

    Encode = Callable[[Any, Sequence[str]], dict[str, torch.Tensor]]
    Call = Callable[[Condition, Condition, float], dict[str, Any]]
    Sizes = Callable[[Any, torch.Tensor], dict[str, torch.Tensor]]

# What every query, key, value and output of attention is called in most models of diffusers.
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


@dataclass(frozen=True)
class Part:
    """A component of a tiny pipeline: a class, as ``transformers.CLIPTextModel``, and the arguments of its config.

    A tokenizer's vocabulary is made when it is written, from what it needs beside the printable characters.
    """

    name: str
    config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Pipeline:
    """A family's pipeline.

    Attributes:
        classes: the pipelines of diffusers whose folders hold this family; the first is that of the tiny one.
        encode: the conditioning by text of captions, from the pipeline without its denoiser: one row a caption, every
            text padded to the same length, under the names of :attr:`Network.condition`. None for one without text.
        call: the arguments of the pipeline's call from conditioning ``(B, ...)``, that of the empty caption
            ``(B, ...)``, and the scale of guidance.
        tiny: the components of a small pipeline that fits :attr:`Network.tiny`, but for the denoiser.
        denoiser: the component that is trained.
        sizes: conditioning by size, from the model's config and frames ``(B, 6)``: original height and width, top and
            left of the crop, target height and width, in pixels. None for a family that is told none.
        adapted: the layers that LoRA adapts, by the ends of their names.
        allow: adapts a pipeline that cannot draw images of any (height, width) from conditioning; None where it can.
        shifted: whether the pipeline applies the autoencoder's shift, if that has one.
        released: the hub id of the pipeline that :attr:`Network.config` describes.
        num_classes: from the model's config, of a family that is told a class instead of a text; that number is no
            class.
    """

    classes: tuple[str, ...]
    encode: Encode | None
    call: Call
    tiny: Mapping[str, Part]
    denoiser: Literal["transformer", "unet"] = "transformer"
    sizes: Sizes | None = None
    adapted: tuple[str, ...] = ATTENTION
    allow: Callable[[Any, int, int], None] | None = None
    shifted: bool = True
    released: str = ""
    num_classes: Callable[[Any], int] | None = None
