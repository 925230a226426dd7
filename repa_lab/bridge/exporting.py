"""From a run back to SimpleTuner: its regularizer as SimpleTuner's `crepa_*`, `urepa_*` and `irepa_*` keys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from repa_lab.align.settings import EncoderSettings, REPASettings
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

    @property
    def grids(self) -> tuple[int, int]:
        """Tokens along each side of the student and of the encoder."""
        student = student_grid(self.family, self.size, self.pixels, self.latents)
        return student, encoder_grid(self.encoder.name, self.image_size)

    @property
    def resamples(self) -> bool:
        """Whether one grid is resampled to the other."""
        return self.regularizer.spatial_align and self.grids[0] != self.grids[1]

    @property
    def judges_similarity(self) -> bool:
        """Whether the similarity can end the regularizer."""
        return self.regularizer.schedule.similarity_threshold is not None

    def value(self, path: str) -> Any:
        """Return the value at a dotted path of the regularizer."""
        value: Any = self.regularizer
        for name in path.split("."):
            value = self.encoder if name == "encoder" else getattr(value, name)
        return value


@dataclass(frozen=True)
class Limit:
    """A field that SimpleTuner cannot always express.

    Attributes:
        path: dotted path of the field in the regularizer.
        fits: whether SimpleTuner can express a run's value.
        reason: why it cannot otherwise.
        prefix: of the regularizer that has the limit; None for both.
        hides: whether to leave out the key, because SimpleTuner would take the value for something else.
    """

    path: str
    fits: Callable[[_Run], bool]
    reason: str
    prefix: Prefix | None = None
    hides: bool = False


def _manifold_fits(run: _Run) -> bool:
    names = ("scope", "reduction", "distance")
    return [run.value(f"manifold.{name}") for name in names] == ["intra", "mean", "l2"]


def _kernel_fits(run: _Run) -> bool:
    return bool(run.value("projector.type") != "conv" or run.value("projector.kernel") in _KERNELS)


def _spatial_norm_fits(run: _Run) -> bool:
    is_conv: bool = run.value("projector.type") == "conv"
    return is_conv == (run.value("spatial_norm") is not None)


def _side_fits(run: _Run) -> bool:
    return bool(not run.resamples or run.value("resample.side") == shrinking_side(*run.grids))


def _power_fits(run: _Run) -> bool:
    return bool(run.value("schedule.type") != "polynomial" or run.value("schedule.power") >= _MIN_POWER)


def _threshold_fits(run: _Run) -> bool:
    return bool(not run.judges_similarity or run.value("schedule.similarity_threshold") >= 0)


def _min_count_fits(run: _Run) -> bool:
    return not run.judges_similarity or run.value("schedule.similarity_min_count") == 1


def _probe_fits(run: _Run) -> bool:
    is_permanent = run.value("schedule.threshold_mode") == "permanent"
    return not run.judges_similarity or is_permanent or run.value("schedule.probe_every") == 1


_NO_MLP = "it has LayerNorm + Linear, or iREPA's convolution"
_ONE_IREPA = "its iREPA is the convolution with the normalisation, or neither of them"
_HUB_ONLY = "it loads DINOv2 from torch hub; without the key it would take dinov2_vitg14"
_SHRINKS = "it shrinks the larger grid, here the other"
LIMITS = (
    Limit("loss", lambda run: run.value("loss") == "cosine", "SimpleTuner has the cosine alone"),
    Limit("projector.type", lambda run: run.value("projector.type") != "mlp", _NO_MLP),
    Limit("projector.kernel", _kernel_fits, f"it offers {', '.join(map(str, _KERNELS))}"),
    Limit("spatial_norm", _spatial_norm_fits, _ONE_IREPA, hides=True),
    Limit(
        "manifold_weight",
        lambda run: run.value("manifold_weight") > 0,
        "it takes 0 for 3.0; 1e-9 is as good as 0",
        "urepa",
    ),
    Limit("manifold", _manifold_fits, "it compares the tokens of an image, by the mean of squares", "urepa"),
    Limit("spatial_align", lambda run: run.regularizer.spatial_align, "its U-REPA always aligns in space", "urepa"),
    Limit("resample.side", _side_fits, _SHRINKS),
    Limit(
        "resample.when",
        lambda run: not run.resamples or run.value("resample.when") == "after",
        "it resamples after the projector",
    ),
    Limit("encoder", lambda run: len(run.regularizer.encoders) == 1, "it has one; the first is written"),
    Limit("encoder.name", lambda run: run.encoder.name in HUB_ENCODERS, _HUB_ONLY, hides=True),
    Limit(
        "encoder.weights",
        lambda run: run.encoder.weights is None,
        "it loads its encoder from torch hub, not from a file",
    ),
    Limit("encoder.standardize", lambda run: not run.encoder.standardize, "it takes the features as they are"),
    Limit("encoder.pixels", lambda run: run.encoder.pixels != "image", "its encoder looks at decoded latents"),
    Limit(
        "encoder.tae",
        lambda run: run.encoder.tae in (None, TINY_AUTOENCODERS.get(run.family.name)),
        "it has one of its own for every family",
    ),
    Limit("encoder.image_size", lambda run: run.image_size >= _MIN_IMAGE_SIZE, f"it offers {_MIN_IMAGE_SIZE} and more"),
    Limit("schedule.power", _power_fits, f"it offers {_MIN_POWER} and more, and takes 0 for 1.0"),
    Limit("schedule.similarity_threshold", _threshold_fits, "it offers 0 to 1"),
    Limit("schedule.similarity_min_count", _min_count_fits, "it judges from the first step on"),
    Limit("schedule.probe_every", _probe_fits, "it looks at every step"),
)


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
        lost = f"regularizer.type: {regularizer.type} is not one of SimpleTuner's"
        return Exported({f"{prefix}_enabled": False}, (lost,))
    latents = config.data.vae is not None
    run = _Run(regularizer, regularizer.encoders[0], family, config.model.size, config.data.side, latents)
    broken = [limit for limit in LIMITS if limit.prefix in (None, prefix) and not limit.fits(run)]
    lost_lines = [_sentence(run, limit) for limit in broken]
    if run.encoder.image_size is None:
        resolved = f"null is {run.image_size} for images of {run.pixels} px, and is written as a number"
        lost_lines.append(f"regularizer.encoder.image_size: {resolved}")
    settings = {f"{prefix}_enabled": True, **_settings(run, prefix, broken)}
    return Exported(settings, tuple(lost_lines))


def _settings(run: _Run, prefix: Prefix, broken: list[Limit]) -> dict[str, Any]:
    hidden = {limit.path for limit in broken if limit.hides}
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


def _sentence(run: _Run, limit: Limit) -> str:
    value = [encoder.name for encoder in run.regularizer.encoders] if limit.path == "encoder" else run.value(limit.path)
    if hasattr(value, "model_dump"):
        value = ", ".join(f"{name}: {inner}" for name, inner in value.model_dump().items())
    shown = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return f"regularizer.{limit.path}: {shown} cannot be expressed: {limit.reason}"
