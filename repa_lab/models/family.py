"""What a family of denoisers is, as data: its blocks, its model and its pipeline in diffusers. Imports no torch.

`plan` therefore checks a spec in a second. The last part has the sizes of the families that are trained from scratch;
every other family is a file in :mod:`repa_lab.models.families`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from repa_lab.align.settings import REGULARIZERS
from repa_lab.registry import UnknownComponentError

if TYPE_CHECKING:
    import torch

    Tensor = torch.Tensor
else:
    Tensor = Any  # for annotations alone

Kind = Literal["transformer", "unet"]
BlockIndex = int | Literal["mid"]
Condition = Mapping[str, Tensor]
# Name of the lengths of the texts ``(B,)`` in the conditioning of families with :attr:`Network.lengths`.
TEXT_LENGTHS = "text_lengths"
# Prefix of a size: the same number of blocks or levels, but narrow. A rehearsal trains such a model.
NARROW = "narrow-"
_NARROW_WIDTH = 32
# Names of the query, key, value and output layers of attention in most models of diffusers.
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


@dataclass(frozen=True)
class Shape:
    """One size of a family.

    Attributes:
        depth: number of blocks that ``block_index`` counts; 1 for a UNet, whose only tap is ``mid``.
        width: width D of the denoiser at the tap.
        stride: input pixels (or latent cells) per token along each side at the tap.
        block: suggested ``block_index``.
        heads: attention heads of a transformer that is trained from scratch.
        channels: channels per level of a UNet that is trained from scratch; ``layers`` are its residual blocks there.
        stages: blocks per stage of a U-shaped transformer, the middle one at half the resolution.
    """

    depth: int
    width: int
    stride: int
    block: BlockIndex
    heads: int = 0
    channels: tuple[int, ...] = ()
    layers: int = 0
    stages: tuple[int, ...] = ()

    def stride_at(self, block: BlockIndex | None) -> int:
        """Return the stride of the tokens that leave a block, None the suggested one: half in a U's outer stages."""
        if not self.stages or not isinstance(block, int):
            return self.stride
        before, middle, _ = self.stages
        return self.stride if before <= block < before + middle else self.stride // 2


@dataclass(frozen=True)
class Blocks:
    """A list of blocks that ``block_index`` counts, and where their output holds the image's tokens.

    Attributes:
        path: the list's name in the model, or the name of the block itself for a UNet's mid block.
        item: index of the output that holds the image's tokens; None if a block returns one tensor.
        place: position of the image's tokens in the sequence: the whole of it (``all``), its start (``head``), its end
            (``tail``), or behind the text of each sample (``after_text``); ``map`` is a map ``(B, C, h, w)``.
        samples: dimension of the batch; 1 for blocks that return ``(M, B, D)``.
        depth: the constructor's argument that sets the length of the list; a UNet's mid block has none.
    """

    path: str
    item: int | None = None
    place: Literal["all", "head", "tail", "after_text", "map"] = "all"
    samples: Literal[0, 1] = 0
    depth: str = "num_layers"


def first_channels(output: Any, latents: Tensor) -> Tensor:
    """Return a model's output ``(B, C, H, W)`` without the channels after the latents', which predict the variance."""
    prediction: Tensor = output[:, : latents.shape[1]]
    return prediction


@dataclass(frozen=True)
class Network:
    """A model class of diffusers, used as a denoiser.

    Attributes:
        model: name of the class in diffusers.
        blocks: the lists of blocks that can be tapped, in the order in which ``block_index`` counts them.
        inputs: makes the arguments of ``forward`` from the model's config, noisy latents ``(B, C, H, W)``, times
            ``(B,)`` in [0, 1] (1 is noise) and conditioning.
        condition: returns the shapes of the conditioning by name, without the batch, from the model's config and a
            number of text tokens. A name that contains "mask" or "labels" holds integers.
        tiny: constructor arguments of a small model that has every kind of block.
        parameters: number of parameters of the released model.
        output: makes the prediction ``(B, C, H, W)`` from the model's output and the latents.
        lengths: returns the number of text tokens of each sample ``(B,)`` from the conditioning; needed for the place
            ``after_text``, and by ``inputs`` that cut texts: reading lengths from a GPU waits for it, so that training
            adds them to the conditioning as :data:`TEXT_LENGTHS`, on the CPU.
        config: constructor arguments of the released model that differ from the defaults.
        channels: number of latent channels.
        square: whether the model takes square images only.
        uncheckpointed: what goes wrong when the model's blocks are checkpointed; empty if nothing does.
        per_block: constructor arguments that hold one entry per block.
        native: side in pixels of the released model's training images.
        unused: whether some parameters get no gradient, those of a text stream that nothing reads after the last
            block; DistributedDataParallel must then look for them in every step.
    """

    model: str
    blocks: tuple[Blocks, ...]
    inputs: Callable[[Any, Tensor, Tensor, Condition], dict[str, Any]]
    condition: Callable[[Any, int], dict[str, tuple[int, ...]]]
    tiny: Mapping[str, Any]
    parameters: int
    output: Callable[[Any, Tensor], Tensor] = first_channels
    lengths: Callable[[Condition], Tensor] | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    channels: int = 4
    square: bool = False
    uncheckpointed: str = ""
    per_block: tuple[str, ...] = ()
    native: int = 1024
    unused: bool = False

    @property
    def depths(self) -> tuple[str, ...]:
        """The constructor's arguments that set the number of blocks; none for a UNet."""
        return tuple(blocks.depth for blocks in self.blocks if blocks.place != "map")


