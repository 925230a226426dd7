"""From SimpleTuner to a spec: the keys of its regularizers, and the other settings that a spec needs.

Every value that SimpleTuner would use is written, its defaults included. Settings without a field in a spec are named,
and so are differences between what the two trainers compute from the same number.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from repa_lab.bridge import simpletuner
from repa_lab.bridge.config import PREFIXES, Config, read_config
from repa_lab.bridge.simpletuner import Prefix
from repa_lab.errors import Place, Problem, SpecError, printable
from repa_lab.models.family import Family
from repa_lab.spec.document import Draft, to_yaml
from repa_lab.spec.evaluate import EvaluateConfig
from repa_lab.spec.experiment import load_spec

Fields = Mapping[str, Any]  # of the spec, by dotted path
Remark = tuple[str, str]  # a key or nothing, and the message

_WIDTH = 110
_BASELINE = (
    "# include: [{label: baseline, set: {regularizer.type: none}}]  # remove the first # to compare with a baseline\n"
)
_ORDER = ("name", "question", "model", "regularizer", "data", "train", "evaluate", "seeds", "run")
_PASSES = 3  # forward passes that a training step costs: a backward pass costs about two
_MIN_SAMPLES = 16  # the fewest that a spec can ask for
_FEW_SAMPLES = 2048  # the width of Inception's features
# Completes a fragment to a spec, so that it can be validated.
_REQUIRED = {"name": "fragment", "model.family": "none", "data.source": "imagefolder", "train.steps": 1}


@dataclass(frozen=True)
class Imported:
    """A spec as the text of a YAML file, and remarks on the import, a line each."""

    spec: str
    remarks: tuple[str, ...]


def import_config(words: Sequence[str]) -> Imported:
    """Turn a SimpleTuner config into a spec, or into a fragment for ``use:`` if the config names no ``model_family``.

    Args:
        words: the name of a file with a JSON object, or flags.

    Raises:
        SpecError: with every problem, each at its key.
    """
    config = read_config(words)
    members, rest = _regularizers(config), _rest(config)
    try:
        load_spec(_document(members, rest if config.family else {**_REQUIRED, **rest}))
    except SpecError as error:
        problems = [config.problem(_key_of(problem, config), problem.message) for problem in error.problems]
        raise SpecError(problems) from None
    messages = [config.problem(key, message) for key, message in _remarks(config, {**members[0], **rest})]
    source = config.file or "flags"
    header = [f"Imported from {source}, a SimpleTuner config, by `repa-lab import`. What there is to know:"]
    header += [f"- {remark.path}: {remark.message}" if remark.path else f"- {remark.message}" for remark in messages]
    comments = textwrap.TextWrapper(_WIDTH, initial_indent="# ", break_on_hyphens=False)
    lines = []
    for text in header:
        comments.subsequent_indent = "#   " if text.startswith("- ") else "# "
        lines += comments.wrap(printable(text))
    lines.append(to_yaml(_document(members, rest), _WIDTH))
    baseline = _BASELINE if config.family and (config.prefix or config.added) else ""
    return Imported("\n".join(lines) + baseline, tuple(map(str, messages)))


def _regularizers(config: Config) -> list[dict[str, Any]]:
    """Return the fields of each regularizer, in the order in which a person would write them."""
    members = [_aligned(config, config.prefix)] if config.prefix else []
    for kind in config.added:
        members.append({"regularizer.type": kind, **config.fields(simpletuner.ADDED[kind].keys)})
        if kind == "self_transcendence":
            members[-1] |= {"regularizer.projector.type": "mlp", "regularizer.loss": "mse"}
    return members or [{"regularizer.type": "none"}]


def _aligned(config: Config, prefix: Prefix) -> dict[str, Any]:
    """Return the fields of the regularizer that aligns with an encoder."""
    family = config.family
    fields = {
        "regularizer.type": config.regularizer,
        "regularizer.weight": 0.0,
        "regularizer.block_index": "mid",
        **config.fields(simpletuner.KEYS[prefix]),
        **config.fields((*simpletuner.FRAMES, simpletuner.CUMULATIVE) if config.regularizer == "crepa" else ()),
        "regularizer.projector.type": "conv" if config.irepa else "linear",
        **config.fields(simpletuner.IREPA if config.irepa else ()),
    }
    if prefix == "crepa" and "crepa_model" in config.values:
        fields |= config.fields([simpletuner.CREPA_MODEL])
    encoder = "regularizer.encoder"
    if simpletuner.is_language_model(fields[f"{encoder}.name"]):
        fields[f"{encoder}.name"] = "dinov2_vitg14"
    if fields[f"{encoder}.pixels"] == "tae":
        tiny = simpletuner.TINY_AUTOENCODERS.get(family.name) if family else None
        fields |= {f"{encoder}.tae": tiny} if tiny else {f"{encoder}.pixels": "vae"}
    if fields.get("regularizer.spatial_align", True):
        # Without a family: UNets have the smaller grid at SimpleTuner's defaults, transformers the larger.
        side = "teacher" if prefix == "urepa" else "student"
        if family is not None:
            grids = (fields[f"{encoder}.name"], fields[f"{encoder}.image_size"])
            side = simpletuner.resample_side(family, None, config.resolution, *grids) or "student"
        fields |= {"regularizer.resample.side": side, "regularizer.resample.when": "after"}
    schedule = "regularizer.schedule"
    warmup, end = fields[f"{schedule}.warmup_steps"], fields[f"{schedule}.decay_steps"]
    if fields[f"{schedule}.type"] != "constant" and 0 < end <= warmup:
        # In SimpleTuner a decay that ends during the warm-up takes one step after it.
        fields[f"{schedule}.decay_steps"] = warmup + 1
    if fields[f"{schedule}.similarity_threshold"] is not None:
        # SimpleTuner judges the similarity from the first step on, and at every step.
        fields[f"{schedule}.similarity_min_count"] = 1
        if fields[f"{schedule}.threshold_mode"] == "recoverable":
            fields[f"{schedule}.probe_every"] = 1
    return fields


def _rest(config: Config) -> dict[str, Any]:
    """Return the fields beside the regularizer: those that a spec needs, or those that were given without a family."""
    family, data_set = config.family, config.data_set

    def is_written(name: str) -> bool:
        return family is not None or name in config.values

    fields: dict[str, Any] = {}
    if family is not None:
        source = "clips" if family.is_video else "imagefolder"
        fields |= {"model.family": family.name, "data.source": source, "data.path": None}
    if data_set is not None:
        fields |= {"data.frames": frames} if (frames := data_set.values.get("video.num_frames")) else {}
        fields |= {"data.path": data_set.folder} if data_set.folder else {}
        fields |= {"data.buckets.step": 64, "data.buckets.max_aspect": 2.0} if data_set.keeps_aspect else {}
    fields |= config.fields(key for key in simpletuner.REST if is_written(key.name))
    if is_written("train_batch_size"):
        micro_batch, accumulation = config.value("train_batch_size"), config.value("gradient_accumulation_steps")
        fields["train.batch_size"] = micro_batch * accumulation
        fields |= {"run.micro_batch": micro_batch} if accumulation > 1 else {}
    if is_written("use_ema"):
        fields["train.ema"] = config.value("ema_decay") if config.value("use_ema") else 0.0
    if is_written("resolution") or (data_set and "resolution" in data_set.values):
        fields["data.resolution"] = config.resolution
    if "seed" in config.values:
        fields["seeds"] = [config.values["seed"]]
    if "validation_guidance" in config.values:
        fields["evaluate.guidance.scale"] = config.value("validation_guidance")
    if is_written("validation_num_inference_steps"):
        fields["evaluate.sampler.steps"] = max(config.value("validation_num_inference_steps"), 2)
    if family is not None:
        types = [*([config.regularizer] if config.regularizer else []), *config.added]
        source = config.file.name if config.file else "the flags"
        steps = fields["train.steps"] or simpletuner.STAND_IN_STEPS
        if family.network and family.network.uncheckpointed:
            fields["run.gradient_checkpointing"] = False
        # One evaluation, at the end, that takes about as many forward passes as the training.
        affordable = steps * fields["train.batch_size"] * _PASSES // fields["evaluate.sampler.steps"]
        fields |= {
            "name": "_".join([family.name, *(types or ["none"])]),
            "question": f"What do the settings of {source} do to {family.name}?",
            "model.pretrained": config.pretrained,
            "train.steps": steps,
            "evaluate.every": steps,
            "evaluate.samples": min(max(affordable, _MIN_SAMPLES), EvaluateConfig().samples),
        }
    return fields


def _document(members: Sequence[Fields], rest: Fields) -> dict[str, Any]:
    """Return the spec, with a list of regularizers if there are several."""
    document = _nested({**members[0], **rest})
    if len(members) > 1:
        document["regularizer"] = [_nested(member)["regularizer"] for member in members]
    return document


def _nested(fields: Fields) -> dict[str, Any]:
    draft = Draft({section: {} for section in _ORDER})
    for path, value in fields.items():
        if value is not None or not path.startswith("run."):  # of which repa-lab chooses
            draft.set(path, value, Place(None))
    return {section: value for section, value in draft.value.items() if value != {}}


def _key_of(problem: Problem, config: Config) -> str:
    """Return the key that sets the problem's field; else the key inside it that the message mentions first."""
    section, _, place = problem.path.partition(".")
    number, _, field = place.partition(".")
    path, others = problem.path, tuple[str, ...]()
    if section == "regularizer" and number.isdecimal():  # of several
        path = f"{section}.{field}"
        others = tuple(prefix for index, prefix in enumerate(config.prefixes) if index != int(number))
    given = [simpletuner.READABLE[name] for name in config.values if config.is_on(name) and not name.startswith(others)]
    setting = [key.name for key in given if f"{path}.".startswith(f"{key.field}.")]
    inside = [key for key in given if key.field.startswith(f"{path}.")]
    places = sorted((problem.message.find(key.field.rpartition(".")[2]), key.name) for key in inside)
    return next(iter([*setting, *(name for place, name in places if place >= 0)]), problem.path)


