"""From a run back to SimpleTuner: its regularizer as SimpleTuner's `crepa_*`, `urepa_*` and `irepa_*` keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from repa_lab.align.settings import EncoderSettings, REPASettings, UREPASettings
from repa_lab.bridge.simpletuner import (
    HUB_ENCODERS,
    IREPA,
    KEYS,
    TINY_AUTOENCODERS,
    Prefix,
    encoder_grid,
    encoder_pixels,
    shrinking_side,
    student_grid,
)
from repa_lab.models.families import FAMILIES
from repa_lab.models.family import Family
from repa_lab.spec.schema import RunConfig

_KERNELS = (1, 3, 5, 7)
_MIN_POWER = 0.1
_MIN_IMAGE_SIZE = 64
# Fields of the regularizer that SimpleTuner cannot always express, with the reason; see `_is_beyond`.
LIMITS: Mapping[str, str] = {
    "loss": "SimpleTuner has the cosine alone",
    "projector.type": "it has LayerNorm + Linear, or iREPA's convolution",
    "projector.kernel": f"it offers {', '.join(map(str, _KERNELS))}",
    "spatial_norm": "its iREPA is the convolution with the normalisation, or neither of them",
    "manifold_weight": "it takes 0 for 3.0; 1e-9 is as good as 0",
    "manifold": "it compares the tokens of an image, by the mean of squares",
    "spatial_align": "its U-REPA always aligns in space",
    "resample.side": "it shrinks the larger grid, here the other",
    "resample.when": "it resamples after the projector",
    "encoder": "it has one; the first is written",
    "encoder.name": "it loads DINOv2 from torch hub; without the key it would take dinov2_vitg14",
    "encoder.weights": "it loads its encoder from torch hub, not from a file",
    "encoder.standardize": "it takes the features as they are",
    "encoder.pixels": "its encoder looks at decoded latents",
    "encoder.tae": "it has one of its own for every family",
    "encoder.image_size": f"it offers {_MIN_IMAGE_SIZE} and more",
    "schedule.power": f"it offers {_MIN_POWER} and more, and takes 0 for 1.0",
    "schedule.similarity_threshold": "it offers 0 to 1",
    "schedule.similarity_min_count": "it judges from the first step on",
    "schedule.probe_every": "it looks at every step",
}
# Fields whose keys are left out beyond the limit, because SimpleTuner would take the value for something else.
_HIDDEN = ("spatial_norm", "encoder.name")


@dataclass(frozen=True)
class Exported:
    """Keys and values for SimpleTuner's config, and the settings that it cannot express, a line each."""

    settings: dict[str, Any]
    lost: tuple[str, ...]


@dataclass(frozen=True)
class _Run:
    """A run's regularizer, its first encoder, its family and size, and its images or latents."""

    regularizer: REPASettings
    encoder: EncoderSettings
    family: Family
    size: str | None
    pixels: int
    latents: bool

    @property
    def image_size(self) -> int:
        """Side of the encoder's input in pixels, by the papers' rule where it is not given."""
        return encoder_pixels(self.encoder.name, self.encoder.image_size, self.pixels)

    def value(self, path: str) -> Any:
        """Return the value at a dotted path of the regularizer."""
        value: Any = self.regularizer
        for name in path.split("."):
            value = self.encoder if name == "encoder" else getattr(value, name)
        return value


def export_settings(config: RunConfig) -> Exported:
    """Write a run's regularizer as SimpleTuner's keys, those at SimpleTuner's defaults included.

    Args:
        config: the run's settings.
    """
    family, regularizer = FAMILIES[config.model.family], config.regularizer
    prefix: Prefix = "crepa" if family.kind == "transformer" else "urepa"
    if regularizer.type == "none":
        return Exported({f"{prefix}_enabled": False}, ())
    if not isinstance(regularizer, REPASettings):
        unknown = f"regularizer.type: {regularizer.type} is not one of SimpleTuner's"
        return Exported({f"{prefix}_enabled": False}, (unknown,))
    latents = config.data.vae is not None
    run = _Run(regularizer, regularizer.encoders[0], family, config.model.size, config.data.side, latents)
    beyond = [path for path, is_beyond in _is_beyond(run).items() if is_beyond]
    lost = [_sentence(run, path) for path in LIMITS if path in beyond]
    if run.encoder.image_size is None:
        resolved = f"null is {run.image_size} for images of {run.pixels} px, and is written as a number"
        lost.append(f"regularizer.encoder.image_size: {resolved}")
    hidden = {path for path in beyond if path in _HIDDEN}
    return Exported({f"{prefix}_enabled": True, **_settings(run, prefix, hidden)}, tuple(lost))