@dataclass(frozen=True)
class Component:
    """A component of a tiny pipeline: a class such as ``transformers.CLIPTextModel``, and its config's arguments.

    The vocabulary of a tokenizer is made by :mod:`repa_lab.models.tiny`.
    """

    name: str
    config: Mapping[str, Any] = field(default_factory=dict)


# Arguments of most pipelines' calls by the name of their conditioning.
_PROMPT = {
    "encoder_hidden_states": "prompt_embeds",
    "encoder_attention_mask": "prompt_attention_mask",
    "pooled_projections": "pooled_prompt_embeds",
}


def usual_prompt(condition: Condition) -> dict[str, Any]:
    """Return a text, its mask and its pooled embedding, where a family has them, under most pipelines' names."""
    return {argument: condition[name] for name, argument in _PROMPT.items() if name in condition}


@dataclass(frozen=True)
class Pipeline:
    """A pipeline class of diffusers, which encodes captions and samples images.

    Attributes:
        classes: names of the pipeline classes whose folders hold this family; the tiny pipeline is of the first one.
        encode: encodes captions with the pipeline, from which the denoiser may be missing: the conditioning by text,
            one row per caption, all padded to one length, under the names of :attr:`Network.condition`. None for a
            family without text.
        tiny: components of a small pipeline that fits :attr:`Network.tiny`, without the denoiser.
        prompt: makes the arguments of the pipeline's call from conditioning ``(B, ...)``.
        negative: whether the call also takes the arguments of ``prompt`` for the empty caption, as ``negative_NAME``.
        guidance: name of the call's argument for the guidance scale.
        unguided: value of that argument that means no guidance: 1, or 0 for a pipeline that adds the difference
            between the two predictions to the one with text.
        options: further arguments of the call.
        sizes: makes the conditioning by size from the model's config and frames ``(B, 6)`` in pixels: original height
            and width, top and left of the crop, target height and width. None for a family that is not told sizes.
        adapted: ends of the names of the layers that LoRA adapts.
        allow: adapts a pipeline so that it can draw images of a given height and width; None if it can draw any.
        shifted: whether the pipeline applies the shift of an autoencoder that has one.
        released: hub id of the pipeline that :attr:`Network.config` describes.
        num_classes: returns the number of classes from the model's config, for a family that is conditioned on a
            class instead of a text; that number is the null label.
    """

    classes: tuple[str, ...]
    encode: Callable[[Any, Sequence[str]], dict[str, Tensor]] | None
    tiny: Mapping[str, Component]
    prompt: Callable[[Condition], dict[str, Any]] = usual_prompt
    negative: bool = True
    guidance: str = "guidance_scale"
    unguided: Literal[0, 1] = 1
    options: Mapping[str, Any] = field(default_factory=dict)
    sizes: Callable[[Any, Tensor], dict[str, Tensor]] | None = None
    adapted: tuple[str, ...] = ATTENTION
    allow: Callable[[Any, int, int], None] | None = None
    shifted: bool = True
    released: str = ""
    num_classes: Callable[[Any], int] | None = None

    def call(self, condition: Condition, null: Condition, guidance: float) -> dict[str, Any]:
        """Return the call's arguments for conditioning ``(B, ...)`` and that of the empty text; guidance 1 is none."""
        arguments = {**self.prompt(condition), **self.options, self.guidance: guidance - (1 - self.unguided)}
        if self.negative:
            arguments |= {f"negative_{name}": value for name, value in self.prompt(null).items()}
        return arguments


