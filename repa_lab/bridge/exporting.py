"""From a run back to SimpleTuner: its regularizer as SimpleTuner's `crepa_*`, `urepa_*` and `irepa_*` keys."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from repa_lab.align.settings import EncoderSettings, REPASettings
from repa_lab.bridge.grids import encoder_grid, encoder_pixels, shrinking_side, student_grid
from repa_lab.bridge.keys import (
    HUB_ENCODERS,
    IREPA,
    KEYS,
    TINY_AUTOENCODERS,
    Key,
    Prefix,
)
from repa_lab.models.families import FAMILIES
from repa_lab.models.family import Family
from repa_lab.spec.schema import RunConfig

_KERNELS = (1, 3, 5, 7)
_LEAST_POWER = 0.1
_LEAST_IMAGE = 64


@dataclass(frozen=True)
class Exported:
    """Keys and values for SimpleTuner's config, and the settings that it cannot express, a line each."""

    settings: dict[str, Any]
    lost: tuple[str, ...]


@dataclass(frozen=True)
class _Run:
    """A run's regularizer with its one encoder and what the family decides."""

    regularizer: REPASettings
    encoder: EncoderSettings
    family: Family
    size: str | None
    pixels: int
    latents: bool

    @property
    def image_size(self) -> int:
        """Pixels along each side of what the encoder sees, by the papers' rule where it is not given."""
        return encoder_pixels(self.encoder.name, self.encoder.image_size, self.pixels)

    @property
    def grids(self) -> tuple[int, int]:
        """Tokens along each side of the student and of the encoder."""
        student = student_grid(self.family, self.size, self.pixels, self.latents)
        return student, encoder_grid(self.encoder.name, self.image_size)

    @property
    def resamples(self) -> bool:
        """Whether one grid is brought to the other."""
        return self.regularizer.spatial_align and self.grids[0] != self.grids[1]

    @property
    def judges_similarity(self) -> bool:
        """Whether a similarity can end the regularizer."""
        return self.regularizer.schedule.similarity_threshold is not None

    def at(self, path: str) -> Any:
        """The value at a dotted path of the regularizer."""
        value: Any = self.regularizer
        for step in path.split("."):
            value = self.encoder if step == "encoder" else getattr(value, step)
        return value


@dataclass(frozen=True)
class Limit:
    """Something SimpleTuner cannot express: the field, when it can, and why not otherwise.

    ``hides`` leaves the key out, since SimpleTuner would take the value for something else; ``prefix`` is that of the
    regularizer that has the limit, None for both.
    """

    path: str
    fits: Callable[[_Run], bool]
    why: str
    prefix: Prefix | None = None
    hides: bool = False


LIMITS = (
    Limit("loss", lambda run: run.at("loss") == "cosine", "SimpleTuner has the cosine alone"),
    Limit(
        "projector.type",
        lambda run: run.at("projector.type") != "mlp",
        "it has LayerNorm + Linear, or iREPA's convolution",
    ),
    Limit(
        "projector.kernel",
        lambda run: run.at("projector.type") != "conv" or run.at("projector.kernel") in _KERNELS,
        f"it offers {', '.join(map(str, _KERNELS))}",
    ),
    Limit(
        "spatial_norm",
        lambda run: (run.at("spatial_norm") is not None) == (run.at("projector.type") == "conv"),
        "its iREPA is the convolution with the normalisation, or neither of them",
        hides=True,
    ),
    Limit(
        "manifold_weight",
        lambda run: run.at("manifold_weight") > 0,
        "it takes 0 for 3.0; 1e-9 is as good as 0",
        "urepa",
    ),
    Limit(
        "manifold",
        lambda run: (
            [run.at(f"manifold.{name}") for name in ("scope", "reduction", "distance")] == ["intra", "mean", "l2"]
        ),
        "it compares the tokens of an image, by the mean of squares",
        "urepa",
    ),
    Limit("spatial_align", lambda run: run.regularizer.spatial_align, "its U-REPA always aligns in space", "urepa"),
    Limit(
        "resample.side",
        lambda run: not run.resamples or run.at("resample.side") == shrinking_side(*run.grids),
        "it shrinks the larger grid, here the other",
    ),
    Limit(
        "resample.when",
        lambda run: not run.resamples or run.at("resample.when") == "after",
        "it resamples after the projector",
    ),
    Limit("encoder", lambda run: len(run.regularizer.encoders) == 1, "it has one; the first is written"),
    Limit(
        "encoder.name",
        lambda run: run.encoder.name in HUB_ENCODERS,
        "it loads DINOv2 from torch hub; without the key it would take dinov2_vitg14",
        hides=True,
    ),
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
    Limit("encoder.image_size", lambda run: run.image_size >= _LEAST_IMAGE, f"it offers {_LEAST_IMAGE} and more"),
    Limit(
        "schedule.power",
        lambda run: run.at("schedule.type") != "polynomial" or run.at("schedule.power") >= _LEAST_POWER,
        f"it offers {_LEAST_POWER} and more, and takes 0 for 1.0",
    ),
    Limit(
        "schedule.similarity_threshold",
        lambda run: not run.judges_similarity or run.at("schedule.similarity_threshold") >= 0,
        "it offers 0 to 1",
    ),
    Limit(
        "schedule.similarity_min_count",
        lambda run: not run.judges_similarity or run.at("schedule.similarity_min_count") == 1,
        "it judges from the first step on",
    ),
    Limit(
        "schedule.probe_every",
        lambda run: (
            not run.judges_similarity
            or run.at("schedule.threshold_mode") == "permanent"
            or run.at("schedule.probe_every") == 1
        ),
        "it looks at every step",
    ),
)


