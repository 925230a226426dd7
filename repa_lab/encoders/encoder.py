"""A frozen encoder maps pixels to patch tokens on a grid; other output is refused before training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
from timm.layers.attention import Attention as SelfAttention
from torch import nn

from repa_lab.align.regularizer import Attention
from repa_lab.align.tokens import Grid, Tokens, flatten_map
from repa_lab.encoders.registry import ENCODERS, EncoderFacts, Resize, attention_problem, facts_of, input_size
from repa_lab.kernels import kernels
from repa_lab.registry import did_you_mean
from repa_lab.timm_models import TINY, EncoderError, load_model, reason, skeleton

_CNN_STRIDE = 16
_ROUNDING = 1e-5
_COMPILER = "inductor"
_PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class EncoderOptions:
    """How an encoder runs.

    Attributes:
        precision: dtype of its weights and activations; pixels are normalised and tokens returned in float32.
        compile: whether to use `torch.compile`, which is faster after a first call of a minute.
        batch_size: maximum number of images at a time, to save memory; None takes the whole batch.
        attention: blocks whose queries and keys are kept, as Python's indices; see :meth:`Encoder.attention`.
    """

    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False
    batch_size: int | None = None
    attention: tuple[int, ...] = ()


class Encoder(nn.Module):
    """A timm model as a source of patch tokens, frozen and in evaluation mode.

    Preprocessing is the papers' (REPA, released code): pixels / 255, so in [0, 1]; the model's own mean and standard
    deviation; bicubic resize without antialiasing to `input_size`, which keeps the image's aspect. A grey image gets
    three equal channels. Surrounding autocast and TF32 have no effect.

    Args:
        model: a model with timm's `forward_intermediates` and `pretrained_cfg`.
        stage: index of the feature map.
        stride: input pixels per token of that map, along each side.
        image_size: pixels along each side of a square input; None derives the size from the image's.
        norm: see :class:`EncoderFacts`, as for ``resize``.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(
        self,
        model: nn.Module,
        stage: int,
        stride: int,
        image_size: int | None,
        options: EncoderOptions = EncoderOptions(),
        norm: bool = True,
        resize: Resize = "bicubic",
    ) -> None:
        super().__init__()
        self.dtype = _PRECISIONS[options.precision]
        self.model, self.stage, self.stride = model.to(self.dtype), stage, stride
        self.image_size, self.options, self.norm = image_size, options, norm
        self.mode, _, antialias = resize.partition("-")
        self.antialias = bool(antialias)
        config: Any = model.pretrained_cfg
        self.register_buffer("mean", torch.tensor(config["mean"]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(config["std"]).view(1, 3, 1, 1))
        self._features: Callable[[torch.Tensor], torch.Tensor] = self._map
        if options.compile:
            self._features = torch.compile(self._map, backend=_COMPILER)
        self._grid: Grid = (0, 0)
        self._heads: dict[int, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}  # queries and keys
        for block in options.attention:
            layer: Any = model.get_submodule("blocks")[block].attn  # type: ignore[index]
            self._heads[block] = ([], [])
            for norm_of_heads, kept in zip((layer.q_norm, layer.k_norm), self._heads[block], strict=True):
                norm_of_heads.register_forward_hook(lambda module, inputs, output, kept=kept: kept.append(output))
        self.eval().requires_grad_(False)

    def input_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width at which the model sees an image: `registry.input_size`, or an EncoderError."""
        size = input_size(self.stride, (height, width), self.image_size)
        if min(size) == 0:
            message = f"the papers' rule has no size for {height}x{width} px images; set image_size"
            raise EncoderError("image_size", message)
        return size

    def preprocess(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the normalised input ``(B, 3, *input_size(H, W))``, float32, for uint8 pixels ``(B, 1 or 3, H, W)``.

        Raises:
            TypeError: the pixels are not uint8, so their range is unknown.
        """
        if pixels.dtype != torch.uint8:
            raise TypeError(f"pixels must be uint8, 0 to 255, got {pixels.dtype}")
        images = (pixels.float() / 255).expand(-1, 3, -1, -1)
        size = self.input_size(*pixels.shape[-2:])
        normalised = (images - self.mean) / self.std
        return F.interpolate(normalised, size, mode=self.mode, align_corners=False, antialias=self.antialias)

    @torch.no_grad()
    def forward(self, pixels: torch.Tensor) -> Tokens:
        """Return the tokens of uint8 pixels ``(B, 1 or 3, H, W)`` without class and register tokens, in float32.

        They are ``(B, h*w, D)`` on the grid ``(h, w)``, the input size over the stride.
        """
        for queries, keys in self._heads.values():
            queries.clear()
            keys.clear()
        batches = pixels.split(self.options.batch_size or max(len(pixels), 1))
        with torch.autocast(pixels.device.type, enabled=False), kernels(tf32=False):
            maps = [self._features(self.preprocess(batch).to(self.dtype)) for batch in batches]
        tokens = flatten_map(torch.cat(maps).float())
        self._grid = tokens.grid
        return Tokens(tokens.values.contiguous(), tokens.grid)

    def attention(self, block: int) -> Attention:
        """Return the queries and keys between patches in one of the blocks kept, of the latest :meth:`forward`."""
        model: Any = self.model
        query, key = (torch.cat(kept)[:, :, model.num_prefix_tokens :] for kept in self._heads[block])
        return Attention(query, key, self._grid)

    def _map(self, images: torch.Tensor) -> torch.Tensor:
        model: Any = self.model
        maps: list[torch.Tensor] = model.forward_intermediates(
            images, indices=[self.stage], norm=self.norm, output_fmt="NCHW", intermediates_only=True
        )
        return maps[0]


def load_encoder(
    name: str,
    image_size: int | None,
    resolution: int,
    weights: str | None = None,
    options: EncoderOptions = EncoderOptions(),
) -> Encoder:
    """Load a frozen encoder.

    Args:
        name: a registered name (SimpleTuner's names are), or timm's own.
        image_size: pixels along each side of a square input; None derives it from the image (`registry.input_size`).
        resolution: pixels along each side of the training images; a size without a grid is refused before loading.
        weights: a local file of weights; None takes the bundled file, the hub's cache or the hub.

    Raises:
        EncoderError: the name is unknown, the weights are missing or do not fit, the size gives no grid, or the model
            has no feature maps or no attention that can be kept.
    """
    facts = facts_of(name) or EncoderFacts(name, 0, 0)
    if facts.build is not None:
        if message := attention_problem(name, options.attention):
            raise EncoderError("name", message)
        return Encoder(_PluginModel(facts, weights), 0, facts.stride, image_size, options, resize=facts.resize)
    if not timm.is_model(facts.timm_name.split(".")[0]):
        hint = did_you_mean(name, [*ENCODERS, *timm.list_models()])
        raise EncoderError("name", f"unknown encoder '{name}'; allowed: {', '.join(ENCODERS)} or a timm model{hint}")
    shape: Any = skeleton(name, facts)
    layers = [getattr(block, "attn", None) for block in getattr(shape, "blocks", ())]
    depth = len(layers) if all(type(layer) is SelfAttention for layer in layers) else 0
    if message := attention_problem(name, options.attention, depth):
        raise EncoderError("name", message)
    stage, stride = feature_stage(name, shape)
    side, _ = input_size(stride, (resolution, resolution), image_size)
    if side < stride or side % stride:
        raise EncoderError("image_size", f"'{name}' has patches of {stride} px: {side} is not a multiple of them")
    return Encoder(load_model(name, facts, weights, shape), stage, stride, image_size, options, facts.norm)


def has_tiny(name: str) -> bool:
    """Return whether an encoder is a timm vision transformer, which can be built with two narrow blocks."""
    facts = facts_of(f"{TINY}{name}")
    assert facts is not None
    try:
        skeleton(name, facts)
    except (EncoderError, TypeError, RuntimeError):
        return False
    return True


class _PluginModel(nn.Module):
    """A plugin's module behind the part of timm's interface that :class:`Encoder` uses."""

    def __init__(self, facts: EncoderFacts, weights: str | None) -> None:
        super().__init__()
        assert facts.build is not None
        self.module = facts.build(weights)
        self.pretrained_cfg = {"mean": facts.mean, "std": facts.std}

    def forward_intermediates(self, images: torch.Tensor, **options: Any) -> list[torch.Tensor]:
        return [self.module(images)]


def require_patch_tokens(encoder: Encoder, name: str, pixels: torch.Tensor) -> Tokens:
    """Run real images through an encoder and refuse output that is no grid of differing, finite tokens.

    Args:
        pixels: a few images ``(B, C, H, W)``, uint8.

    Raises:
        EncoderError: with the number and grid of the tokens.
    """
    height, width = encoder.input_size(*pixels.shape[-2:])
    try:
        tokens: Tokens = encoder(pixels)
    except (ValueError, RuntimeError, AssertionError, AttributeError) as error:
        raise EncoderError("name", f"'{name}' gives no patch grid: {reason(error)}") from None
    values = tokens.values
    expected = (height // encoder.stride, width // encoder.stride)
    seen = f"got {values.shape[1]} on a {tokens.grid[0]}x{tokens.grid[1]} grid"
    if values.shape[1] < 2:
        raise EncoderError("name", f"'{name}' gives one token an image; patch tokens are required, {seen}")
    if tokens.grid != expected:
        wanted = f"{height}x{width} px with patches of {encoder.stride} are {expected[0]}x{expected[1]}"
        raise EncoderError("name", f"'{name}' gives tokens that do not match its patches: {wanted}, {seen}")
    if not values.isfinite().all():
        raise EncoderError("name", f"'{name}' gives values that are not finite, {seen}")
    if (values - values[:, :1]).abs().max() <= _ROUNDING * values.abs().max():
        raise EncoderError("name", f"'{name}' gives the same token at every place, {seen}")
    return tokens


def feature_stage(name: str, model: Any) -> tuple[int, int]:
    """Return the index and the stride of the feature map: a ViT's last block, a CNN's last of stride 16 or less.

    Raises:
        EncoderError: timm gives no feature maps of the model.
    """
    if not hasattr(model, "forward_intermediates"):
        raise EncoderError("name", f"'{name}' has no intermediate feature maps in timm, so it gives no patch tokens")
    reductions = [stage["reduction"] for stage in model.feature_info]
    coarsest = max(_CNN_STRIDE, min(reductions))  # every block of a ViT with patches of 32 has stride 32
    stage = max(index for index, reduction in enumerate(reductions) if reduction <= coarsest)
    return stage, reductions[stage]
