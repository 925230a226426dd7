"""A released pipeline's folder, before any of it is loaded: where it is, and whether it is the family's. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from repa_lab.models.facts import Family, network_of, pipeline_of

INDEX = "model_index.json"
VAE, SCHEDULER = "vae", "scheduler"
_TEXT = ("text_encoder", "tokenizer")
_WEIGHTS = (".safetensors", ".bin")
FLOW_PREDICTION = "flow_prediction"
PREDICTIONS = ("epsilon", "v_prediction", "sample")
SCALING = (
    "scaling_factor",
    "shift_factor",
    "latents_mean",
    "latents_std",
)  # of a VAE's config, read by pipelines that draw


class PretrainedError(ValueError):
    """A pretrained pipeline cannot be had, or is not what it is taken for; the setting at fault is ``model.pretrained``."""


def locate(place: str, revision: str | None = None) -> Path:
    """The folder of a pipeline: itself if it is a local one, else the hub's, downloaded if need be.

    Raises:
        PretrainedError: it is neither a folder nor a pipeline that the hub or its local cache has.
    """
    if Path(place).is_dir():
        return Path(place)
    from diffusers import DiffusionPipeline

    try:
        return Path(DiffusionPipeline.download(place, revision=revision))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0].partition(" (")[0]  # what follows speaks to diffusers' own callers
        message = f"'{place}' is no folder and not in the local cache; pass a folder or go online"
        raise PretrainedError(f"{message} ({reason})") from None


def problem_with(folder: Path, family: Family) -> str | None:
    """Why a folder cannot be used as a pipeline of this family, or None."""
    network, pipeline = network_of(family), pipeline_of(family)
    index = read_json(folder / INDEX)
    if index is None:
        return f"'{folder}' is no pipeline of diffusers: it has no readable {INDEX}"
    kind = index.get("_class_name")
    if kind not in pipeline.classes:
        return f"'{folder}' is a {kind}, not of family {family.name}: {' or '.join(pipeline.classes)}"
    missing = sorted(pipeline.tiny.keys() - set(components(folder)))
    if missing:
        return f"'{folder}' lacks {', '.join(missing)}: save a complete {kind} there first"
    config = read_json(folder / pipeline.denoiser / "config.json")
    if config is None:
        return f"'{folder}' has no readable {pipeline.denoiser}/config.json"
    if config.get("_class_name") != network.model:
        found = config.get("_class_name")
        return f"the {pipeline.denoiser} in '{folder}' is a {found}, and {family.name} trains a {network.model}"
    if not any(path.suffix in _WEIGHTS for path in (folder / pipeline.denoiser).iterdir()):
        return f"'{folder}' has no weights in {pipeline.denoiser}/: save a complete {kind} there first"
    absent = [name for name in sorted(pipeline.tiny) if not (folder / name).is_dir()]
    if absent:
        return f"'{folder}' has no folder {absent[0]}/: save a complete {kind} there first"
    return noise_problem(read_json(folder / SCHEDULER / "scheduler_config.json") or {})


def noise_problem(scheduler: Mapping[str, Any]) -> str | None:
    """Return why the noise of a scheduler, by its ``scheduler_config.json``, is not known, or None."""
    prediction = scheduler.get("prediction_type", "epsilon")
    if is_flow(scheduler):
        return None
    if "beta_start" not in scheduler:  # DDPM would take its own, and an EDM scheduler's noise is another
        return f"the noise of a scheduler of class {scheduler.get('_class_name')} is not known"
    if prediction not in PREDICTIONS:
        return f"prediction_type '{prediction}' is not known; known: {', '.join(PREDICTIONS)}"
    return None


def is_flow(scheduler: Mapping[str, Any]) -> bool:
    """Return whether a scheduler's noise is that of flow matching."""
    return "FlowMatch" in str(scheduler.get("_class_name")) or scheduler.get("prediction_type") == FLOW_PREDICTION


def depth_of(folder: Path, family: Family) -> int | None:
    """Return the number of blocks of the denoiser in a pipeline's folder; None where its config does not say."""
    config = read_json(folder / pipeline_of(family).denoiser / "config.json") or {}
    counts = [count for name in network_of(family).depths if isinstance(count := config.get(name), int)]
    return sum(counts) if len(counts) == len(network_of(family).depths) else None


def num_classes(folder: Path, family: Family) -> int | None:
    """Return the number of classes that a pipeline's denoiser knows; None where it is told texts or its config is not here."""
    if family.pipeline is None or family.pipeline.num_classes is None:
        return None
    config = read_json(folder / family.pipeline.denoiser / "config.json")
    return None if config is None else family.pipeline.num_classes(SimpleNamespace(**config))


def class_problem(classes: int, known: int) -> str:
    """Return why images of so many classes cannot train a denoiser that knows fewer."""
    return f"the images have {classes} classes, and the pretrained model knows {known}"


def components(folder: Path) -> tuple[str, ...]:
    """The names of a pipeline's components that it has."""
    index = read_json(folder / INDEX) or {}
    return tuple(name for name, value in index.items() if _is_component(value) and value[0] is not None)


def settings(folder: Path) -> dict[str, Any]:
    """Return a pipeline's settings beside its components, for example which layers of a text encoder it reads."""
    index = read_json(folder / INDEX) or {}
    return {name: value for name, value in index.items() if not (name.startswith("_") or _is_component(value))}


def _is_component(value: Any) -> bool:
    """Whether an entry of a pipeline's index is a library and a class, or two nulls where the component is absent."""
    return isinstance(value, list) and len(value) == 2 and all(part is None or isinstance(part, str) for part in value)


def text_components(folder: Path) -> tuple[str, ...]:
    """Those of a pipeline's components that encode texts."""
    return tuple(name for name in components(folder) if name.startswith(_TEXT))


def read_json(path: Path) -> dict[str, Any] | None:
    """A file of JSON; None if there is none that can be read."""
    try:
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None