# ---- remarks: what is not carried over, stand-ins, and differences between the trainers


def _remarks(config: Config, fields: Fields) -> Iterator[Remark]:
    """Yield all remarks, the most important first."""
    if config.prefix:
        yield from _differences(config, fields)
    if config.regularizer == "crepa":
        yield from _frames(config, fields)
    yield from _added(config)
    if not config.prefix and not config.added and not any(key.name in config.values for key in simpletuner.REST):
        yield "", "neither crepa_enabled nor urepa_enabled is true: there is no regularizer"
    yield from _not_carried(config, fields)
    if config.family is None:
        yield "", "no model_family, so this is a fragment: name it with use: in a spec, or add model_family"
    if config.family or "data_backend_config" in config.values:
        yield from _images(config, fields)
    if config.family:
        yield from _stand_ins(config, config.family, fields)


def _differences(config: Config, fields: Fields) -> Iterator[Remark]:
    """Name where SimpleTuner computes something else from the same number."""
    prefix, family, schedule = config.prefix, config.family, "regularizer.schedule"
    if family is not None and family.name in simpletuner.NEVER_ATTACHED:
        never = f"SimpleTuner never attaches its regularizer to {family.name}"
        yield f"{prefix}_enabled", f"{never}: what it trained there was a baseline; here it attaches"
    yield (
        f"{prefix}_enabled",
        "SimpleTuner's target is the encoder's CLS token alone, to which it shrinks the student's grid; here the "
        "targets are the patch tokens, so neither losses nor good weights carry over",
    )
    if prefix == "crepa":
        block = fields["regularizer.block_index"]
        yield "crepa_block_index", f"counted from 0, as there: block_index {block} is the papers' depth {block + 1}"
    elif config.value("urepa_manifold_weight") == 0:
        yield "urepa_manifold_weight", "SimpleTuner takes 0 for 3.0; here 0 is 0. Write 3.0 to compute what it computed"
    else:
        message = "with one target token there, its manifold loss is 0 whatever the weight"
        yield "urepa_manifold_weight", f"{message}; here it compares pairs of patches"
    if config.value(f"{prefix}_lambda") == 0:
        message = "here 0 is 0, and the encoder is not run; SimpleTuner runs it all the same"
        yield f"{prefix}_lambda", message + (", and takes 0 for 0.5 without a schedule" if prefix == "urepa" else "")
    yield (
        f"{prefix}_use_tae",
        "SimpleTuner's encoder looks at decoded latents, squashed to a square, not at the images: pixels: "
        f"{fields['regularizer.encoder.pixels']} does the same but for the squash (the papers' way is image)",
    )
    if config.irepa:
        yield "irepa_enabled", "projector.type: conv and spatial_norm are SimpleTuner's iREPA"
    else:
        yield "", "projector: {type: linear} is SimpleTuner's LayerNorm + Linear; the papers' is mlp"
    if side := fields.get("regularizer.resample.side"):
        larger = "the larger grid" if family else "the larger grid (unknown without model_family)"
        yield "", f"resample.side: {side}, because SimpleTuner shrinks {larger}; the papers resample the student"
    if config.value(f"{prefix}_decay_steps") != (decay := fields[f"{schedule}.decay_steps"]):
        message = "the decay ends within the warm-up, so SimpleTuner drops the weight one step after the warm-up"
        yield f"{prefix}_decay_steps", f"{message}: decay_steps: {decay} does the same"
    elif fields[f"{schedule}.type"] != "constant":
        message = "the step at which the decay ends, warm-up included, in both; SimpleTuner's documentation calls it a"
        yield f"{prefix}_decay_steps", f"{message} duration"
    if fields[f"{schedule}.similarity_threshold"] is not None:
        yield (
            f"{prefix}_similarity_threshold",
            "SimpleTuner has no bias correction and no minimum count, and acts a step earlier: similarity_min_count: 1 "
            "comes nearest, though one spike then ends the regularizer; repa-lab's own default is 100",
        )
    if prefix == "crepa" and "crepa_model" in config.values:
        yield "crepa_model", "SimpleTuner documents this key and refuses it; export writes crepa_encoder"