@dataclass(frozen=True)
class Family:
    """The facts of a family of denoisers.

    Attributes:
        name: name in a spec.
        kind: ``transformer`` or ``unet``, which is also the name of the pipeline's component that is trained.
        shapes: shape of every size; a family whose folder decides has the single key ``""``.
        latent_stride: image pixels per latent cell along each side; 1 for families that take images as they are.
        frame_stride: frames of a clip per latent frame after the first, which is one frame; 0 for a family of images.
        network: model in diffusers; None for a family that is trained from scratch.
        pipeline: pipeline in diffusers; None for a family that is trained from scratch.
        u_shaped: whether it is a transformer with a stage of fewer tokens.
        has_attention: whether queries and keys of its blocks can be tapped.
        has_token_times: whether its denoiser takes a time for every token.
    """

    name: str
    kind: Kind
    shapes: Mapping[str, Shape]
    latent_stride: int = 8
    frame_stride: int = 0
    network: Network | None = None
    pipeline: Pipeline | None = None
    u_shaped: bool = False
    has_attention: bool = False
    has_token_times: bool = False

    @property
    def regularizer(self) -> str:
        """The regularizer that fits best: ``repa`` for transformers, ``urepa`` for U-shaped denoisers."""
        return self.regularizers[0]

    @property
    def regularizers(self) -> tuple[str, ...]:
        """The regularizers that fit, the best first."""
        kinds = ("u_shaped", self.kind) if self.u_shaped else (self.kind,)
        fitting = {name: REGULARIZERS[name].settings.kinds for name in REGULARIZERS if name != "none"}
        return tuple(dict.fromkeys(name for kind in kinds for name, fits in fitting.items() if kind in fits))

    @property
    def is_video(self) -> bool:
        """Whether the family denoises clips, not images."""
        return self.frame_stride > 0

    def latent_frames(self, frames: int) -> int:
        """Return the latent frames of a clip of so many frames; 1 for an image, which has 0."""
        return 1 + (frames - 1) // self.frame_stride if self.is_video and frames else 1

    @property
    def from_scratch(self) -> bool:
        """Whether the family is built by ``size`` rather than loaded from a pretrained folder."""
        return "" not in self.shapes


def network_of(family: Family) -> Network:
    """Return the model of a released family."""
    assert family.network is not None
    return family.network


def pipeline_of(family: Family) -> Pipeline:
    """Return the pipeline of a released family."""
    assert family.pipeline is not None
    return family.pipeline


def shape_of(family: Family, size: str | None) -> Shape:
    """Return the shape of a family at a size, None for a pretrained one, or raise an UnknownComponentError."""
    key = (size or "").removeprefix(NARROW)
    if key not in family.shapes:
        raise UnknownComponentError(f"size of {family.name}", key, tuple(family.shapes))
    shape = family.shapes[key]
    if size is None or key == size:
        return shape
    channels, heads, layers = (_NARROW_WIDTH,) * len(shape.channels), min(shape.heads, 2), min(shape.layers, 1)
    return replace(shape, width=_NARROW_WIDTH, heads=heads, channels=channels, layers=layers)


# Depth, width, heads, suggested block: the papers align depth 4 of B and depth 8 of L and XL, counted from 1.
_SIT = {
    "nano": (4, 64, 4, 1),
    "S": (12, 384, 6, 3),
    "B": (12, 768, 12, 3),
    "L": (24, 1024, 16, 7),
    "XL": (28, 1152, 16, 7),
}
SIT_SHAPES = {
    f"{size}/{patch}": Shape(depth, width, stride=patch, block=block, heads=heads)
    for size, (depth, width, heads, block) in _SIT.items()
    for patch in (2, 4, 8)
}

# Channels per level and residual blocks per level. B is the ImageNet UNet of the latent diffusion paper.
_UNET: dict[str, tuple[tuple[int, ...], int]] = {
    "nano": ((32, 64), 1),
    "S": ((128, 256, 384), 2),
    "B": ((192, 384, 576, 960), 2),
}
UNET_SHAPES = {
    size: Shape(1, channels[-1], 2 ** (len(channels) - 1), "mid", channels=channels, layers=layers)
    for size, (channels, layers) in _UNET.items()
}

# Blocks per stage, width, heads: Table 2 of U-REPA, which gives the heads of B only. The suggested block is the middle
# one, as in Table 4 (the 18th of 36 blocks). There a token covers two patches of 2 along each side.
_SIT_DOWN = {
    "nano": ((2, 2, 2), 64, 4),
    "B": ((5, 5, 5), 768, 12),
    "L": ((9, 14, 9), 1024, 16),
    "XL": ((10, 16, 10), 1152, 16),
}
SIT_DOWN_SHAPES = {
    f"{size}/2": Shape(sum(stages), width, 4, (sum(stages) - 1) // 2, heads=heads, stages=stages)
    for size, (stages, width, heads) in _SIT_DOWN.items()
}


def swiglu_width(width: int) -> int:
    """Return the hidden channels of SiT-down's gated MLP, which then has about as many weights as SiT's MLP."""
    return -(-(8 * width // 3) // 256) * 256


SIT = Family("sit", "transformer", SIT_SHAPES, latent_stride=1, has_attention=True, has_token_times=True)
UNET = Family("unet", "unet", UNET_SHAPES, latent_stride=1)
SIT_DOWN = Family("sit_down", "transformer", SIT_DOWN_SHAPES, latent_stride=1, u_shaped=True)
