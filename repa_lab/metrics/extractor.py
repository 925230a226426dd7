"""Feature extractors: networks that turn images into the features compared by FID, KID and other metrics.

Inception is torch-fidelity's own network and makes the Frechet distance an FID. The other networks are registered with
torch-fidelity by this module, and every metric's name says which one was used: ``dinov2_*`` gives the FD-DINOv2 of
2306.04675, ``efficientnet_lite0`` works on a machine that cannot download weights.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torch_fidelity
from torch import nn
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
from torch_fidelity.utils import create_feature_extractor

from repa_lab.files import file_digest
from repa_lab.kernels import kernels
from repa_lab.metrics.protocol import CLS, EXTRACTORS, LITE0_POOLED, SPATIAL, layers
from repa_lab.timm_models import EncoderError, lite0_model, load_model, reason, skeleton

VOUCHED = ".sha256"
_SHOWN_DIGITS = 8
_LITE0_SIDE, _DINO_SIDE, _DINO_PATCH = 64, 224, 14
_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and standard deviation


class Extractor:
    """A network that turns images into the features compared by metrics.

    A metric's name stands for published weights, so a file of weights with another SHA-256 is refused. To use another
    file, for example the same tensors as safetensors, vouch for it with ``sha256sum FILE > FILE.sha256``. The file's
    digest is part of the protocol and of the key of cached reference features.

    Args:
        name: a name in :data:`EXTRACTORS`.
        weights: a local file; None takes the file in torch-fidelity's or timm's cache, or downloads it.
        metrics: metrics to be measured; only the layers that they compare are computed.

    Raises:
        EncoderError: the weights are missing, do not fit, hold more than tensors, or are not the published ones.
    """

    def __init__(
        self, name: str, weights: str | None, device: torch.device, metrics: Iterable[str] = ("frechet",)
    ) -> None:
        self.name, self.metrics = name, tuple(metrics)
        self.layers = layers(name, self.metrics)
        if not self.layers:
            raise ValueError(f"{name} has no features for {', '.join(self.metrics) or 'nothing'}")
        self._weights, self.device = _weights_file(name, weights), device
        # torch-fidelity does not know the spatial layer; if nothing else is wanted, its layer 768 ends the pass soonest
        self._computed = [layer for layer in self.layers if layer != SPATIAL] or ["768"]
        path, registered = self._weights and str(self._weights), EXTRACTORS[name].registered
        try:
            net: nn.Module = create_feature_extractor(
                registered, self._computed, cuda=False, feature_extractor_weights_path=path, verbose=False
            )
        except RuntimeError as error:
            raise EncoderError("weights", f"'{path}' does not fit '{name}': {reason(error)}") from None
        self._net, self._spatial = net.to(device), torch.empty(0)
        if SPATIAL in self.layers:
            self._net.get_submodule("Mixed_6d").register_forward_hook(self._keep_spatial)

    def _keep_spatial(self, module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        """Keep the spatial features of sFID (2103.03841), which torch-fidelity's Inception does not return.

        ADM's evaluator takes the first 7 channels of ``mixed_6/conv:0``, 17x17 places, flattened with channels last:
        2023 numbers. By torch-fidelity's table of the two networks' weights ``mixed_6/conv`` is
        ``Mixed_6d.branch1x1``, whose 192 channels come first in the output of ``Mixed_6d``; guided-diffusion's issue
        #109 found the same by comparing values. The TensorFlow graph itself was not run here: that ``:0`` of the scope
        is the value after its ReLU is taken from there.
        """
        self._spatial = output[:, :7].permute(0, 2, 3, 1).flatten(1)

    @property
    def identity(self) -> dict[str, str]:
        """What determines the features: the extractor's name, its weights' digest or origin, and the preprocessing."""
        facts = EXTRACTORS[self.name]
        origin = f"{facts.model.weights}:{facts.model.timm_name}" if facts.model else ""
        weights = file_digest(self._weights) if self._weights else origin
        return {"extractor": self.name, "weights": weights, "preprocessing": facts.preprocessing}

    @torch.no_grad()
    def features(self, pixels: torch.Tensor, batch_size: int = 64) -> dict[str, torch.Tensor]:
        """Return the features, float32 ``(n, d)`` by layer, of uint8 images ``(n, 1 or 3, H, W)``, on its device.

        They are computed in float32 even under autocast or TF32.

        Raises:
            TypeError: the pixels are not uint8, so their range is unknown.
        """
        if pixels.dtype != torch.uint8:
            raise TypeError(f"pixels must be uint8, 0 to 255, got {pixels.dtype}")
        batches: list[dict[str, torch.Tensor]] = []
        with torch.autocast(self.device.type, enabled=False), kernels(tf32=False):
            for batch in pixels.split(batch_size):
                outputs = self._net(batch.to(self.device).expand(-1, 3, -1, -1).contiguous())
                by_layer = dict(zip(self._computed, outputs, strict=True)) | {SPATIAL: self._spatial}
                batches.append({layer: by_layer[layer].float() for layer in self.layers})
        return {layer: torch.cat([batch[layer] for batch in batches]) for layer in self.layers}

    @functools.cached_property
    def widths(self) -> dict[str, int]:
        """The number of features of each layer."""
        black = self.features(torch.zeros(1, 1, 8, 8, dtype=torch.uint8))
        return {layer: values.shape[1] for layer, values in black.items()}


def _weights_file(name: str, weights: str | None) -> Path | None:
    """Return the file to load, checked; None if the weights come from a package or timm's hub, or are random."""
    facts = EXTRACTORS[name]
    if weights is None and facts.model:
        return None
    if weights and not facts.sha256:
        raise EncoderError("weights", f"the weights of {name} are not loaded from a file; leave weights out")
    path = Path(weights) if weights else _inception_file(facts.sha256)
    if not path.is_file():
        raise EncoderError("weights", f"no file '{weights}'")
    actual, note = file_digest(path), Path(f"{path}{VOUCHED}")
    vouched = note.read_text(encoding="utf-8", errors="replace").split()[:1] if note.is_file() else []
    if actual != facts.sha256 and vouched != [actual]:
        seen = f"its SHA-256 begins with {actual[:_SHOWN_DIGITS]}, not {facts.sha256[:_SHOWN_DIGITS]}"
        allowed = f"get that file, or vouch for this one: sha256sum FILE > FILE{VOUCHED}"
        raise EncoderError("weights", f"'{path}' is not the published file of '{name}': {seen}; {allowed}")
    if not facts.model:
        try:  # torch-fidelity unpickles the file, which can run code: torch's restricted reader must take it first
            torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file can raise anything
            message = f"'{path}' is not a file of tensors, or is damaged; download it again ({reason(error)})"
            raise EncoderError("weights", message) from None
    return path