def _frames(config: Config, fields: Fields) -> Iterator[Remark]:
    """Name where SimpleTuner computes something else from the frames of a clip."""
    if "crepa_cumulative_neighbors" in config.values:
        yield "crepa_cumulative_neighbors", "SimpleTuner documents this key and refuses it; export leaves it out"
    message = "a distance that no two latent frames have is refused here; SimpleTuner shortens it"
    yield "crepa_adjacent_distance", message
    if fields["regularizer.schedule.similarity_threshold"] is not None:
        message = "SimpleTuner adds the neighbours' cosines, which may exceed 1; here each frame's own count alone"
        yield "crepa_similarity_threshold", message


def _added(config: Config) -> Iterator[Remark]:
    """Name where SimpleTuner computes something else in the regularizers that it adds to others."""
    if "layersync" in config.added:
        student, teacher = (config.value(f"layersync_{name}_block") for name in ("student", "teacher"))
        yield "layersync_student_block", f"counted from 1 there, and from 0 here: block_index is {student}"
        if teacher is None:
            message = (
                "SimpleTuner takes the student for its own teacher, which teaches nothing; here null is a later block"
            )
            yield "layersync_teacher_block", message
        if str(config.given.get("layersync_lambda")) in ("0", "0.0"):
            yield "layersync_lambda", "SimpleTuner takes 0 for 0.2, and so does the import"
    if "self_transcendence" in config.added:
        message = "the mean over the images in range there; here the others count as 0 in the mean over all"
        yield "distillation_config.weight", message


