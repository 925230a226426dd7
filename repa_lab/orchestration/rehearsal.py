"""A rehearsal: every arm of an experiment with tiny random models and a few images, before any hour on a GPU.

A rehearsal goes through all that the experiment will: the same families and classes of models, as many blocks, the same
regularizers, schedules, encoders of the same patches, checkpoints, measurements, a resume, and the report. Its numbers
mean nothing.
"""

from __future__ import annotations

import functools
import math
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from repa_lab.align.settings import ProjectorSettings, RegularizerSettings
from repa_lab.data.huggingface import write_captions
from repa_lab.data.settings import ClipsSettings, FolderSettings, HubSettings, SourceSettings
from repa_lab.encoders.registry import ENCODERS
from repa_lab.files import digest
from repa_lab.metrics.protocol import quality_names
from repa_lab.models.families import FAMILIES
from repa_lab.models.family import NARROW, Component, Family, shape_of
from repa_lab.spec import Arm, BudgetConfig, CompareConfig, Experiment, RunConfig, RunOptions
from repa_lab.spec.document import value_at
from repa_lab.spec.evaluate import FullConfig
from repa_lab.spec.options import Objective
from repa_lab.timm_models import TINY

SUFFIX = "-rehearsal"
MARK = "REHEARSAL with tiny random models, no evidence"
_STEPS, _BATCH, _EVERY, _SAMPLES, _HOLDOUT, _TRIALS = 4, 2, 2, 16, 8, 2
_MAX_NAME = 64
_SMALL_ENCODER = "efficientnet_lite0"  # on every machine that has repa-lab
_STEP_FIELDS = ("warmup_steps", "decay_steps", "cutoff_step")  # of a schedule
_IMAGES = 24
_CLASSES = ("circle", "square")
_COLOURS = ("red", "green", "blue", "orange", "purple", "black")
_SIZES = ((96, 96), (128, 96), (96, 128))  # of generated images, so that there are several aspects


def rehearsal_root(root: Path) -> Path:
    """Return the root of a runs root's rehearsals: another folder, so that none is taken for a result."""
    return root.with_name(root.name + SUFFIX)


def rehearse_experiment(experiment: Experiment, root: Path) -> Experiment:
    """Return the experiment as it is rehearsed; the models and images of its runs are written below ``root``.

    Args:
        experiment: an experiment that is checked but for the files that it names.
        root: the runs root of rehearsals.
    """
    tiny = TinyAssets(root / "cache" / "rehearsal")
    search = experiment.search and experiment.search.model_copy(
        update={"trials": min(experiment.search.trials, _TRIALS), "objective": _objective(experiment.search.objective)}
    )
    return replace(
        experiment,
        name=experiment.name[: _MAX_NAME - len(SUFFIX)] + SUFFIX,
        question=f"{MARK}: {experiment.question or experiment.name}",
        arms=tuple(_rehearsed(arm, tiny) for arm in experiment.arms),
        seeds=experiment.seeds[:1],
        compare=CompareConfig(baseline=experiment.compare.baseline),
        search=search,
        budget=BudgetConfig(),
        stop=(),
        run=_options(experiment.run),
    )


@dataclass(frozen=True)
class RehearsedArm(Arm):
    """An arm that is rehearsed: comparisons and conditions still see the settings of the arm that is meant."""

    meant: RunConfig = field(kw_only=True)
    tiny: TinyAssets = field(kw_only=True, compare=False, repr=False)

    @property
    def asked(self) -> RunConfig:
        """The settings of the arm that is meant."""
        return self.meant

    def with_settings(self, settings: Mapping[str, Any]) -> Arm:
        """Return the rehearsal of the arm that is meant with other settings."""
        return _rehearsed(super().with_settings(settings), self.tiny)


def _rehearsed(arm: Arm, tiny: TinyAssets) -> RehearsedArm:
    config = _rehearsed_config(arm.config, tiny)
    return RehearsedArm(arm.label, arm.levels, config, arm.draft, meant=arm.config, tiny=tiny)


def _rehearsed_config(meant: RunConfig, tiny: TinyAssets) -> RunConfig:
    value = meant.model_dump(mode="json")
    value["model"] |= _model(meant, tiny)
    value["data"] = _data(meant, tiny)
    value["train"] |= {"steps": min(meant.train.steps, _STEPS), "batch_size": min(meant.train.batch_size, _BATCH)}
    value["evaluate"] |= _evaluate(meant)
    for path, _ in meant.encoder_paths:
        section = value_at(value, path)
        section |= _encoder(section, tiny)
    for path, settings in meant.regularizer_paths:
        section = value_at(value, path)
        if isinstance(projector := getattr(settings, "projector", None), ProjectorSettings):
            section["projector"]["width"] = min(projector.width, 32)
        if "layers" in section:  # of an encoder; a tiny one has two
            section["layers"] = 1
        section["schedule"] |= _schedule(settings, meant.train.steps)
    return RunConfig.model_validate(value)


