"""From a run back to SimpleTuner: its regularizers as SimpleTuner's `crepa_*`, `urepa_*`, `irepa_*` and other keys."""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from repa_lab.align.methods import CREPASettings, LayerSyncSettings, SelfTranscendenceSettings
from repa_lab.align.settings import (
    CosineTargetSettings,
    RegularizerSettings,
    REPASettings,
    ScheduleSettings,
    UREPASettings,
)
from repa_lab.bridge import simpletuner
from repa_lab.bridge.simpletuner import Prefix
from repa_lab.encoders.registry import input_size
from repa_lab.errors import shortened
from repa_lab.models.families import FAMILIES
from repa_lab.models.family import Family, shape_of
from repa_lab.spec.schema import RunConfig

Limits = dict[str, tuple[bool, str]]  # by field: whether its value is beyond SimpleTuner, and why one would be

_KERNELS = (1, 3, 5, 7)
_KINDS = (REPASettings, UREPASettings, CREPASettings, LayerSyncSettings, SelfTranscendenceSettings)
_MIN_POWER = 0.1
_MIN_TAU = 0.01
_MIN_IMAGE_SIZE = 64
_MANIFOLD = "it compares the tokens of an image, by the mean of squares"
# Fields whose keys are left out where they cannot be expressed: SimpleTuner would take the value for something else.
_LEFT_OUT = ("spatial_norm", "encoder.name")


@dataclass(frozen=True)
class Exported:
    """Keys and values for SimpleTuner's config, and the settings that it cannot express, a line each."""

    settings: dict[str, Any]
    lost: tuple[str, ...]


def export_settings(config: RunConfig) -> Exported:
    """Write a run's regularizers as SimpleTuner's keys, those at SimpleTuner's defaults included."""
    family = FAMILIES[config.model.family]
    prefix: Prefix = "crepa" if family.kind == "transformer" else "urepa"
    exported, lost, kinds = {f"{prefix}_enabled": False}, list[str](), set[str]()
    for path, settings in config.regularizer_paths:
        if type(settings) not in _KINDS:
            lost.append(f"{path}.type: {settings.type} is not one of SimpleTuner's")
            continue
        kind = prefix if isinstance(settings, CosineTargetSettings) else settings.type
        if kind in kinds:
            lost.append(f"{path}.type: {settings.type} is there already, and SimpleTuner has one of the kind")
            continue
        kinds.add(kind)
        if isinstance(settings, CosineTargetSettings):
            member = _aligned(path, settings, config, family, prefix)
        else:
            member = _added(path, settings, config, family)
        exported |= member.settings
        lost += member.lost
    return Exported(exported, tuple(lost))


def _aligned(
    path: str, regularizer: CosineTargetSettings, config: RunConfig, family: Family, prefix: Prefix
) -> Exported:
    """Return the keys of a regularizer that aligns with an encoder."""
    encoder, side = regularizer.encoders[0], config.data.side
    image_size = input_size(simpletuner.encoder_stride(encoder.name), (side, side), encoder.image_size)[0]
    block = shape_of(family, config.model.size).block if regularizer.block_index is None else regularizer.block_index
    encoder = encoder.model_copy(update={"image_size": image_size})
    settings = regularizer.model_copy(update={"encoder": encoder, "block_index": block})
    limits = _limits(settings, config, family)
    lost = _lost(path, settings, limits)
    if others := [other.name for other in regularizer.encoders[1:]]:
        lost.append(f"{path}.encoder: SimpleTuner has one; left out: {', '.join(others)}")
    is_irepa = settings.projector.type == "conv"
    exported: dict[str, Any] = {f"{prefix}_enabled": True} | ({"irepa_enabled": True} if is_irepa else {})
    frames = simpletuner.FRAMES if isinstance(settings, CREPASettings) else ()
    if family.is_video and not frames:  # SimpleTuner takes neighbours by default
        exported |= {"crepa_adjacent_distance": 0}
    for key in (*simpletuner.KEYS[prefix], *frames, *(simpletuner.IREPA if is_irepa else ())):
        section, _, name = key.field.partition(".")
        if section == "regularizer" and not (name in _LEFT_OUT and limits[name][0]):
            value = attrgetter(name)(settings)
            if value is not None or key.default is not None:
                exported[key.name] = key.write(value)
    return Exported(exported, tuple(lost))


