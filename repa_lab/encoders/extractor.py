"""Feature extractors of the Frechet distance, registered with torch-fidelity.

Inception is torch-fidelity's own and makes the distance FID. ``efficientnet_lite0`` is the lab's, for machines without the
Inception weights: its distance is not FID and is never called so.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torch_fidelity
from numpy.typing import NDArray
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.utils import create_feature_extractor

from repa_lab.encoders.encoder import EncoderError, lite0_model, one_line

_LITE0_SIDE = 64
_LITE0_LAYER = "1280"
# The name in a spec, torch-fidelity's name, and the layer that the distance compares.
EXTRACTORS = {
    "inception": ("inception-v3-compat", "2048"),
    "efficientnet_lite0": ("efficientnet-lite0-64", _LITE0_LAYER),
}


class Lite0Extractor(FeatureExtractorBase):  # type: ignore[misc]  # torch-fidelity carries no types
    """Pooled features ``(B, 1280)`` of EfficientNet-Lite0 for images resized to 64 px, bicubic, mean and std 0.5."""

    def __init__(self, name: str, features_list: list[str], **kwargs: Any) -> None:
        super().__init__(name, features_list)
        self.model = lite0_model()

    def forward(self, input: torch.Tensor) -> tuple[torch.Tensor]:
        """uint8 images ``(B, 3, H, W)`` to features."""
        images = F.interpolate(input.float() / 255, (_LITE0_SIDE, _LITE0_SIDE), mode="bicubic", antialias=True)
        return (self.model(images.clamp(0, 1) * 2 - 1),)

    @staticmethod
    def get_provided_features_list() -> tuple[str]:
        """The one layer there is."""
        return (_LITE0_LAYER,)

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        """The same layer for every metric."""
        return _LITE0_LAYER

    @staticmethod
    def can_be_compiled() -> bool:
        """Not tried."""
        return False

    @staticmethod
    def get_dummy_input_for_compile() -> torch.Tensor:
        """An image of the right type."""
        return torch.zeros(1, 3, _LITE0_SIDE, _LITE0_SIDE, dtype=torch.uint8)


torch_fidelity.register_feature_extractor(EXTRACTORS["efficientnet_lite0"][0], Lite0Extractor)


class Extractor:
    """Images to the features that a Frechet distance compares.

    Args:
        name: ``inception`` or ``efficientnet_lite0``.
        weights: a local file of Inception's weights; None lets torch-fidelity find or fetch them.
        device: where to run.

    Raises:
        EncoderError: the weights are missing, do not fit, or hold more than tensors.
    """

    def __init__(self, name: str, weights: str | None, device: torch.device) -> None:
        registered, self._layer = EXTRACTORS[name]
        if weights:
            _require_plain_tensors(weights, name)
        try:
            self._net = create_feature_extractor(
                registered, [self._layer], cuda=False, feature_extractor_weights_path=weights, verbose=False
            ).to(device)
        except RuntimeError as error:
            raise EncoderError("weights", f"'{weights}' does not fit '{name}': {one_line(error)}") from None
        except OSError as error:
            message = "Inception's weights are not on this machine and cannot be fetched; give weights: FILE, or name:"
            raise EncoderError("weights", f"{message} efficientnet_lite0, which is not FID ({error})") from None
        self._device = device

    @torch.no_grad()
    def __call__(self, pixels: torch.Tensor, batch_size: int = 64) -> NDArray[np.float64]:
        """Features ``(n, d)`` of uint8 images ``(n, 1 or 3, H, W)``."""
        parts = [
            self._net(batch.to(self._device).expand(-1, 3, -1, -1).contiguous())[0].cpu().double()
            for batch in pixels.split(batch_size)
        ]
        return torch.cat(parts).numpy()


def _require_plain_tensors(weights: str, name: str) -> None:
    """torch-fidelity unpickles the file, which may run code in it: torch's restricted reader must accept the file first."""
    if name == "efficientnet_lite0":
        raise EncoderError("weights", "the weights of efficientnet_lite0 come with a package; leave weights out")
    if not Path(weights).is_file():
        raise EncoderError("weights", f"no file '{weights}'")
    try:
        torch.load(weights, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise anything
        raise EncoderError("weights", f"'{weights}' is no file of tensors: {one_line(error)}") from None