def _model(meant: RunConfig, tiny: TinyAssets) -> dict[str, Any]:
    family, size = FAMILIES[meant.model.family], meant.model.size
    if family.from_scratch:
        return {"size": f"{NARROW}{(size or '').removeprefix(NARROW)}"}
    return {"pretrained": str(tiny.pipeline(family)), "revision": None, "rank": min(meant.model.rank, 2)}


def _data(meant: RunConfig, tiny: TinyAssets) -> dict[str, Any]:
    data, family = meant.data, FAMILIES[meant.model.family]
    stride = shape_of(family, meant.model.size).stride
    token = stride * (8 if family.from_scratch and data.vae else family.latent_stride)  # pixels along each side
    vae = data.vae and str(tiny.autoencoder() if family.from_scratch else tiny.pipeline(family))
    fields: dict[str, Any] = {**data.model_dump(mode="json"), "vae": vae}
    if isinstance(data, FolderSettings | HubSettings):
        is_latent = data.vae is not None or meant.model.pretrained is not None
        fields = {name: fields[name] for name in SourceSettings.model_fields} | tiny.images(data)
        fields["resolution"] = max(32, 2 * token, 64 if is_latent else 0)
        fields["holdout"] = min(data.holdout or _HOLDOUT, _HOLDOUT)
    if data.buckets is not None:
        fields["buckets"] = {"step": token, "max_aspect": data.buckets.max_aspect}
    return fields


def _evaluate(meant: RunConfig) -> dict[str, Any]:
    config = meant.evaluate
    return {
        "every": min(config.every, _EVERY),
        "samples": _SAMPLES,
        "batch_size": _SAMPLES,
        "sampler": {**config.sampler.model_dump(mode="json"), "steps": 2},
        "extractor": {"name": _SMALL_ENCODER},
        "metrics": _metrics(config.metrics),
        "full": config.full and _full(config.full),
    }


def _full(full: FullConfig) -> dict[str, Any]:
    """Return the protocol of milestones: at the end alone, with twice the samples of the usual protocol."""
    return {
        "samples": 2 * _SAMPLES,
        "sampler": full.sampler and {**full.sampler.model_dump(mode="json"), "steps": 2},
        "guidance": full.guidance and full.guidance.model_dump(mode="json"),
        "labels": full.labels,
        "metrics": full.metrics and _metrics(full.metrics),
    }


def _metrics(metrics: Iterable[str]) -> list[str]:
    """Return the metrics that have a meaning with the extractor of rehearsals."""
    return [metric for metric in metrics if quality_names(metric, _SMALL_ENCODER, _SAMPLES, "")]


def _encoder(encoder: dict[str, Any], tiny: TinyAssets) -> dict[str, Any]:
    """Return a tiny encoder of the same kind; where the kind has none, or is small already, EfficientNet-Lite0."""
    from repa_lab.encoders.encoder import has_tiny

    name = encoder["name"]
    if not name.startswith(TINY) and name != _SMALL_ENCODER:
        name = f"{TINY}{name}" if has_tiny(name) else _SMALL_ENCODER
    known = ENCODERS.get(name.removeprefix(TINY))
    size, tae = 4 * (known.stride if known else 16), encoder["tae"] and str(tiny.tiny_autoencoder())
    return {"name": name, "image_size": encoder["image_size"] and size, "weights": None, "tae": tae}


def _schedule(meant: RegularizerSettings, steps: int) -> dict[str, Any]:
    """Return the schedule over the few steps in the proportions of the many, so that every part of it is used."""
    shape = meant.schedule.model_dump(mode="json")
    ratio = min(1.0, _STEPS / steps)
    scaled = {name: math.ceil(shape[name] * ratio) for name in _STEP_FIELDS if shape[name] is not None}
    if 0 < scaled["decay_steps"] <= scaled["warmup_steps"]:
        scaled["decay_steps"] = scaled["warmup_steps"] + 1
    return {**scaled, "similarity_min_count": 1, "probe_every": 1}