def _not_carried(config: Config, fields: Fields) -> Iterator[Remark]:
    given = config.given
    for name, (harmless, reason) in simpletuner.LOST.items():
        if name in given and str(given[name]).lower() not in harmless:
            yield name, f"not carried: {reason}"
    for name in ("crepa_encoder", "crepa_model", "urepa_model"):
        if config.is_on(name) and simpletuner.is_language_model(config.values.get(name, "")):
            message = "a vision-language model yields no grid of patch tokens here; dinov2_vitg14 stands in"
            yield name, f"not carried: {message}"
    tae = f"{config.prefix}_use_tae"
    if config.prefix and config.value(tae) == "tae" and fields["regularizer.encoder.pixels"] == "vae":
        latents = f"for the latents of {config.family.name}" if config.family else "without model_family"
        yield tae, f"not carried: no tiny autoencoder is known {latents}; give pixels: tae and tae: yourself"
    of_frames = () if config.is_video else tuple(key.name for key in (*simpletuner.FRAMES, simpletuner.CUMULATIVE))
    without_effect = (*simpletuner.WITHOUT_EFFECT, *of_frames)
    rest = [
        name
        for name in given
        if name in without_effect or not (name in simpletuner.READABLE or name in simpletuner.LOST)
    ]
    if rest:
        yield "", f"not carried, because a spec has no field for them: {', '.join(rest)}"
    off = [name for name in config.values if not config.is_on(name)]
    for prefix in PREFIXES:  # keys of a regularizer that is off have no effect in SimpleTuner either
        if names := [name for name in off if name.startswith(prefix)]:
            yield "", f"not carried, because {prefix}enabled is not true: {', '.join(names)}"