def export_settings(config: RunConfig) -> Exported:
    """Write a run's regularizer for SimpleTuner; every key is written, also at its default.

    Args:
        config: the run's settings.
    """
    family = FAMILIES[config.model.family]
    regularizer = config.regularizer
    prefix: Prefix = "crepa" if family.kind == "transformer" else "urepa"
    if regularizer.type == "none":
        return Exported({f"{prefix}_enabled": False}, ())
    if not isinstance(regularizer, REPASettings):
        return Exported(
            {f"{prefix}_enabled": False}, (f"regularizer.type: {regularizer.type} is not one of that trainer's",)
        )
    latents = config.data.vae is not None
    run = _Run(regularizer, regularizer.encoders[0], family, config.model.size, config.data.side, latents)
    lost = [_sentence(run, limit) for limit in LIMITS if limit.prefix in (None, prefix) and not limit.fits(run)]
    hidden = {limit.path for limit in LIMITS if limit.hides and not limit.fits(run)}
    return Exported(dict(_settings(run, prefix, hidden)), (*lost, *_resolved(run)))


def _settings(run: _Run, prefix: Prefix, hidden: set[str]) -> Iterator[tuple[str, Any]]:
    yield f"{prefix}_enabled", True
    yield from _keys(run, KEYS[prefix], hidden)
    if run.regularizer.projector.type == "conv":
        yield "irepa_enabled", True
        yield from _keys(run, IREPA, hidden)


def _keys(run: _Run, keys: tuple[Key, ...], hidden: set[str]) -> Iterator[tuple[str, Any]]:
    known: Mapping[str, Any] = {"encoder.image_size": run.image_size, "block_index": _block(run)}
    for key in keys:
        section, _, path = key.field.partition(".")
        if section != "regularizer" or path in hidden:
            continue
        value = known.get(path, run.at(path))
        if value is not None or key.default is not None:
            yield key.name, key.write(value)


def _block(run: _Run) -> Any:
    block = run.regularizer.block_index
    return run.family.shapes[run.size or ""].block if block is None else block


def _sentence(run: _Run, limit: Limit) -> str:
    value = [encoder.name for encoder in run.regularizer.encoders] if limit.path == "encoder" else run.at(limit.path)
    return f"regularizer.{limit.path}: {_shown(value)} cannot be expressed: {limit.why}"


def _shown(value: Any) -> str:
    if hasattr(value, "model_dump"):
        value = ", ".join(f"{name}: {inner}" for name, inner in value.model_dump().items())
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _resolved(run: _Run) -> Iterator[str]:
    """What is written as a number that holds here alone."""
    if run.encoder.image_size is None:
        message = f"null is {run.image_size} for images of {run.pixels} px, and is written so"
        yield f"regularizer.encoder.image_size: {message}"