def _options(options: RunOptions) -> RunOptions:
    """Return the options for this machine, one process a run, and without minutes before the first step."""
    disabled = options.wandb.model_copy(update={"mode": "disabled"})
    updates: dict[str, Any] = {"share": False, "log_every": 1, "checkpoint_every": None, "wandb": disabled}
    updates |= {"executor": "local", "gpus_per_run": 1}
    updates["micro_batch"] = 1 if isinstance(options.micro_batch, int) else options.micro_batch
    updates |= {name: False for name in ("compile", "encoder_compile") if getattr(options, name) == "auto"}
    if not Path("/dev/nvidia0").exists():
        updates |= {"device": "auto", "compile": False, "encoder_compile": False}
        updates["precision"] = "fp32" if options.precision == "fp16" else options.precision
    return options.model_copy(update=updates)


def _objective(objective: Objective | tuple[Objective, ...]) -> Any:
    """Return the objective, or each of several, with ``frechet`` for FID, which a rehearsal does not measure."""
    if isinstance(objective, tuple):
        return tuple(map(_objective, objective))
    is_distance = objective.metric.startswith(("fid", "frechet"))
    return objective.model_copy(update={"metric": "frechet"}) if is_distance else objective


@dataclass(frozen=True)
class TinyAssets:
    """Tiny random pipelines and autoencoders, and a few images, below a folder; each is written once and kept."""

    folder: Path

    def pipeline(self, family: Family) -> Path:
        """Return a tiny random pipeline of a family, its denoiser with as many blocks as the released one."""

        def write(folder: Path) -> None:
            from repa_lab.models.tiny import full_depth, write_tiny_pipeline

            write_tiny_pipeline(family, folder, config=full_depth(family))

        return self._once(family.name, write)

    def autoencoder(self) -> Path:
        """Return a tiny random autoencoder for a denoiser that is trained from scratch on latents."""

        def write(folder: Path) -> None:
            from repa_lab.models.tiny import build_component, kl_autoencoder

            build_component(kl_autoencoder(4, 0.18215)).save_pretrained(folder)

        return self._once("vae", write)

    def tiny_autoencoder(self) -> Path:
        """Return an autoencoder of the class of TAESD that decodes the same latents."""
        widths = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4}
        counts = {"num_encoder_blocks": (1,) * 4, "num_decoder_blocks": (1,) * 4}

        def write(folder: Path) -> None:
            from repa_lab.models.tiny import build_component

            build_component(Component("diffusers.AutoencoderTiny", {**widths, **counts})).save_pretrained(folder)

        return self._once("tae", write)

    def images(self, data: SourceSettings) -> dict[str, Any]:
        """Return the fields of ``data`` for a few images, or clips: copies of the spec's own, else generated."""
        clips = data if isinstance(data, ClipsSettings) else None
        frames = {"frames": clips.frames, "frame_step": clips.frame_step} if clips else {}
        if isinstance(data, FolderSettings) and not data.is_unset and data.folder.is_dir():
            column = getattr(data, "caption_column", None)
            name = f"images-{digest([str(data.folder.resolve()), column, *frames.values()])[:12]}"
            path = self._once(name, lambda folder: data.copy_few(folder, _IMAGES))
            source = "imagefolder" if data.is_prepared else data.source  # latents are not copied
            return {"source": source, "path": str(path), "caption_column": column, **frames}
        if clips:
            write = functools.partial(_generate, frames=clips.needed_frames)
            return {"source": "clips", "path": str(self._once(f"clips-{clips.needed_frames}", write)), **frames}
        return {"source": "imagefolder", "path": str(self._once("images", _generate))}

    def _once(self, name: str, write: Callable[[Path], None]) -> Path:
        path = self.folder / name
        if not path.exists():
            temporary = path.with_name(f".{name}")
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            write(temporary)
            temporary.rename(path)
        return path.resolve()


def _generate(folder: Path, frames: int = 0) -> None:
    """Draw captioned images of two classes and several aspects, or clips of so many frames in which a shape moves."""
    from PIL import Image, ImageDraw

    captions = {}
    for number in range(_IMAGES):
        kind, colour, size = _CLASSES[number % 2], _COLOURS[number % 6], _SIZES[0 if frames else number % 3]
        place = folder / (f"{number:02d}" if frames else kind)
        place.mkdir(exist_ok=True)
        for frame in range(frames or 1):
            image, left = (
                Image.new("RGB", size, (40 + 8 * number, 200, 255 - 8 * number)),
                10 + number + 20 * frame // (frames or 1),
            )
            draw = ImageDraw.Draw(image)
            {"circle": draw.ellipse, "square": draw.rectangle}[kind]((left, 12, left + 50, 62), fill=colour)
            image.save(place / (f"{frame}.png" if frames else f"{number:02d}.png"))
        name = place.name if frames else f"{kind}/{number:02d}.png"
        captions[name] = f"a {colour} {kind}{' that moves' if frames else ''}, number {number}"
    write_captions(folder, captions, "text")