def _inception_file(sha256: str) -> Path:
    """Return torch-fidelity's file of Inception in torch's cache, downloaded if it is missing."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(URL_INCEPTION_V3).name
    try:
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), hash_prefix=sha256, progress=False)
    except (OSError, RuntimeError) as error:
        message = "Inception's weights are not on this machine and cannot be downloaded; give weights: FILE, or name:"
        raise EncoderError("weights", f"{message} efficientnet_lite0, which is not FID ({reason(error)})") from None
    return path


class _OneLayer(FeatureExtractorBase):  # type: ignore[misc]  # torch-fidelity has no types
    """A torch-fidelity extractor with one layer, which serves every metric, and is not compiled."""

    layer: str

    @classmethod
    def get_provided_features_list(cls) -> tuple[str]:
        """Return the name of the layer."""
        return (cls.layer,)

    @classmethod
    def get_default_feature_layer_for_metric(cls, metric: str) -> str:
        """Return the name of the layer."""
        return cls.layer

    @staticmethod
    def can_be_compiled() -> bool:
        """Return False: compilation is untested."""
        return False


class Lite0Extractor(_OneLayer):
    """Pooled features ``(B, 1280)`` of EfficientNet-Lite0 for images resized to 64 px, bicubic, mean and std 0.5."""

    layer = LITE0_POOLED

    def __init__(self, name: str, features_list: list[str], **kwargs: Any) -> None:
        super().__init__(name, features_list)
        self.model = lite0_model()

    def forward(self, input: torch.Tensor) -> tuple[torch.Tensor]:
        """Return the features of uint8 images ``(B, 3, H, W)``."""
        images = F.interpolate(input.float() / 255, (_LITE0_SIDE, _LITE0_SIDE), mode="bicubic", antialias=True)
        return (self.model(images.clamp(0, 1) * 2 - 1),)


class DINOv2Extractor(_OneLayer):
    """DINOv2's CLS token ``(B, D)`` after the final norm, as dgm-eval (2306.04675) and Meta's own `forward` give it.

    Images are resized to 224x224 regardless of their aspect, as by Pillow's bicubic filter, and normalised with
    ImageNet's mean and standard deviation. The position table, learnt at 518 px, is resampled once by DINOv2's rule,
    which differs from timm's.

    Args:
        feature_extractor_weights_path: a file of weights; None takes the hub's.

    Raises:
        EncoderError: the weights are missing or do not fit.
    """

    layer = CLS
    mean: torch.Tensor
    std: torch.Tensor

    def __init__(
        self, name: str, features_list: list[str], feature_extractor_weights_path: str | None = None, **kwargs: Any
    ) -> None:
        super().__init__(name, features_list)
        extractor, facts = next(item for item in EXTRACTORS.items() if item[1].registered == name)
        assert facts.model is not None
        shape = skeleton(extractor, facts.model)
        model: Any = load_model(extractor, facts.model, feature_extractor_weights_path, shape)
        model.patch_embed.set_input_size(_DINO_SIDE)
        model.pos_embed = nn.Parameter(resample_positions(model.pos_embed.detach(), _DINO_SIDE // _DINO_PATCH))
        self.model = model
        for buffer, values in zip(("mean", "std"), _IMAGENET, strict=True):
            self.register_buffer(buffer, torch.tensor(values).view(1, 3, 1, 1))

    def forward(self, input: torch.Tensor) -> tuple[torch.Tensor]:
        """Return the features of uint8 images ``(B, 3, H, W)``."""
        images = resize_like_pillow(input, _DINO_SIDE) / 255
        return (self.model((images - self.mean) / self.std),)


def resize_like_pillow(pixels: torch.Tensor, side: int) -> torch.Tensor:
    """Resize uint8 images ``(B, C, H, W)`` to ``(side, side)``, as float32 whole numbers from 0 to 255.

    Pillow's antialiased bicubic filter runs along rows, then along columns, and rounds and clips after each. This
    differs from Pillow by at most 2 of 255, in less than 1 % of the values; one pass without rounding differs by up to
    20 on a noisy image.
    """
    images = pixels.float()
    for size in ((pixels.shape[-2], side), (side, side)):
        images = (F.interpolate(images, size, mode="bicubic", antialias=True) + 0.5).floor().clamp(0, 255)
    return images


def resample_positions(table: torch.Tensor, grid: int) -> torch.Tensor:
    """Resample a position table ``(1, 1 + n * n, D)``, CLS token first, to ``grid`` positions a side.

    The rule of Meta's DINOv2 without registers: bicubic, not antialiased, at the scale ``(grid + 0.1) / n``.
    """
    n = round((table.shape[1] - 1) ** 0.5)
    scale = (grid + 0.1) / n
    places = table[:, 1:].reshape(1, n, n, -1).permute(0, 3, 1, 2)
    resampled = F.interpolate(places, scale_factor=(scale, scale), mode="bicubic")
    return torch.cat([table[:, :1], resampled.flatten(2).mT], dim=1)


for _facts in EXTRACTORS.values():
    if _facts.model is not None:
        _class = DINOv2Extractor if _facts.layers["frechet"] == CLS else Lite0Extractor
        torch_fidelity.register_feature_extractor(_facts.registered, _class)
