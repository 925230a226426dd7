"""What a spec says against what exists: families, blocks, grids, data, files. No torch, so that `plan` answers at once."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from repa_lab.data.errors import DataError
from repa_lab.data.fingerprint import has_captions
from repa_lab.encoders.registry import grid_problem, weights_problem
from repa_lab.metrics.protocol import goal_of_kind
from repa_lab.models.facts import Family, Shape, UnknownFactError, shape_of
from repa_lab.models.families import family_facts
from repa_lab.models.released import problem_with
from repa_lab.runs.root import RESERVED
from repa_lab.spec import Arm, DataConfig, EncoderConfig, EvaluateConfig, Experiment, Problem, SpecError
from repa_lab.spec.errors import Path_
from repa_lab.sweep.search.problems import objective_path, search_problems
from repa_lab.tracking import tensorboard
from repa_lab.training.fingerprints import fingerprint_of
from repa_lab.training.protocol import measured, metric_names, shared_names, tiers

Fingerprint = Callable[[DataConfig], str]


def check(experiment: Experiment, files: bool = True, fingerprint: Fingerprint = fingerprint_of) -> None:
    """Refuse an experiment that cannot be right, before anything is created.

    Args:
        experiment: what to check.
        files: whether what it names must be on this machine.
        fingerprint: says what the data is, or raises `DataError`.

    Raises:
        SpecError: with every problem of every arm, each at the place that set the value.
    """
    problems = [problem for arm in experiment.arms for problem in _arm_problems(arm, fingerprint if files else None)]
    problems += _experiment_problems(experiment)
    if problems:
        raise SpecError(problems)


def blocked(arm: Arm) -> Problem | None:
    """Why an arm that is right cannot be trained here yet, or None."""
    if arm.config.data.source != "digits" and arm.config.data.path is None:
        return arm.problem("data.path", "not set; give a folder of images with --set data.path=FOLDER")
    return None


def _arm_problems(arm: Arm, fingerprint: Fingerprint | None) -> Iterator[Problem]:
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
    yield from _metric_problems(arm)
    if fingerprint:
        yield from _data_problems(arm, fingerprint)
        yield from _file_problems(arm)


def _model_problems(arm: Arm, family: Family, shape: Shape) -> Iterator[Problem]:
    if family.from_scratch and arm.config.model.pretrained is not None:
        yield arm.problem("model.pretrained", f"{family.name} is trained from scratch: leave pretrained out")
    if family.from_scratch and arm.config.model.train == "lora":
        yield arm.problem("model.train", f"{family.name} is trained from scratch: train must be full")
    if not family.from_scratch:
        yield from _pretrained_problems(arm, family, shape)
        return
    side = arm.config.data.side
    if arm.config.data.buckets is not None:
        yield arm.problem("data.buckets", f"{family.name} is built for one size: leave buckets out")
    if arm.config.evaluate.prompts:
        yield arm.problem("evaluate.prompts", f"{family.name} is told classes: leave prompts out")
    if arm.config.data.source == "repa" and arm.config.data.vae is None:
        yield arm.problem("data.vae", "not set; name the VAE whose latents the prepared folder has: it decodes the samples")
    elif arm.config.data.vae is None and side % shape.stride:
        place = "model.size" if arm.config.data.source == "digits" else "data.resolution"
        named = f"{family.name} {arm.config.model.size}"
        yield arm.problem(place, f"{side} px is not a multiple of {shape.stride}, the stride of {named}")


def _pretrained_problems(arm: Arm, family: Family, shape: Shape) -> Iterator[Problem]:
    config, pipeline = arm.config, family.pipeline
    if config.model.pretrained is None:
        yield arm.problem("model.pretrained", f"{family.name} is trained from a pretrained pipeline: name a hub id or a folder")
    elif pipeline and (folder := Path(config.model.pretrained)).is_dir() and (message := problem_with(folder, family)):
        yield arm.problem("model.pretrained", message)
    yield from _size_problems(arm, family, shape)
    if pipeline and pipeline.num_classes is None:
        yield from _caption_problems(arm, family)
    elif config.evaluate.prompts:
        yield arm.problem("evaluate.prompts", f"{family.name} is told classes: leave prompts out")
    yield from _sampling_problems(arm, family)


def _size_problems(arm: Arm, family: Family, shape: Shape) -> Iterator[Problem]:
    data, step = arm.config.data, family.latent_stride * shape.stride
    sides = {"data.resolution": data.side} | ({"data.buckets.step": data.buckets.step} if data.buckets else {})
    for path, side in sides.items():
        if side % step:
            yield arm.problem(path, f"{side} px is not a multiple of {step}, the pixels of a token of {family.name}")
    if data.buckets and family.network and family.network.square:
        yield arm.problem("data.buckets", f"{family.name} takes square images only: leave buckets out")


def _sampling_problems(arm: Arm, family: Family) -> Iterator[Problem]:
    dearest_first = [*_tiers(arm)][::-1]  # what both protocols have is the usual one's
    for sampler, path in {tier.sampler: f"{path}.sampler" for path, tier in dearest_first}.items():
        if (sampler.type, sampler.solver) != ("ode", "euler"):
            message = f"{family.name} is sampled through its own pipeline and scheduler: only {path}.steps can be set"
            yield arm.problem(path, message)
    for guidance, path in {tier.guidance: f"{path}.guidance" for path, tier in dearest_first}.items():
        if (guidance.low, guidance.high) != (0, 1):
            yield arm.problem(path, f"the pipeline of {family.name} guides at all times: leave low and high out")


def _caption_problems(arm: Arm, family: Family) -> Iterator[Problem]:
    data, trained = arm.config.data, f"{family.name} is trained with captions"
    if data.source in ("digits", "repa"):
        named = "digits" if data.source == "digits" else "prepared folders"
        yield arm.problem("data.source", f"{trained}, and {named} have none: use imagefolder or datasets")
    elif data.source == "imagefolder" and data.path and _is_without_captions(Path(data.path)):
        advice = "give metadata.jsonl (file_name, text), or a .txt beside each image"
        yield arm.problem("data.path", f"{trained}, and '{data.path}' has none: {advice}")


def _is_without_captions(folder: Path) -> bool:
    try:
        return not has_captions(folder)
    except DataError:  # which is told by itself
        return False


def _regularizer_problems(arm: Arm, family: Family, shape: Shape) -> Iterator[Problem]:
    chosen, regularizer = arm.config.regularizer.type, arm.config.regularizer
    if chosen not in ("none", *family.regularizers):
        kind = "a UNet" if family.kind == "unet" else "a transformer"
        fits = " or ".join(family.regularizers)
        yield arm.problem("regularizer.type", f"{family.name} is {kind}: use {fits}, not {chosen}")
        return
    wanted = {"evaluate.block_index": arm.config.evaluate.block_index}
    if chosen != "none":
        wanted["regularizer.block_index"] = regularizer.block_index
    for path, block in wanted.items():
        known = family.pipeline is None or arm.config.model.pretrained == family.pipeline.released
        if block is not None and (message := _block_problem(family, shape, block, known)):
            yield arm.problem(path, message)
    for path, encoder in arm.config.encoder_paths:
        yield from _encoder_problems(arm, path, encoder)


def _block_problem(family: Family, shape: Shape, block: int | str, is_depth_known: bool) -> str | None:
    """Of weights that may have more blocks than the released ones, a worker asks the folder before anything starts."""
    if family.kind == "unet":
        return None if block == "mid" else f"{family.name} is tapped at its mid block: block_index must be mid, got {block}"
    if not isinstance(block, int) or (is_depth_known and block >= shape.depth):
        return f"{family.name} has {shape.depth} blocks: block_index must be 0 to {shape.depth - 1}, got {block}"
    return None


def _encoder_problems(arm: Arm, path: str, encoder: EncoderConfig) -> Iterator[Problem]:
    if message := grid_problem(encoder.name, encoder.image_size, arm.config.data.side):
        yield arm.problem(f"{path}.image_size", message)
    if message := weights_problem(encoder.name, encoder.weights):
        yield arm.problem(f"{path}.weights", message)
    if encoder.pixels != "image" and arm.config.data.vae is None and arm.config.model.pretrained is None:
        message = f"{encoder.pixels} decodes latents, and data.vae names no VAE; use image, or set data.vae"
        yield arm.problem(f"{path}.pixels", message)


def _tiers(arm: Arm) -> Iterator[tuple[str, EvaluateConfig]]:
    """The protocols that an arm is measured by, each with its place."""
    return zip(("evaluate", "evaluate.full"), tiers(arm.config), strict=False)


def _metric_problems(arm: Arm) -> Iterator[Problem]:
    for path, tier in _tiers(arm):
        for metric in tier.metrics:
            if not any(name for one in tier.extractors for name in measured(arm.config, tier, metric, one)):
                names = " and ".join(one.name for one in tier.extractors)
                message = f"{metric} has no meaning with the features of {names}: leave it out, or add the extractor inception"
                yield arm.problem(f"{path}.metrics", message)
    for name in itertools.islice(shared_names(arm.config), 1):
        path = f"{[*_tiers(arm)][-1][0]}.extractor"
        twice = f"'{name}' would stand for two numbers, one with other weights or another reference"
        yield arm.problem(path, f"{twice}: leave one out, or measure it in evaluate.full with other samples")


def _data_problems(arm: Arm, fingerprint: Fingerprint) -> Iterator[Problem]:
    data = arm.config.data
    if data.source == "digits" or data.path is None:
        return
    try:
        fingerprint(data)
    except DataError as error:
        yield arm.problem(f"data.{error.field}", str(error))


def _file_problems(arm: Arm) -> Iterator[Problem]:
    config = arm.config
    named = {f"{path}.weights": extractor.weights for path, extractor in config.extractor_paths}
    named |= {f"{path}.reference": extractor.reference for path, extractor in config.extractor_paths}
    named |= {f"{path}.weights": encoder.weights for path, encoder in config.encoder_paths}
    for path, file in named.items():
        if file is not None and not Path(file).is_file():
            yield arm.problem(path, f"no file '{file}'")


def _experiment_problems(experiment: Experiment) -> Iterator[Problem]:
    if experiment.name in RESERVED:
        yield experiment.problem("name", f"'{experiment.name}' is a folder of the runs root; choose another name")
    if experiment.stop and experiment.search:
        yield experiment.problem("stop", "a search compares groups at equal progress: leave stop out, and set search.prune")
    if experiment.run.tensorboard and not tensorboard.is_installed():
        yield experiment.problem("run.tensorboard", "needs TensorBoard: pip install 'repa-lab[tensorboard]'")
    known = list(dict.fromkeys(name for arm in experiment.arms for name in metric_names(arm.config)))
    wanted: dict[Path_, str] = {("compare", "metric"): experiment.compare.metric}
    wanted |= {("compare", "targets", metric): metric for metric in experiment.compare.targets}
    wanted |= {rule_path(experiment, index): rule.metric for index, rule in enumerate(experiment.stop)}
    if experiment.search:
        named = enumerate(experiment.search.objectives)
        wanted |= {objective_path(experiment.search, i): one.metric for i, one in named if not one.is_cost}
        yield from search_problems(experiment, lambda arm: _arm_problems(arm, None))
    goals: dict[Path_, str] = {("compare", "metric"): experiment.compare.goal}
    if experiment.search:
        goals |= {objective_path(experiment.search, i): one.goal for i, one in enumerate(experiment.search.objectives)}
    for path, metric in wanted.items():
        if (name := resolve_metric(metric, known)) is None:
            yield experiment.problem(path, f"'{metric}' is not measured by this spec; measured: {', '.join(known)}")
        elif path in goals and goals[path] != (right := goal_of_kind(name.partition(":")[0])):
            better = "larger" if right == "max" else "smaller"
            message = f"must be {right}, for {better} values of {name} are better; got {goals[path]}"
            yield experiment.problem((*path[:-1], "goal"), message)


def rule_path(experiment: Experiment, index: int) -> Path_:
    """Where the metric of a rule stands in the spec, for a lone rule needs no list."""
    is_list = isinstance(experiment.draft.value.get("stop"), list)
    return ("stop", index, "metric") if is_list else ("stop", "metric")


def resolve_metric(wanted: str, measured: Sequence[str]) -> str | None:
    """The measured metric that a spec means: by its full name, or by its kind, ``frechet`` meaning FID as well."""
    kinds = ("frechet", "fid") if wanted == "frechet" else (wanted,)
    return next((name for name in measured if name == wanted or name.split(":")[0] in kinds), None)