def _added(path: str, regularizer: RegularizerSettings, config: RunConfig, family: Family) -> Exported:
    """Return the keys of LayerSync or Self-Transcendence, which SimpleTuner adds to any other."""
    shape = shape_of(family, config.model.size)
    settings = regularizer.resolved(shape.block, config.train.steps, shape.depth)
    until_stop = settings.schedule.model_copy(update={"cutoff_step": None})
    values = {
        key.name: key.write(attrgetter(key.field.partition(".")[2])(settings))
        for key in simpletuner.ADDED[settings.type].keys
    }
    if isinstance(settings, SelfTranscendenceSettings):
        limits = {
            "weight": (settings.weight == 0, "it refuses 0: leave the method out"),
            "schedule": (until_stop != ScheduleSettings(), "its weight is constant until a step"),
            "guidance": (settings.guidance < 1, "it offers 1 and more"),
            "low": (settings.low == settings.high, "its least time is below its largest"),
            "loss": (settings.loss != "mse", "it has the mean squared error"),
            "weights": (settings.weights is not None, "its teacher is the model before the first step"),
            "projector.type": (settings.projector.type != "mlp", "it has three layers with SiLU"),
        }
        own = {name.removeprefix(simpletuner.ADDED[settings.type].prefix): value for name, value in values.items()}
        values = {"distillation_method": settings.type, "distillation_config": {"stage": "self", **own}}
    else:
        limits = {
            "weight": (settings.weight == 0, "it takes 0 for 0.2"),
            "schedule": (settings.schedule != ScheduleSettings(), "its weight is constant"),
        }
        values = {"layersync_enabled": True, **values}
    return Exported(values, tuple(_lost(path, settings, limits)))


def _lost(path: str, settings: RegularizerSettings, limits: Limits) -> list[str]:
    """Return a line for every field whose value is beyond SimpleTuner."""
    values = {name: attrgetter(name)(settings) for name, (is_beyond, _) in limits.items() if is_beyond}
    texts = {name: value if isinstance(value, str) else shortened(value) for name, value in values.items()}
    return [f"{path}.{name}: {text} cannot be expressed: {limits[name][1]}" for name, text in texts.items()]


def _limits(settings: CosineTargetSettings, config: RunConfig, family: Family) -> Limits:
    """Return what SimpleTuner cannot express of a regularizer that aligns with an encoder."""
    encoder, schedule, kernel = settings.encoders[0], settings.schedule, settings.projector.kernel
    is_conv, threshold = settings.projector.type == "conv", schedule.similarity_threshold
    grids = (config.data.side, encoder.name, encoder.image_size or 0, config.data.vae is not None)
    shrinks = simpletuner.resample_side(family, config.model.size, *grids) if settings.spatial_align else None
    limits = {
        "projector.type": (settings.projector.type == "mlp", "it has LayerNorm + Linear, or iREPA's convolution"),
        "projector.kernel": (is_conv and kernel not in _KERNELS, f"it offers {', '.join(map(str, _KERNELS))}"),
        "spatial_norm": (
            is_conv != (settings.spatial_norm is not None),
            "its iREPA is the convolution with the normalisation, or neither of them",
        ),
        "resample.side": (shrinks not in (None, settings.resample.side), "it shrinks the larger grid, here the other"),
        "resample.when": (bool(shrinks) and settings.resample.when == "before", "it resamples after the projector"),
        "encoder.name": (encoder.name not in simpletuner.HUB_ENCODERS, "it loads DINOv2 from torch hub"),
        "encoder.weights": (encoder.weights is not None, "it loads its encoder from torch hub, not from a file"),
        "encoder.standardize": (encoder.standardize, "it takes the features as they are"),
        "encoder.pixels": (encoder.pixels == "image", "its encoder looks at decoded latents"),
        "encoder.tae": (
            encoder.tae not in (None, simpletuner.TINY_AUTOENCODERS.get(family.name)),
            "it has one of its own for every family",
        ),
        "encoder.image_size": ((encoder.image_size or 0) < _MIN_IMAGE_SIZE, f"it offers {_MIN_IMAGE_SIZE} and more"),
        "schedule.power": (
            schedule.type == "polynomial" and schedule.power < _MIN_POWER,
            f"it offers {_MIN_POWER} and more, and takes 0 for 1.0",
        ),
        "schedule.similarity_threshold": (threshold is not None and threshold < 0, "it offers 0 to 1"),
        "schedule.similarity_min_count": (
            threshold is not None and schedule.similarity_min_count != 1,
            "it judges from the first step on",
        ),
        "schedule.probe_every": (
            threshold is not None and schedule.threshold_mode == "recoverable" and schedule.probe_every != 1,
            "it looks at every step",
        ),
    }
    if isinstance(settings, REPASettings):
        limits |= {"loss": (settings.loss != "cosine", "SimpleTuner has the cosine alone")}
    if isinstance(settings, CREPASettings):
        limits |= {
            "tau": (settings.tau < _MIN_TAU, f"it offers {_MIN_TAU} and more"),
            "cumulative": (settings.cumulative, "it documents crepa_cumulative_neighbors, and its parser refuses it"),
        }
    if isinstance(settings, UREPASettings):
        manifold = settings.manifold
        limits |= {
            "manifold_weight": (settings.manifold_weight == 0, "it takes 0 for 3.0; 1e-9 is as good as 0"),
            "manifold.scope": (manifold.scope != "intra", _MANIFOLD),
            "manifold.reduction": (manifold.reduction != "mean", _MANIFOLD),
            "manifold.distance": (manifold.distance != "l2", _MANIFOLD),
            "spatial_align": (not settings.spatial_align, "its U-REPA always aligns in space"),
        }
    return limits
