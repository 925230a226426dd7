"""Feature extractors of samples: images to what FID, KID and their like compare, each network run once an image.

Inception is torch-fidelity's own and makes the Frechet distance FID. The others are the lab's and are named in every
number: ``dinov2_*`` gives the FD-DINOv2 of 2306.04675, ``efficientnet_lite0`` is for machines without any weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
from torch_fidelity.utils import create_feature_extractor

from repa_lab.encoders.encoder import EncoderError, one_line
from repa_lab.encoders.extractor_facts import EXTRACTORS, SPATIAL, ExtractorFacts, layer_of, layers
from repa_lab.encoders.extractor_nets import SpatialInception, beside_spatial
from repa_lab.encoders.registry import facts_of
from repa_lab.files import file_digest

VOUCHED = ".sha256"
_PREFIX = 8


@dataclass(frozen=True)
class Features:
    """Features of one pass over images.

    Attributes:
        extractor: whose.
        layers: float32 ``(n, d)`` by layer, of the same n images in the same order.
    """

    extractor: str
    layers: Mapping[str, NDArray[np.float32]]

    def __len__(self) -> int:
        return len(next(iter(self.layers.values())))

    def of(self, metric: str) -> NDArray[np.float32]:
        """What a metric compares, ``(n, d)``.

        Raises:
            ValueError: the metric has no meaning with this extractor, or the extractor was not made for it.
        """
        layer = layer_of(self.extractor, metric)
        if layer not in self.layers:
            why = f"the extractor was made for {', '.join(self.layers)}" if layer else "it has no meaning there"
            raise ValueError(f"no features of {self.extractor} for {metric}: {why}")
        return self.layers[layer]

    @classmethod
    def cat(cls, parts: Sequence[Features]) -> Features:
        """The features of all parts, which are of one extractor made for the same metrics."""
        names = parts[0].layers
        return cls(parts[0].extractor, {name: np.concatenate([part.layers[name] for part in parts]) for name in names})


class Extractor:
    """Images to the features that metrics compare.

    A publisher's file of weights is known by its SHA-256, and any other is refused: a distance is named by its
    extractor. Whoever wants another file all the same, say the same tensors in safetensors, vouches for it with the
    output of ``sha256sum FILE > FILE.sha256``; the digest is part of what caches of reference features hang on.

    Args:
        name: one of :data:`EXTRACTORS`.
        weights: a local file; None lets torch-fidelity's and timm's files be found in their caches, or fetched.
        device: where to run.
        metrics: what will be measured; only the layers that they need are computed.

    Raises:
        EncoderError: the weights are missing, do not fit, hold more than tensors, or are not those that the name stands
            for.
    """

    def __init__(
        self, name: str, weights: str | None, device: torch.device, metrics: Iterable[str] = ("frechet",)
    ) -> None:
        self.name, self.metrics, self._facts = name, tuple(metrics), EXTRACTORS[name]
        self.layers = layers(name, self.metrics)
        if not self.layers:
            raise ValueError(f"{name} has no features for {', '.join(self.metrics) or 'nothing'}")
        self._weights = _weights_file(name, self._facts, weights)
        self._net = _network(name, self._facts, self._weights, self.layers).to(device)
        self._device = device

    @property
    def identity(self) -> dict[str, str]:
        """What makes its features what they are: its name, the file of weights or where they come from, the preprocessing."""
        facts = self._facts
        return {"extractor": self.name, "weights": _origin(facts, self._weights), "preprocessing": facts.preprocessing}

    @torch.no_grad()
    def features(self, pixels: torch.Tensor, batch_size: int = 64) -> Features:
        """Features of uint8 images ``(n, 1 or 3, H, W)``, in one pass and in full float32, whatever autocast is on.

        Raises:
            TypeError: the pixels are not uint8, so their range is not known.
        """
        if pixels.dtype != torch.uint8:
            raise TypeError(f"pixels must be uint8, 0 to 255, got {pixels.dtype}")
        with torch.autocast(self._device.type, enabled=False), _whole_float32():
            parts = [self._run(batch) for batch in pixels.split(batch_size)]
        return Features.cat([Features(self.name, part) for part in parts])

    def _run(self, batch: torch.Tensor) -> dict[str, NDArray[np.float32]]:
        found = self._net(batch.to(self._device).expand(-1, 3, -1, -1).contiguous())
        if not isinstance(found, dict):
            found = dict(zip(self.layers, found, strict=True))
        return {layer: found[layer].float().cpu().numpy() for layer in self.layers}


def _whole_float32() -> AbstractContextManager[None]:
    """Convolutions in float32: torch's default on recent GPUs, TensorFloat-32, keeps 10 bits of what is multiplied."""
    now = torch.backends.cudnn
    flags: AbstractContextManager[None] = now.flags(
        enabled=now.enabled, benchmark=now.benchmark, deterministic=now.deterministic, allow_tf32=False
    )
    return flags


