"""The folder of a released pipeline, before anything of it is loaded: where it is, and whether it fits the family.

Imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from repa_lab.errors import InputError
from repa_lab.models.family import Family, network_of, pipeline_of

INDEX = "model_index.json"
VAE, SCHEDULER = "vae", "scheduler"
FLOW_PREDICTION = "flow_prediction"
PREDICTIONS = ("epsilon", "v_prediction", "sample")
# The fields of a VAE's config by which pipelines scale latents before they decode them.
SCALING = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")


class PretrainedError(InputError):
    """A pipeline cannot be loaded or does not fit the family; the setting at fault is ``model.pretrained``."""


def locate(place: str, revision: str | None = None) -> Path:
    """Return the folder of a pipeline: ``place`` itself if it is a folder, else that of the hub, downloaded if need be.

    If it is in neither and not in the hub's local cache, a PretrainedError is raised.
    """
    if Path(place).is_dir():
        return Path(place)
    from diffusers import DiffusionPipeline

    try:
        return Path(DiffusionPipeline.download(place, revision=revision))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0].partition(" (")[0]  # the rest is meant for programmers
        message = f"'{place}' is no folder and not in the local cache; pass a folder or go online"
        raise PretrainedError(f"{message} ({reason})") from None


def problem_with(folder: Path, family: Family) -> str | None:
    """Return why a folder cannot be used as a pipeline of this family, or None."""
    network, pipeline = network_of(family), pipeline_of(family)
    index = read_json(folder / INDEX)
    if index is None:
        return f"'{folder}' is no pipeline of diffusers: it has no readable {INDEX}"
    pipeline_class = index.get("_class_name")
    complete = f"save a complete {pipeline_class} there first"
    if pipeline_class not in pipeline.classes:
        return f"'{folder}' is a {pipeline_class}, not of family {family.name}: {' or '.join(pipeline.classes)}"
    missing = sorted(pipeline.tiny.keys() - set(components(folder)))
    if missing:
        return f"'{folder}' lacks {', '.join(missing)}: {complete}"
    config = read_json(folder / family.kind / "config.json")
    if config is None:
        return f"'{folder}' has no readable {family.kind}/config.json"
    model = config.get("_class_name")
    twins = [name for name in components(folder) if index[name][1] == network.model and name != family.kind]
    if twins:
        both = " and ".join((family.kind, *twins))
        return f"'{folder}' has two denoisers, {both}, each for a part of the noise levels: {family.name} trains one"
    if model != network.model:
        return f"the {family.kind} in '{folder}' is a {model}, and {family.name} trains a {network.model}"
    if not any(path.suffix in (".safetensors", ".bin") for path in (folder / family.kind).iterdir()):
        return f"'{folder}' has no weights in {family.kind}/: {complete}"
    absent = [name for name in sorted(pipeline.tiny) if not (folder / name).is_dir()]
    if absent:
        return f"'{folder}' has no folder {absent[0]}/: {complete}"
    return noise_problem(read_json(folder / SCHEDULER / "scheduler_config.json") or {})


def noise_problem(scheduler: Mapping[str, Any]) -> str | None:
    """Return why the noise of a scheduler, by its ``scheduler_config.json``, is not known, or None."""
    prediction = scheduler.get("prediction_type", "epsilon")
    if is_flow(scheduler):
        return None
    if "beta_start" not in scheduler:  # DDPM would use its defaults, and the noise of an EDM scheduler differs
        return f"the noise of a scheduler of class {scheduler.get('_class_name')} is not known"
    if prediction not in PREDICTIONS:
        return f"prediction_type '{prediction}' is not known; known: {', '.join(PREDICTIONS)}"
    return None


def is_flow(scheduler: Mapping[str, Any]) -> bool:
    """Return whether a scheduler's noise is that of flow matching."""
    return "FlowMatch" in str(scheduler.get("_class_name")) or scheduler.get("prediction_type") == FLOW_PREDICTION


def depth_of(folder: Path, family: Family) -> int | None:
    """Return the number of blocks of the denoiser in a pipeline's folder; None if its config does not say."""
    config = read_json(folder / family.kind / "config.json") or {}
    counts = [count for name in network_of(family).depths if isinstance(count := config.get(name), int)]
    return sum(counts) if len(counts) == len(network_of(family).depths) else None


def num_classes(folder: Path, family: Family) -> int | None:
    """Return the number of classes of a pipeline's denoiser; None if it takes texts or its config cannot be read."""
    if family.pipeline is None or family.pipeline.num_classes is None:
        return None
    config = read_json(folder / family.kind / "config.json")
    return None if config is None else family.pipeline.num_classes(SimpleNamespace(**config))


def class_problem(classes: int, known: int) -> str:
    """Return the message that images of so many classes cannot train a denoiser of fewer."""
    return f"the images have {classes} classes, and the pretrained model knows {known}"


def components(folder: Path) -> tuple[str, ...]:
    """Return the names of the components that a pipeline has."""
    index = read_json(folder / INDEX) or {}
    return tuple(name for name, value in index.items() if _is_component(value) and value[0] is not None)


def settings(folder: Path) -> dict[str, Any]:
    """Return a pipeline's settings beside its components, for example which layers of a text encoder it reads."""
    index = read_json(folder / INDEX) or {}
    return {name: value for name, value in index.items() if not (name.startswith("_") or _is_component(value))}


def _is_component(value: Any) -> bool:
    """Return whether an entry of the index is a library and a class, or two nulls for an absent component."""
    return isinstance(value, list) and len(value) == 2 and all(part is None or isinstance(part, str) for part in value)


def text_components(folder: Path) -> tuple[str, ...]:
    """Return the names of the components that encode texts."""
    return tuple(name for name in components(folder) if name.startswith(("text_encoder", "tokenizer")))


def read_json(path: Path) -> dict[str, Any] | None:
    """Read a JSON object from a file; None if that fails."""
    try:
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None
