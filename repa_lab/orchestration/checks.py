"""Check a spec against what exists: families, blocks, grids, data, files. Imports no torch."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

from repa_lab.align.needs import Needs, TrainingFacts
from repa_lab.align.settings import REGULARIZERS, EncoderSettings, RegularizerSettings
from repa_lab.data import DataError
from repa_lab.data.settings import SOURCES, FolderSettings
from repa_lab.encoders.registry import attention_problem, grid_problem, weights_problem
from repa_lab.errors import KeyPath
from repa_lab.metrics.protocol import METRICS, goal_of_kind
from repa_lab.models.families import FAMILIES
from repa_lab.models.family import Family, Shape, shape_of
from repa_lab.models.released import SCALING, VAE, class_problem, depth_of, num_classes, problem_with, read_json
from repa_lab.orchestration.search.space import objective_path, search_problems
from repa_lab.registry import UnknownComponentError, one_line
from repa_lab.runs.root import RESERVED
from repa_lab.settings import file_fields, settings_in
from repa_lab.spec import Arm, EvaluateConfig, Experiment, Problem, RunConfig, RunOptions, SpecError
from repa_lab.tracking import tensorboard
from repa_lab.tracking.server import environment_problems, resolve_mode
from repa_lab.training.resolve import (
    MIN_HELD_OUT,
    Inventory,
    attended_blocks,
    encoders_of,
    metric_names,
    names_of_metric,
    needs_of_one,
    protocols_of,
    resolved_regularizers,
    shared_names,
)

Found = Iterator[tuple[str, str]]  # messages, each with the dotted path of the value at fault


def check(experiment: Experiment, inventory: Inventory | None) -> None:
    """Refuse an experiment that cannot be right, before anything is created.

    Args:
        inventory: the data sets and weights on this machine; None checks nothing that depends on files.

    Raises:
        SpecError: with every problem of every arm, each at the place that set the value.
    """
    problems = [problem for arm in experiment.arms for problem in _arm_problems(arm, experiment.run, inventory)]
    problems += _experiment_problems(experiment)
    if problems:
        raise SpecError(problems)


def _arm_problems(arm: Arm, options: RunOptions, inventory: Inventory | None) -> Iterator[Problem]:
    for path, message in _config_problems(arm.config, options, inventory):
        yield arm.problem(path, message)


def _config_problems(config: RunConfig, options: RunOptions, inventory: Inventory | None) -> Found:
    try:
        family = FAMILIES[config.model.family]
    except UnknownComponentError as error:
        yield "model.family", str(error)
        return
    try:
        shape = shape_of(family, config.model.size)
    except UnknownComponentError as error:
        yield "model.size", str(error) if config.model.size else f"{family.name} needs a size: {error}"
        return
    yield from _clip_problems(config, family)
    yield from (_scratch_problems if family.from_scratch else _pretrained_problems)(config, family, shape)
    if config.evaluate.prompts and not _takes_captions(family):
        yield "evaluate.prompts", f"{family.name} is told classes: leave prompts out"
    yield from _regularizer_problems(config, family, shape, options)
    yield from _metric_problems(config)
    if config.train.batch_size % options.gpus_per_run:
        yield "train.batch_size", f"{options.gpus_per_run} processes (run.gpus_per_run) cannot share a batch equally"
    if options.gradient_checkpointing and family.network and (why := family.network.uncheckpointed):
        yield "model.family", f"{family.name} cannot be checkpointed (run.gradient_checkpointing): {why}"
    if config.model.train == "lora" and config.evaluate.precision != "train" and options.precision != "fp32":
        precision = "auto, which is bf16 on a GPU" if options.precision == "auto" else options.precision
        frozen = f"LoRA holds the frozen weights in run.precision ({precision})"
        yield "evaluate.precision", f"{frozen}: use train, or run.precision: fp32"
    if inventory:
        yield from _data_problems(config, family, inventory)
        for keys, section in settings_in(config):
            for name, file, mark in file_fields(section):
                if mark.required and not Path(file).is_file():
                    yield ".".join(map(str, (*keys, name))), f"no file '{file}'"
        yield from _vae_problems(config, family, shape)


def _clip_problems(config: RunConfig, family: Family) -> Found:
    data, frames, stride = config.data, config.data.clip_frames, family.frame_stride
    if family.is_video and not data.has_clips:
        yield "data.source", f"{family.name} is trained on clips, and {data.source} has images: use clips"
    elif data.has_clips and not family.is_video:
        videos = _names(one for one in FAMILIES.values() if one.is_video)
        yield "data.source", f"{family.name} is trained on images, and {data.source} has clips; clips are for {videos}"
    elif data.has_clips and (frames - 1) % stride:
        lower = frames - (frames - 1) % stride
        message = f"{family.name} makes a latent frame of the first frame and of every {stride} after it"
        yield "data.frames", f"{message}: use {lower} or {lower + stride}, got {frames}"


def _scratch_problems(config: RunConfig, family: Family, shape: Shape) -> Found:
    data = config.data
    if config.model.pretrained is not None:
        yield "model.pretrained", f"{family.name} is trained from scratch: leave pretrained out"
    if config.model.train == "lora":
        yield "model.train", f"{family.name} is trained from scratch: train must be full"
    if data.buckets is not None:
        yield "data.buckets", f"{family.name} is built for one size: leave buckets out"
    if data.is_prepared and data.vae is None:
        yield "data.vae", "not set; name the VAE whose latents the prepared folder has: it decodes the samples"
    elif data.vae is None and data.side % shape.stride:
        named = f"{family.name} {config.model.size}"
        message = f"{data.side} px is not a multiple of {shape.stride}, the stride of {named}"
        yield "model.size" if data.has_one_size else "data.resolution", message


def _pretrained_problems(config: RunConfig, family: Family, shape: Shape) -> Found:
    data, pretrained, pipeline = config.data, config.model.pretrained, family.pipeline
    if pipeline and pretrained is None:
        yield "model.pretrained", f"{family.name} is trained from a pretrained pipeline: name a hub id or a folder"
    elif pipeline and pretrained and Path(pretrained).is_dir() and (problem := problem_with(Path(pretrained), family)):
        yield "model.pretrained", problem
    if _takes_captions(family) and not data.may_have_captions and not family.is_video:
        named = ((name, source.settings) for name, source in SOURCES.items())
        *others, last = (name for name, settings in named if settings.may_have_captions and not settings.has_clips)
        reason = f"{family.name} is trained with captions, and the images of {data.source} have none"
        yield "data.source", f"{reason}: use {', '.join(others)} or {last}"
    reverse = [*_protocols(config)][::-1]  # a sampler that both protocols have is the problem of the usual one
    for sampler, path in {protocol.sampler: f"{path}.sampler" for path, protocol in reverse}.items():
        if (sampler.type, sampler.solver) != ("ode", "euler"):
            yield path, f"{family.name} is sampled through its own pipeline and scheduler: only {path}.steps can be set"
    for guidance, path in {protocol.guidance: f"{path}.guidance" for path, protocol in reverse}.items():
        if (guidance.low, guidance.high) != (0, 1):
            yield path, f"the pipeline of {family.name} guides at all times: leave low and high out"
    step = family.latent_stride * shape.stride
    sides = {"data.resolution": data.side} | ({"data.buckets.step": data.buckets.step} if data.buckets else {})
    for path, side in sides.items():
        if side % step:
            yield path, f"{side} px is not a multiple of {step}, the pixels of a token of {family.name}"
    if data.buckets and family.network and family.network.square:
        yield "data.buckets", f"{family.name} takes square images only: leave buckets out"


def _takes_captions(family: Family) -> bool:
    return family.pipeline is not None and family.pipeline.num_classes is None


def _names(families: Iterable[Family]) -> str:
    return ", ".join(family.name for family in families)


def _regularizer_problems(config: RunConfig, family: Family, shape: Shape, options: RunOptions) -> Found:
    depth, measured_at = _depth(config, family, shape), config.evaluate.block_index
    if measured_at is not None and (message := _block_problem(family, measured_at, depth)):
        yield "evaluate.block_index", message
    images = config.train.batch_size // options.gpus_per_run  # of one forward pass; `auto` begins with the whole share
    images = min(images, options.micro_batch) if isinstance(options.micro_batch, int) else images
    frames = family.latent_frames(config.data.clip_frames)
    facts = TrainingFacts(depth, images, config.model.pretrained is not None, frames)
    is_known = True
    for (path, given), settings in zip(config.regularizer_paths, resolved_regularizers(config), strict=True):
        if given.type not in family.regularizers:
            kind = "a UNet" if family.kind == "unet" else "a transformer"
            yield f"{path}.type", f"{family.name} is {kind}: use {family.regularizer}, not {given.type}"
            is_known = False
            continue
        try:
            needs = needs_of_one(settings)
        except Exception as error:  # whatever a plugin raises
            yield f"{path}.type", f"cannot tell what {given.type} needs: {one_line(error)}"
            is_known = False
            continue
        problems = (_block_problems(family, depth, given, needs), _signal_problems(family, settings, needs))
        for name, message in itertools.chain(*problems, settings.problems(facts)):
            yield f"{path}.{name}", message
    for path, encoder in encoders_of(config) if is_known else ():
        for name, message in _encoder_problems(config, encoder):
            yield f"{path}.{name}", message


def _signal_problems(family: Family, settings: RegularizerSettings, needs: Needs) -> Found:
    if needs.attention and not family.has_attention:
        fitting = _names(one for one in FAMILIES.values() if one.has_attention)
        yield "type", f"the attention of {family.name} cannot be tapped; use {fitting}"
    if needs.token_times and not family.has_token_times:
        fitting = _names(one for one in FAMILIES.values() if one.has_token_times)
        yield "type", f"{family.name} takes one time for all tokens; use {fitting}"
    schedule = settings.schedule
    if needs.token_times and schedule.similarity_threshold is not None and schedule.threshold_mode == "recoverable":
        reason = f"measuring the cosine of {settings.type} changes the noise, so weight 0 would not be off"
        yield "schedule.threshold_mode", f"{reason}: use permanent"


def _depth(config: RunConfig, family: Family, shape: Shape) -> int | None:
    """Return the number of blocks; None for weights at the hub that may not be the released ones: a worker looks."""
    pretrained = config.model.pretrained
    if pretrained is None or family.pipeline is None or pretrained == family.pipeline.released:
        return shape.depth
    return depth_of(Path(pretrained), family)


def _block_problems(family: Family, depth: int | None, given: RegularizerSettings, needs: Needs) -> Found:
    named = {getattr(given, name): name for name in type(given).model_fields if name.endswith(("_block", "_index"))}
    for block in dict.fromkeys((*needs.blocks, *needs.attention)):
        if block is not None and (message := _block_problem(family, block, depth)):
            origin = None if block in named else REGULARIZERS.origin(given.type)
            yield named.get(block, "type"), f"{origin.file}:{origin.line}: {message}" if origin else message


def _block_problem(family: Family, block: int | str, depth: int | None) -> str | None:
    if family.kind == "unet":
        is_right = block == "mid"
        return None if is_right else f"{family.name} is tapped at its mid block: block_index must be mid, got {block}"
    if not isinstance(block, int) or (depth is not None and block >= depth):
        known = depth or family.shapes[""].depth
        return f"{family.name} has {known} blocks: block_index must be 0 to {known - 1}, got {block}"
    return None


def _encoder_problems(config: RunConfig, encoder: EncoderSettings) -> Found:
    if message := grid_problem(encoder.name, encoder.image_size, config.data.side):
        yield "image_size", message
    if message := weights_problem(encoder.name, encoder.weights):
        yield "weights", message
    if encoder.pixels != "image" and config.data.vae is None and config.model.pretrained is None:
        yield "pixels", f"{encoder.pixels} decodes latents, and data.vae names no VAE; use image, or set data.vae"
    if blocks := attended_blocks(config, encoder):
        if message := attention_problem(encoder.name, blocks):
            yield "name", message
        elif encoder.cache:
            yield "cache", "a regularizer needs the encoder's attention, which has no cache: set false"


def _protocols(config: RunConfig) -> Iterator[tuple[str, EvaluateConfig]]:
    """Return the protocols that a run is measured by, each with its dotted path."""
    return zip(("evaluate", "evaluate.full"), protocols_of(config), strict=False)


def _metric_problems(config: RunConfig) -> Found:
    for path, protocol in _protocols(config):
        for metric in protocol.metrics:
            if not any(any(names_of_metric(config, protocol, metric, one)) for one in protocol.extractors):
                names = " and ".join(extractor.name for extractor in protocol.extractors)
                advice = "leave it out, or add the extractor inception"
                yield f"{path}.metrics", f"{metric} has no meaning with the features of {names}: {advice}"
    for name in itertools.islice(shared_names(config), 1):
        twice = f"'{name}' would stand for two numbers, one with other weights or another reference"
        path = f"{[*_protocols(config)][-1][0]}.extractor"
        yield path, f"{twice}: leave one out, or measure it in evaluate.full with other samples"


def _data_problems(config: RunConfig, family: Family, inventory: Inventory) -> Found:
    data = config.data
    try:
        dataset = inventory.dataset(data)
    except DataError as error:
        yield f"data.{error.field}", str(error)
        return
    if (images := dataset.images) is None:
        return
    has_captions = dataset.has_captions or not _takes_captions(family)
    if not has_captions and isinstance(data, FolderSettings) and data.caption_advice:
        reason = f"{family.name} is trained with captions, and '{data.path}' has none"
        yield "data.path", f"{reason}: {data.caption_advice}"
    known = num_classes(Path(config.model.pretrained or ""), family)
    if known is not None and dataset.classes > known:
        yield "data.path", class_problem(dataset.classes, known)
    holdout = data.held_out(images)
    if holdout >= images:
        yield "data.holdout", f"holding out {holdout} of {images} images leaves none to train on"
        return
    if config.alignment_encoder and holdout < MIN_HELD_OUT:
        count = f"{holdout} of {images} are held out{' by default' if data.holdout is None else ''}"
        yield "data.holdout", f"alignment is measured on held-out images: hold out {MIN_HELD_OUT} or more; {count}"
    for path, protocol in _protocols(config):
        if all(
            extractor.reference is not None for extractor in protocol.extractors
        ):  # else training images are the reference
            continue
        for metric in protocol.metrics:
            if images - holdout < (least := METRICS[metric].least_real):
                needed = (
                    f"{metric} needs at least {least} real images, and there are {images - holdout} training images"
                )
                yield f"{path}.metrics", f"{needed}: give more, or leave it out of metrics"


def _vae_problems(config: RunConfig, family: Family, shape: Shape) -> Found:
    """Check the config of a local VAE; a worker checks a VAE at the hub."""
    data, pretrained = config.data, config.model.pretrained
    path, folder = ("data.vae", data.vae) if data.vae else ("model.pretrained", pretrained)
    if folder is None or not Path(folder).is_dir():
        return
    vae = read_json(Path(folder) / "config.json") or read_json(Path(folder) / VAE / "config.json")
    if vae is None:
        yield path, f"'{folder}' has no VAE: neither config.json nor {VAE}/config.json can be read"
        return
    channels = vae.get("in_channels", vae.get("input_channels"))
    if channels not in (data.channels, None):
        yield path, f"the VAE takes {channels} channels, the images have {data.channels}"
    released = read_json(Path(pretrained) / VAE / "config.json") or {} if pretrained else {}
    missing = [name for name in SCALING if released.get(name) is not None and vae.get(name, "") is None]
    if data.vae and missing:
        reason = "which the pipeline needs to sample and its own VAE has"
        yield "data.vae", f"the config of '{data.vae}' lacks {', '.join(missing)}, {reason}"
    levels = vae.get("down_block_types")
    if family.from_scratch and isinstance(levels, list):
        step = 2 ** (len(levels) - 1) * shape.stride
        if data.side % step:
            named = f"{family.name} {config.model.size} in the latents of '{folder}'"
            yield "data.resolution", f"{data.side} px is not a multiple of {step}, the pixels of a token of {named}"


def _experiment_problems(experiment: Experiment) -> Iterator[Problem]:
    options = experiment.run
    if experiment.name in RESERVED:
        yield experiment.problem("name", f"'{experiment.name}' is a folder of the runs root; choose another name")
    if experiment.stop and experiment.search:
        message = "a search compares groups at equal progress: leave stop out, and set search.prune"
        yield experiment.problem("stop", message)
    if options.precision == "fp16" and options.device == "cpu":
        yield experiment.problem("run.precision", "fp16 needs a GPU; use bf16 or fp32")
    if options.tensorboard and not tensorboard.is_installed():
        yield experiment.problem("run.tensorboard", "needs TensorBoard: pip install 'repa-lab[tensorboard]'")
    for problem in environment_problems(resolve_mode(options.wandb.mode)):
        yield experiment.problem("run.wandb.mode", problem)
    if experiment.search:
        yield from search_problems(experiment, lambda arm: _arm_problems(arm, options, None))
    yield from _named_metric_problems(experiment)


def _named_metric_problems(experiment: Experiment) -> Iterator[Problem]:
    """Check that every metric that the spec names is measured, and that its goal is the right one."""
    compare, search = experiment.compare, experiment.search
    metrics: list[tuple[KeyPath, str, str | None]] = [(("compare", "metric"), compare.metric, compare.goal)]
    metrics += [(("compare", "targets", metric), metric, None) for metric in compare.targets]
    is_list = isinstance(experiment.draft.value.get("stop"), list)  # a single rule need not be a list
    for index, rule in enumerate(experiment.stop):
        metrics.append((("stop", index, "metric") if is_list else ("stop", "metric"), rule.metric, None))
    for index, objective in enumerate(search.objectives if search else ()):
        if search and not objective.is_cost:
            metrics.append((objective_path(search, index), objective.metric, objective.goal))
    measured = list(dict.fromkeys(name for arm in experiment.arms for name in metric_names(arm.config)))
    for path, metric, goal in metrics:
        if (name := resolve_metric(metric, measured)) is None:
            yield experiment.problem(path, f"'{metric}' is not measured by this spec; measured: {', '.join(measured)}")
        elif goal is not None and goal != (right := goal_of_kind(name.partition(":")[0])):
            better = "larger" if right == "max" else "smaller"
            message = f"must be {right}, for {better} values of {name} are better; got {goal}"
            yield experiment.problem((*path[:-1], "goal"), message)


def resolve_metric(name: str, measured: Iterable[str]) -> str | None:
    """Return the measured metric that a spec names in full, or by its kind; ``frechet`` means FID as well."""
    kinds = ("frechet", "fid") if name == "frechet" else (name,)
    return next((metric for metric in measured if metric == name or metric.split(":")[0] in kinds), None)