def _images(config: Config, fields: Fields) -> Iterator[Remark]:
    """Describe what comes from the data backend's file, or what is missing without it."""
    key, images = "data_backend_config", config.data_set
    if not (images and images.folder):
        kind = "clips" if config.is_video else "images"
        yield "", f"fill in data.path, the folder of {kind} (--set data.path=FOLDER)"
    if images is None:
        if key in config.values:
            kind = "video" if config.is_video else "image"
            yield key, f"'{config.values[key]}' is not found here or beside the config, or has no {kind} data set"
        return
    if config.is_video:
        message = "here a clip is a subfolder of frames, or a .gif, .webp or .npy: bring the videos into one of them"
        yield key, f"{images.name}: {message}"
    if "video.num_frames" in images.values:
        yield key, f"data.frames is {images.values['video.num_frames']}, from {images.name}"
    if images.folder:
        yield key, f"data.path is '{images.folder}', from {images.name}"
    elif images.kind != "local":
        saved = "save its images to a folder, or with `Dataset.save_to_disk` (data.source: datasets)"
        yield key, f"{images.name} is of type {images.kind}: {saved}"
    if "resolution" in images.values:
        yield key, f"data.resolution is {fields['data.resolution']}, from {images.name}, which overrides the config's"
    if images.keeps_aspect:
        sides = "data.buckets keeps aspects, up to 2 to 1, and the resolution stands for the area"
        yield key, f"{images.name} is not cut to squares: {sides}"
    if images.captions != "textfile":
        here = "here they are read from metadata.jsonl or a .txt beside each image"
        yield key, f"{images.name}: captions are by {images.captions} there; {here}"
    if images.others:
        yield key, f"not carried: a spec has one data set; the others are {', '.join(images.others)}"


def _stand_ins(config: Config, family: Family, fields: Fields) -> Iterator[Remark]:
    """Name values that the config does not give, and those that mean something else without a regularizer too."""
    named, flavour = config.value("pretrained_model_name_or_path"), config.values.get("model_flavour")
    if config.pretrained is None:
        yield "", "fill in model.pretrained: the config names no weights"
    elif flavour and (named or family.name not in simpletuner.FLAVOURS):
        yield "model_flavour", f"not carried: model.pretrained is {config.pretrained}"
    elif not named and not flavour:
        yield "", f"no model_flavour: {config.pretrained} stands in"
    if config.value("gradient_checkpointing") and not fields["run.gradient_checkpointing"]:
        yield "gradient_checkpointing", f"not carried: diffusers cannot checkpoint the blocks of {family.name}"
    if not config.value("max_train_steps"):
        yield "", f"fill in train.steps: there is no max_train_steps, so {simpletuner.STAND_IN_STEPS:,} stand in"
    if not fields["train.ema"]:
        yield "", "use_ema is off, so train.ema is 0.0: the weights of the last step are measured"
    alpha, rank = config.value("lora_alpha"), config.value("lora_rank")
    if alpha not in (None, rank):
        scale = f"the adapter's scale is 1, and {alpha / rank:g} there"
        yield "lora_alpha", f"not carried: here alpha is the rank, so that {scale}"
    if config.given.get("grad_clip_method", "value") != "norm":
        message = "max_grad_norm clips the gradient's norm here, and each of its values there"
        yield "", f"{message} unless grad_clip_method is norm"
    samples = fields["evaluate.samples"]
    noise = ". A Frechet distance of so few samples is mostly noise: raise evaluate.samples"
    cost = f"evaluate: {samples:,} samples, drawn at the end alone, cost about as much as the training"
    yield "", cost + (noise if samples < _FEW_SAMPLES else "")
