"""The networks of feature extractors, registered with torch-fidelity beside its own Inception."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import torch_fidelity
from torch import nn
from torch_fidelity.feature_extractor_base import FeatureExtractorBase

from repa_lab.encoders.encoder import lite0_model
from repa_lab.encoders.extractor_facts import CLS, EXTRACTORS, POOLED, SPATIAL
from repa_lab.encoders.registry import facts_of
from repa_lab.encoders.weights import load_model, skeleton

_LITE0_SIDE, _LITE0_LAYER = 64, "1280"
_DINO_SIDE = 224
_DINO_OFFSET = 0.1
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_SPATIAL_CHANNELS = 7


class _OneLayer(FeatureExtractorBase):  # type: ignore[misc]  # torch-fidelity carries no types
    """What torch-fidelity asks of an extractor that has one layer, for every metric."""

    layer: str
    side: int

    @classmethod
    def get_provided_features_list(cls) -> tuple[str]:
        """The one layer there is."""
        return (cls.layer,)

    @classmethod
    def get_default_feature_layer_for_metric(cls, metric: str) -> str:
        """The same layer for every metric."""
        return cls.layer

    @staticmethod
    def can_be_compiled() -> bool:
        """Not tried."""
        return False

    @classmethod
    def get_dummy_input_for_compile(cls) -> torch.Tensor:
        """An image of the right type."""
        return torch.zeros(1, 3, cls.side, cls.side, dtype=torch.uint8)


class Lite0Extractor(_OneLayer):
    """Pooled features ``(B, 1280)`` of EfficientNet-Lite0 for images resized to 64 px, bicubic, mean and std 0.5."""

    layer, side = _LITE0_LAYER, _LITE0_SIDE

    def __init__(self, name: str, features_list: list[str], **kwargs: Any) -> None:
        super().__init__(name, features_list)
        self.model = lite0_model()

    def forward(self, input: torch.Tensor) -> tuple[torch.Tensor]:
        """uint8 images ``(B, 3, H, W)`` to features."""
        images = F.interpolate(input.float() / 255, (_LITE0_SIDE, _LITE0_SIDE), mode="bicubic", antialias=True)
        return (self.model(images.clamp(0, 1) * 2 - 1),)


class DINOv2Extractor(_OneLayer):
    """DINOv2's CLS token ``(B, D)`` after the final norm, as dgm-eval (2306.04675) and Meta's own `forward` give it.

    Images are resized to 224x224, whatever their aspect, as Pillow's bicubic does it, and normalised with ImageNet's
    mean and standard deviation. The position table, learnt at 518 px, is resampled once by DINOv2's rule, which is not
    timm's.

    Args:
        name: torch-fidelity's.
        features_list: the one layer.
        feature_extractor_weights_path: a file of weights; None takes the hub's.

    Raises:
        EncoderError: the weights are missing or do not fit.
    """

    layer, side = CLS, _DINO_SIDE
    mean: torch.Tensor
    std: torch.Tensor

    def __init__(
        self, name: str, features_list: list[str], feature_extractor_weights_path: str | None = None, **kwargs: Any
    ) -> None:
        super().__init__(name, features_list)
        encoder = next(str(facts.encoder) for facts in EXTRACTORS.values() if facts.registered == name)
        facts = facts_of(encoder)
        assert facts is not None
        model: Any = load_model(encoder, facts, feature_extractor_weights_path, skeleton(encoder, facts))
        model.patch_embed.set_input_size(_DINO_SIDE)
        model.pos_embed = nn.Parameter(resample_positions(model.pos_embed.detach(), _DINO_SIDE // facts.stride))
        self.model = model
        self.register_buffer("mean", torch.tensor(_IMAGENET_MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(_IMAGENET_STD).view(1, 3, 1, 1))

    def forward(self, input: torch.Tensor) -> tuple[torch.Tensor]:
        """uint8 images ``(B, 3, H, W)`` to features."""
        images = resize_like_pillow(input, _DINO_SIDE) / 255
        return (self.model((images - self.mean) / self.std),)


def resize_like_pillow(pixels: torch.Tensor, side: int) -> torch.Tensor:
    """uint8 images ``(B, C, H, W)`` at ``(side, side)``, as float32 whole numbers from 0 to 255.

    Pillow's antialiased bicubic goes along rows, then along columns, and rounds and clips after each. In one pass
    without rounding a noisy image would differ by up to 20 of 255; so, by 1 or 2 in less than 1 % of the values.
    """
    rows = _whole(F.interpolate(pixels.float(), (pixels.shape[-2], side), mode="bicubic", antialias=True))
    return _whole(F.interpolate(rows, (side, side), mode="bicubic", antialias=True))


def _whole(values: torch.Tensor) -> torch.Tensor:
    return (values + 0.5).floor().clamp(0, 255)


def resample_positions(table: torch.Tensor, grid: int) -> torch.Tensor:
    """A position table ``(1, 1 + n * n, D)`` of a square grid and a CLS token at ``grid`` positions a side.

    As Meta's DINOv2 without registers does it: bicubic, not antialiased, at the scale ``(grid + 0.1) / n``.
    """
    n = round((table.shape[1] - 1) ** 0.5)
    scale = (grid + _DINO_OFFSET) / n
    places = table[:, 1:].reshape(1, n, n, -1).permute(0, 3, 1, 2)
    moved = F.interpolate(places, scale_factor=(scale, scale), mode="bicubic")
    return torch.cat([table[:, :1], moved.flatten(2).mT], dim=1)


class SpatialInception(nn.Module):
    """torch-fidelity's Inception with the spatial features of sFID (2103.03841) beside its own layers.

    ADM's evaluator takes the first 7 channels of ``mixed_6/conv:0``, 17x17 places, flattened with channels last: 2023
    numbers. By torch-fidelity's table of the two networks' weights ``mixed_6/conv`` is ``Mixed_6d.branch1x1``, whose
    192 channels come first in what ``Mixed_6d`` gives; guided-diffusion's issue #109 found the same by comparing
    values. The TensorFlow graph itself was not run here: that ``:0`` of the scope is the value after its ReLU is taken
    from there.

    Args:
        net: torch-fidelity's, made for the layers wanted beside the spatial one.
    """

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net
        self._seen: list[torch.Tensor] = []
        net.Mixed_6d.register_forward_hook(self._see)

    def forward(self, input: torch.Tensor) -> dict[str, torch.Tensor]:
        """uint8 images ``(B, 3, H, W)`` to features by layer."""
        found = self.net.convert_features_tuple_to_dict(self.net(input))
        return {**found, SPATIAL: self._seen.pop()}

    def _see(self, module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        self._seen = [output[:, :_SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)]


def beside_spatial(layers: Sequence[str]) -> list[str]:
    """What torch-fidelity's network is asked for when these layers are wanted; of the spatial one it does not know.

    Where nothing else is wanted, its layer 768 stops it one block after.
    """
    return [layer for layer in layers if layer != SPATIAL] or ["768"]


_CLASSES: dict[str, type[_OneLayer]] = {_LITE0_LAYER: Lite0Extractor, CLS: DINOv2Extractor}
for _facts in EXTRACTORS.values():
    if (_layer := _facts.layers["frechet"]) != POOLED:
        torch_fidelity.register_feature_extractor(_facts.registered, _CLASSES[_layer])