def _network(name: str, facts: ExtractorFacts, weights: Path | None, wanted: Sequence[str]) -> nn.Module:
    path = None if weights is None else str(weights)
    try:
        net: nn.Module = create_feature_extractor(
            facts.registered, beside_spatial(wanted), cuda=False, feature_extractor_weights_path=path, verbose=False
        )
    except RuntimeError as error:
        raise EncoderError("weights", f"'{path}' does not fit '{name}': {one_line(error)}") from None
    return SpatialInception(net) if SPATIAL in wanted else net


def _weights_file(name: str, facts: ExtractorFacts, weights: str | None) -> Path | None:
    """The file to load, checked; None if the weights come from a package, from timm's hub or from nowhere."""
    if weights is None:
        path = None if facts.encoder else _inception_file(facts.sha256)
    elif not facts.sha256:
        raise EncoderError("weights", f"the weights of {name} are not had from a file; leave weights out")
    else:
        path = Path(weights)
        if not path.is_file():
            raise EncoderError("weights", f"no file '{weights}'")
    if path is not None:
        _require_published(path, name, facts.sha256)
        if not facts.encoder:
            _require_plain_tensors(path)
    return path


def _inception_file(sha256: str) -> Path:
    """torch-fidelity's file in torch's cache, fetched if it is not there."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(URL_INCEPTION_V3).name
    try:
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), hash_prefix=sha256, progress=False)
    except (OSError, RuntimeError) as error:
        message = "Inception's weights are not on this machine and cannot be fetched; give weights: FILE, or name:"
        raise EncoderError("weights", f"{message} efficientnet_lite0, which is not FID ({one_line(error)})") from None
    return path


def _require_plain_tensors(path: Path) -> None:
    """torch-fidelity unpickles the file, which may run code in it: torch's restricted reader must accept the file first."""
    try:
        torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise anything
        raise EncoderError(
            "weights", f"'{path}' is no file of tensors, or damaged; get it anew ({one_line(error)})"
        ) from None


def _require_published(path: Path, name: str, sha256: str) -> None:
    found, note = file_digest(path), Path(f"{path}{VOUCHED}")
    vouched = note.read_text(encoding="utf-8", errors="replace").split()[:1] if note.is_file() else []
    if found != sha256 and vouched != [found]:
        seen = f"its SHA-256 begins with {found[:_PREFIX]}, not {sha256[:_PREFIX]}"
        allowed = f"get that file, or vouch for this one: sha256sum FILE > FILE{VOUCHED}"
        raise EncoderError("weights", f"'{path}' is not the published file of '{name}': {seen}; {allowed}")


def _origin(facts: ExtractorFacts, weights: Path | None) -> str:
    if weights is not None:
        return file_digest(weights)
    encoder = facts_of(facts.encoder or "")
    assert encoder is not None  # only encoders' networks have weights without a file
    return f"{encoder.weights}:{encoder.timm_name}"
