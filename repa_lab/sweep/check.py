"""What a spec says against what exists: families, blocks, grids, data, files. No torch, so that `plan` answers at once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from repa_lab.data.fingerprint import DataError, image_files
from repa_lab.encoders.registry import grid_problem, weights_problem
from repa_lab.models.facts import Family, Shape, UnknownFactError, shape_of
from repa_lab.models.families import TRAINABLE, family_facts
from repa_lab.runs.root import RESERVED
from repa_lab.spec import Arm, EncoderConfig, Experiment, Problem, SpecError
from repa_lab.spec.errors import Path_
from repa_lab.training.protocol import metric_name


def check(experiment: Experiment) -> None:
    """Refuse an experiment that cannot be right, before anything is created.

    Raises:
        SpecError: with every problem of every arm, each at the place that set the value.
    """
    problems = [problem for arm in experiment.arms for problem in _arm_problems(arm)]
    problems += _experiment_problems(experiment)
    if problems:
        raise SpecError(problems)


def blocked(arm: Arm) -> Problem | None:
    """Why an arm that is right cannot be trained here yet, or None."""
    name = arm.config.model.family
    if not family_facts(name).trainable:
        message = f"family '{name}' can be planned but not yet trained by this version (trainable: {', '.join(TRAINABLE)})"
        return arm.problem("model.family", message)
    if arm.config.data.source == "imagefolder" and arm.config.data.path is None:
        return arm.problem("data.path", "not set; give a folder of images with --set data.path=FOLDER")
    return None


def _arm_problems(arm: Arm) -> Iterator[Problem]:
    config = arm.config
    try:
        family = family_facts(config.model.family)
    except UnknownFactError as error:
        yield arm.problem("model.family", str(error))
        return
    try:
        shape = shape_of(family, config.model.size)
    except UnknownFactError as error:
        yield arm.problem("model.size", str(error) if config.model.size else f"{family.name} needs a size: {error}")
        return
    yield from _model_problems(arm, family, shape)
    yield from _regularizer_problems(arm, family, shape)
    yield from _data_problems(arm)
    yield from _file_problems(arm)


def _model_problems(arm: Arm, family: Family, shape: Shape) -> Iterator[Problem]:
    if family.from_scratch and arm.config.model.pretrained is not None:
        yield arm.problem("model.pretrained", f"{family.name} is trained from scratch: leave pretrained out")
    if family.from_scratch and arm.config.model.train == "lora":
        yield arm.problem("model.train", f"{family.name} is trained from scratch: train must be full")
    side = arm.config.data.side
    if family.from_scratch and arm.config.data.vae is None and side % shape.stride:
        place = "model.size" if arm.config.data.source == "digits" else "data.resolution"
        named = f"{family.name} {arm.config.model.size}"
        yield arm.problem(place, f"{side} px is not a multiple of {shape.stride}, the stride of {named}")


def _regularizer_problems(arm: Arm, family: Family, shape: Shape) -> Iterator[Problem]:
    chosen, regularizer = arm.config.regularizer.type, arm.config.regularizer
    if chosen not in ("none", family.regularizer):
        kind = "a UNet" if family.kind == "unet" else "a transformer"
        yield arm.problem("regularizer.type", f"{family.name} is {kind}: use {family.regularizer}, not {chosen}")
        return
    wanted = {"evaluate.block_index": arm.config.evaluate.block_index}
    if chosen != "none":
        wanted["regularizer.block_index"] = regularizer.block_index
    for path, block in wanted.items():
        if block is not None and (message := _block_problem(family, shape, block)):
            yield arm.problem(path, message)
    for path, encoder in arm.config.encoder_paths:
        yield from _encoder_problems(arm, path, encoder)


def _block_problem(family: Family, shape: Shape, block: int | str) -> str | None:
    if family.kind == "unet":
        return None if block == "mid" else f"{family.name} is tapped at its mid block: block_index must be mid, got {block}"
    if not isinstance(block, int) or block >= shape.depth:
        return f"{family.name} has {shape.depth} blocks: block_index must be 0 to {shape.depth - 1}, got {block}"
    return None


def _encoder_problems(arm: Arm, path: str, encoder: EncoderConfig) -> Iterator[Problem]:
    if message := grid_problem(encoder.name, encoder.image_size, arm.config.data.side):
        yield arm.problem(f"{path}.image_size", message)
    if message := weights_problem(encoder.name, encoder.weights):
        yield arm.problem(f"{path}.weights", message)
    if encoder.pixels != "image" and arm.config.data.vae is None:
        message = f"{encoder.pixels} decodes latents, and data.vae names no VAE; use image, or set data.vae"
        yield arm.problem(f"{path}.pixels", message)


def _data_problems(arm: Arm) -> Iterator[Problem]:
    data = arm.config.data
    if data.source != "imagefolder" or data.path is None:
        return
    try:
        image_files(Path(data.path))
    except DataError as error:
        yield arm.problem(f"data.{error.field}", str(error))


def _file_problems(arm: Arm) -> Iterator[Problem]:
    config = arm.config
    named = {"evaluate.extractor.weights": config.evaluate.extractor.weights}
    named |= {f"{path}.weights": encoder.weights for path, encoder in config.encoder_paths}
    for path, file in named.items():
        if file is not None and not Path(file).is_file():
            yield arm.problem(path, f"no file '{file}'")


def _experiment_problems(experiment: Experiment) -> Iterator[Problem]:
    if experiment.name in RESERVED:
        yield experiment.problem("name", f"'{experiment.name}' is a folder of the runs root; choose another name")
    measured = list(dict.fromkeys(metric_name(arm.config.evaluate) for arm in experiment.arms))
    wanted: dict[Path_, str] = {("compare", "metric"): experiment.compare.metric}
    wanted |= {("compare", "targets", metric): metric for metric in experiment.compare.targets}
    if experiment.search:
        wanted["search", "objective", "metric"] = experiment.search.objective.metric
        yield from _space_problems(experiment)
    for path, metric in wanted.items():
        if resolve_metric(metric, measured) is None:
            yield experiment.problem(path, f"'{metric}' is not measured by this spec; measured: {', '.join(measured)}")


def resolve_metric(wanted: str, measured: list[str]) -> str | None:
    """The measured metric that a spec means: by its full name, or by its kind, ``frechet`` meaning FID as well."""
    kinds = ("frechet", "fid") if wanted == "frechet" else (wanted,)
    return next((name for name in measured if name == wanted or name.split(":")[0] in kinds), None)


def _space_problems(experiment: Experiment) -> Iterator[Problem]:
    """Every searched field must exist and take the ends of its range."""
    assert experiment.search
    for dotted, interval in experiment.search.space.items():
        bounds = interval.log or interval.uniform or interval.int_ or interval.choice or []
        for value in bounds:
            try:
                experiment.arms[0].with_settings({dotted: value})
            except SpecError as error:
                yield experiment.problem(("search", "space", dotted), error.problems[0].message)
                break