def _is_beyond(run: _Run) -> dict[str, bool]:
    """Return, for the fields of `LIMITS` that the regularizer has, whether SimpleTuner cannot express the value."""
    settings, encoder, schedule = run.regularizer, run.encoder, run.regularizer.schedule
    is_conv, kernel = settings.projector.type == "conv", settings.projector.kernel
    student = student_grid(run.family, run.size, run.pixels, run.latents)
    grid = encoder_grid(encoder.name, run.image_size)
    resamples = settings.spatial_align and student != grid
    threshold, is_permanent = schedule.similarity_threshold, schedule.threshold_mode == "permanent"
    judges = threshold is not None
    beyond = {
        "loss": settings.loss != "cosine",
        "projector.type": settings.projector.type == "mlp",
        "projector.kernel": is_conv and kernel not in _KERNELS,
        "spatial_norm": is_conv != (settings.spatial_norm is not None),
        "resample.side": resamples and settings.resample.side != shrinking_side(student, grid),
        "resample.when": resamples and settings.resample.when != "after",
        "encoder": len(settings.encoders) > 1,
        "encoder.name": encoder.name not in HUB_ENCODERS,
        "encoder.weights": encoder.weights is not None,
        "encoder.standardize": encoder.standardize,
        "encoder.pixels": encoder.pixels == "image",
        "encoder.tae": encoder.tae not in (None, TINY_AUTOENCODERS.get(run.family.name)),
        "encoder.image_size": run.image_size < _MIN_IMAGE_SIZE,
        "schedule.power": schedule.type == "polynomial" and schedule.power < _MIN_POWER,
        "schedule.similarity_threshold": threshold is not None and threshold < 0,
        "schedule.similarity_min_count": judges and schedule.similarity_min_count != 1,
        "schedule.probe_every": judges and not is_permanent and schedule.probe_every != 1,
    }
    if isinstance(settings, UREPASettings):
        manifold = settings.manifold
        beyond["manifold_weight"] = settings.manifold_weight == 0
        beyond["manifold"] = (manifold.scope, manifold.reduction, manifold.distance) != ("intra", "mean", "l2")
        beyond["spatial_align"] = not settings.spatial_align
    return beyond


def _settings(run: _Run, prefix: Prefix, hidden: set[str]) -> dict[str, Any]:
    block = run.regularizer.block_index
    block = run.family.shapes[run.size or ""].block if block is None else block
    resolved = {"encoder.image_size": run.image_size, "block_index": block}
    is_irepa = run.regularizer.projector.type == "conv"
    settings: dict[str, Any] = {}
    for key in (*KEYS[prefix], *(IREPA if is_irepa else ())):
        section, _, path = key.field.partition(".")
        if is_irepa and key is IREPA[0]:
            settings["irepa_enabled"] = True
        if section != "regularizer" or path in hidden:
            continue
        value = resolved.get(path, run.value(path))
        if value is not None or key.default is not None:
            settings[key.name] = key.write(value)
    return settings


def _sentence(run: _Run, path: str) -> str:
    value = [encoder.name for encoder in run.regularizer.encoders] if path == "encoder" else run.value(path)
    if hasattr(value, "model_dump"):
        value = ", ".join(f"{name}: {inner}" for name, inner in value.model_dump().items())
    shown = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return f"regularizer.{path}: {shown} cannot be expressed: {LIMITS[path]}"
