"""Check a spec against what exists: families, blocks, grids, data, files. Imports no torch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

from repa_lab.align.settings import REGULARIZERS, EncoderSettings, Needs
from repa_lab.data import DataError
from repa_lab.data.settings import SOURCES, FolderSettings
from repa_lab.encoders.registry import grid_problem, weights_problem
from repa_lab.metrics.protocol import METRICS, goal_of_kind
from repa_lab.models.families import FAMILIES
from repa_lab.models.family import Family, Shape, shape_of
from repa_lab.models.released import SCALING, VAE, class_problem, depth_of, num_classes, problem_with, read_json
from repa_lab.orchestration.search.problems import objective_path, search_problems
from repa_lab.registry import UnknownComponentError, one_line
from repa_lab.runs.root import RESERVED
from repa_lab.settings import file_fields, settings_in
from repa_lab.spec import Arm, EvaluateConfig, Experiment, Problem, RunOptions, SpecError
from repa_lab.spec.errors import KeyPath
from repa_lab.tracking import tensorboard
from repa_lab.training.resolve import (
    MIN_HELD_OUT,
    Inventory,
    encoders_of,
    metric_names,
    names_of_metric,
    needs_of,
    protocols_of,
    shared_names,
)


def check(experiment: Experiment, inventory: Inventory | None) -> None:
    """Refuse an experiment that cannot be right, before anything is created.

    Args:
        experiment: what to check.
        inventory: the data sets and weights on this machine; None checks nothing that depends on files.

    Raises:
        SpecError: with every problem of every arm, each at the place that set the value.
    """
    problems = [problem for arm in experiment.arms for problem in _arm_problems(arm, experiment.run, inventory)]
    problems += _experiment_problems(experiment)
    if problems:
        raise SpecError(problems)


def blocked(arm: Arm) -> Problem | None:
    """Return why an arm cannot be trained here yet though it is right; None if it can."""
    if arm.config.data.is_unset:
        return arm.problem("data.path", "not set; give a folder of images with --set data.path=FOLDER")
    return None


def _arm_problems(arm: Arm, options: RunOptions, inventory: Inventory | None) -> Iterator[Problem]:
    config = arm.config
    try:
        family = FAMILIES[config.model.family]
    except UnknownComponentError as error:
        yield arm.problem("model.family", str(error))
        return
    try:
        shape = shape_of(family, config.model.size)
    except UnknownComponentError as error:
        yield arm.problem("model.size", str(error) if config.model.size else f"{family.name} needs a size: {error}")
        return
    yield from _model_problems(arm, family, shape)
    yield from _regularizer_problems(arm, family, shape)
    yield from _metric_problems(arm)
    yield from _process_problems(arm, family, options)
    if inventory:
        yield from _data_problems(arm, family, inventory)
        yield from _file_problems(arm)
        yield from _vae_problems(arm, family, shape)


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
    if arm.config.data.is_prepared and arm.config.data.vae is None:
        yield arm.problem(
            "data.vae", "not set; name the VAE whose latents the prepared folder has: it decodes the samples"
        )
    elif arm.config.data.vae is None and side % shape.stride:
        place = "model.size" if arm.config.data.has_one_size else "data.resolution"
        named = f"{family.name} {arm.config.model.size}"
        yield arm.problem(place, f"{side} px is not a multiple of {shape.stride}, the stride of {named}")


def _pretrained_problems(arm: Arm, family: Family, shape: Shape) -> Iterator[Problem]:
    config, pipeline = arm.config, family.pipeline
    named = config.model.pretrained
    if pipeline and named is None:  # of a family without a pipeline, `blocked` says that it is not trained
        yield arm.problem(
            "model.pretrained", f"{family.name} is trained from a pretrained pipeline: name a hub id or a folder"
        )
    elif pipeline and named and (folder := Path(named)).is_dir() and (message := problem_with(folder, family)):
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
    reverse = [*_tiers(arm)][::-1]  # a sampler that both protocols have is the problem of the usual one
    for sampler, path in {tier.sampler: f"{path}.sampler" for path, tier in reverse}.items():
        if (sampler.type, sampler.solver) != ("ode", "euler"):
            message = f"{family.name} is sampled through its own pipeline and scheduler: only {path}.steps can be set"
            yield arm.problem(path, message)
    for guidance, path in {tier.guidance: f"{path}.guidance" for path, tier in reverse}.items():
        if (guidance.low, guidance.high) != (0, 1):
            yield arm.problem(path, f"the pipeline of {family.name} guides at all times: leave low and high out")


def _caption_problems(arm: Arm, family: Family) -> Iterator[Problem]:
    data, trained = arm.config.data, f"{family.name} is trained with captions"
    if not data.may_have_captions:
        *others, last = (name for name, other in SOURCES.items() if other.settings.may_have_captions)
        message = f"{trained}, and the images of {data.source} have none: use {', '.join(others)} or {last}"
        yield arm.problem("data.source", message)


def _regularizer_problems(arm: Arm, family: Family, shape: Shape) -> Iterator[Problem]:
    chosen = arm.config.regularizer.type
    if chosen not in ("none", *family.regularizers):
        kind = "a UNet" if family.kind == "unet" else "a transformer"
        fits = " or ".join(family.regularizers)
        yield arm.problem("regularizer.type", f"{family.name} is {kind}: use {fits}, not {chosen}")
        return
    try:
        needs, encoders = needs_of(arm.config), encoders_of(arm.config)
    except Exception as error:  # whatever a plugin raises
        yield arm.problem("regularizer.type", f"cannot tell what {chosen} needs: {one_line(error)}")
        return
    yield from _block_problems(arm, family, shape, needs)
    for path, encoder in encoders:
        yield from _encoder_problems(arm, path, encoder)


def _depth(arm: Arm, family: Family, shape: Shape) -> int | None:
    """Return the number of blocks; None for weights at the hub that may not be the released ones: a worker looks."""
    pretrained = arm.config.model.pretrained
    if pretrained is None or family.pipeline is None or pretrained == family.pipeline.released:
        return shape.depth
    return depth_of(Path(pretrained), family)


def _block_problems(arm: Arm, family: Family, shape: Shape, needs: Needs) -> Iterator[Problem]:
    depth, chosen = _depth(arm, family, shape), arm.config.regularizer
    measured_at = arm.config.evaluate.block_index
    if measured_at is not None and (message := _block_problem(family, measured_at, depth)):
        yield arm.problem("evaluate.block_index", message)
    for block in dict.fromkeys((*needs.taps, *needs.ema_taps)):
        if block is None or not (message := _block_problem(family, block, depth)):
            continue
        if block == chosen.block_index:
            yield arm.problem("regularizer.block_index", message)
        else:
            origin = REGULARIZERS.origin(chosen.type)
            yield arm.problem("regularizer.type", f"{origin.file}:{origin.line}: {message}" if origin else message)


def _block_problem(family: Family, block: int | str, depth: int | None) -> str | None:
    if family.kind == "unet":
        return (
            None
            if block == "mid"
            else f"{family.name} is tapped at its mid block: block_index must be mid, got {block}"
        )
    if not isinstance(block, int) or (depth is not None and block >= depth):
        known = depth or family.shapes[""].depth
        return f"{family.name} has {known} blocks: block_index must be 0 to {known - 1}, got {block}"
    return None


def _encoder_problems(arm: Arm, path: str, encoder: EncoderSettings) -> Iterator[Problem]:
    if message := grid_problem(encoder.name, encoder.image_size, arm.config.data.side):
        yield arm.problem(f"{path}.image_size", message)
    if message := weights_problem(encoder.name, encoder.weights):
        yield arm.problem(f"{path}.weights", message)
    if encoder.pixels != "image" and arm.config.data.vae is None and arm.config.model.pretrained is None:
        message = f"{encoder.pixels} decodes latents, and data.vae names no VAE; use image, or set data.vae"
        yield arm.problem(f"{path}.pixels", message)


def _tiers(arm: Arm) -> Iterator[tuple[str, EvaluateConfig]]:
    """Return the protocols that an arm is measured by, each with its dotted path."""
    return zip(("evaluate", "evaluate.full"), protocols_of(arm.config), strict=False)


def _metric_problems(arm: Arm) -> Iterator[Problem]:
    for path, tier in _tiers(arm):
        for metric in tier.metrics:
            extractors = tier.extractors
            if not any(
                name for extractor in extractors for name in names_of_metric(arm.config, tier, metric, extractor)
            ):
                names = " and ".join(extractor.name for extractor in extractors)
                advice = "leave it out, or add the extractor inception"
                yield arm.problem(f"{path}.metrics", f"{metric} has no meaning with the features of {names}: {advice}")
    for name in itertools.islice(shared_names(arm.config), 1):
        path = f"{[*_tiers(arm)][-1][0]}.extractor"
        twice = f"'{name}' would stand for two numbers, one with other weights or another reference"
        yield arm.problem(path, f"{twice}: leave one out, or measure it in evaluate.full with other samples")


def _process_problems(arm: Arm, family: Family, options: RunOptions) -> Iterator[Problem]:
    if arm.config.train.batch_size % options.gpus_per_run:
        message = f"{options.gpus_per_run} processes (run.gpus_per_run) cannot share a batch equally"
        yield arm.problem("train.batch_size", message)
    if options.gradient_checkpointing and family.network and (why := family.network.uncheckpointed):
        yield arm.problem("model.family", f"{family.name} cannot be checkpointed (run.gradient_checkpointing): {why}")


def _data_problems(arm: Arm, family: Family, inventory: Inventory) -> Iterator[Problem]:
    data = arm.config.data
    try:
        dataset = inventory.dataset(data)
    except DataError as error:
        yield arm.problem(f"data.{error.field}", str(error))
        return
    if dataset.images is None:
        return
    takes_captions = family.pipeline is not None and family.pipeline.num_classes is None
    if takes_captions and not dataset.has_captions and isinstance(data, FolderSettings) and data.caption_advice:
        has_none = f"{family.name} is trained with captions, and '{data.path}' has none"
        yield arm.problem("data.path", f"{has_none}: {data.caption_advice}")
    known = num_classes(Path(arm.config.model.pretrained or ""), family)
    if known is not None and dataset.classes > known:
        yield arm.problem("data.path", class_problem(dataset.classes, known))
    held, by_default = data.held_out(dataset.images), " by default" if data.holdout is None else ""
    if held >= dataset.images:
        yield arm.problem("data.holdout", f"holding out {held} of {dataset.images} images leaves none to train on")
        return
    if arm.config.alignment_encoder and held < MIN_HELD_OUT:
        few = f"{held} of {dataset.images} are held out{by_default}"
        yield arm.problem(
            "data.holdout", f"alignment is measured on held-out images: hold out {MIN_HELD_OUT} or more; {few}"
        )
    for path, metric in _compared(arm):
        if dataset.images - held < METRICS[metric].least_real:
            needed = f"{metric} needs at least {METRICS[metric].least_real} real images"
            left = f"there are {dataset.images - held} training images"
            yield arm.problem(path, f"{needed}, and {left}: give more, or leave it out of metrics")


def _compared(arm: Arm) -> Iterator[tuple[str, str]]:
    """Yield the metrics that compare with training images, each with the path that asks for it."""
    for path, tier in _tiers(arm):
        if any(extractor.reference is None for extractor in tier.extractors):
            yield from ((f"{path}.metrics", metric) for metric in tier.metrics)


def _vae_problems(arm: Arm, family: Family, shape: Shape) -> Iterator[Problem]:
    """Check the config of a local VAE; a worker checks a VAE at the hub."""
    data, pretrained = arm.config.data, arm.config.model.pretrained
    path, folder = ("data.vae", data.vae) if data.vae else ("model.pretrained", pretrained)
    if folder is None or not Path(folder).is_dir():
        return
    vae = read_json(Path(folder) / "config.json") or read_json(Path(folder) / VAE / "config.json")
    if vae is None:
        yield arm.problem(path, f"'{folder}' has no VAE: neither config.json nor {VAE}/config.json can be read")
        return
    taken, given = vae.get("in_channels", vae.get("input_channels")), data.channels
    if taken not in (given, None):
        yield arm.problem(path, f"the VAE takes {taken} channels, the images have {given}")
    own = read_json(Path(pretrained) / VAE / "config.json") or {} if pretrained else {}
    if data.vae and (lacking := [name for name in SCALING if own.get(name) is not None and vae.get(name, "") is None]):
        pipelines = "which that of the pipeline's own VAE has and it draws by"
        yield arm.problem("data.vae", f"the config of '{data.vae}' lacks {', '.join(lacking)}, {pipelines}")
    levels = vae.get("down_block_types")
    if family.from_scratch and isinstance(levels, list):
        step = 2 ** (len(levels) - 1) * shape.stride
        if data.side % step:
            named = f"{family.name} {arm.config.model.size} in the latents of '{folder}'"
            message = f"{data.side} px is not a multiple of {step}, the pixels of a token of {named}"
            yield arm.problem("data.resolution", message)


def _file_problems(arm: Arm) -> Iterator[Problem]:
    for path, section in settings_in(arm.config):
        for name, file, mark in file_fields(section):
            if mark.required and not Path(file).is_file():
                yield arm.problem(".".join(map(str, (*path, name))), f"no file '{file}'")


def _experiment_problems(experiment: Experiment) -> Iterator[Problem]:
    if experiment.name in RESERVED:
        yield experiment.problem("name", f"'{experiment.name}' is a folder of the runs root; choose another name")
    if experiment.stop and experiment.search:
        yield experiment.problem(
            "stop", "a search compares groups at equal progress: leave stop out, and set search.prune"
        )
    if experiment.run.precision == "fp16" and experiment.run.device == "cpu":
        yield experiment.problem("run.precision", "fp16 needs a GPU; use bf16 or fp32")
    if experiment.run.micro_batch == "auto" and experiment.run.gpus_per_run > 1:
        message = "auto works with one process only: several would not agree on a size; give a number"
        yield experiment.problem("run.micro_batch", message)
    if experiment.run.tensorboard and not tensorboard.is_installed():
        yield experiment.problem("run.tensorboard", "needs TensorBoard: pip install 'repa-lab[tensorboard]'")
    trained = experiment.run.precision
    for arm in experiment.arms:
        if arm.config.model.train == "lora" and arm.config.evaluate.precision != "train" and trained != "fp32":
            message = f"LoRA holds what it leaves alone in run.precision ({trained}): use train, or run.precision: fp32"
            yield arm.problem("evaluate.precision", message)
    known = list(dict.fromkeys(name for arm in experiment.arms for name in metric_names(arm.config)))
    wanted: dict[KeyPath, str] = {("compare", "metric"): experiment.compare.metric}
    wanted |= {("compare", "targets", metric): metric for metric in experiment.compare.targets}
    wanted |= {rule_path(experiment, index): rule.metric for index, rule in enumerate(experiment.stop)}
    if experiment.search:
        named = enumerate(experiment.search.objectives)
        wanted |= {objective_path(experiment.search, i): one.metric for i, one in named if not one.is_cost}
        yield from search_problems(experiment, lambda arm: _arm_problems(arm, experiment.run, None))
    goals: dict[KeyPath, str] = {("compare", "metric"): experiment.compare.goal}
    if experiment.search:
        goals |= {objective_path(experiment.search, i): one.goal for i, one in enumerate(experiment.search.objectives)}
    for path, metric in wanted.items():
        if (name := resolve_metric(metric, known)) is None:
            yield experiment.problem(path, f"'{metric}' is not measured by this spec; measured: {', '.join(known)}")
        elif path in goals and goals[path] != (right := goal_of_kind(name.partition(":")[0])):
            better = "larger" if right == "max" else "smaller"
            message = f"must be {right}, for {better} values of {name} are better; got {goals[path]}"
            yield experiment.problem((*path[:-1], "goal"), message)


def rule_path(experiment: Experiment, index: int) -> KeyPath:
    """Return the path of a rule's metric in the spec, where a single rule need not be a list."""
    is_list = isinstance(experiment.draft.value.get("stop"), list)
    return ("stop", index, "metric") if is_list else ("stop", "metric")


def resolve_metric(name: str, measured: Sequence[str]) -> str | None:
    """Return the measured metric that a spec names in full, or by its kind; ``frechet`` means FID as well."""
    kinds = ("frechet", "fid") if name == "frechet" else (name,)
    return next((metric for metric in measured if metric == name or metric.split(":")[0] in kinds), None)
