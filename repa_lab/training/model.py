"""What a run trains: the denoiser, and all that its family decides about training it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from repa_lab.data.autoencoder import load_autoencoder
from repa_lab.data.errors import DataError
from repa_lab.data.space import LatentSpace
from repa_lab.models.families import FAMILIES
from repa_lab.models.family import network_of, pipeline_of
from repa_lab.models.pretrained import DiffusersDenoiser, adapt, load_denoiser
from repa_lab.models.released import SCALING, SCHEDULER, PretrainedError, class_problem, locate, problem_with, read_json
from repa_lab.models.scratch import Input, build
from repa_lab.models.tap import Denoiser
from repa_lab.spec import EvaluateConfig, ModelConfig, RunConfig, RunOptions
from repa_lab.spec.identity import Run
from repa_lab.training.conditioning import Captions, Conditioning, Labels
from repa_lab.training.device import PRECISION, measuring_precision
from repa_lab.training.diffusion import Flow, Process, process_of
from repa_lab.training.images import Announce, Images, open_images
from repa_lab.training.pipelines import PipelineSampler
from repa_lab.training.sampling import FieldSampler, Sampler, Sampling
from repa_lab.training.streams import seeded
from repa_lab.training.texts import text_cache


@dataclass(frozen=True)
class Model:
    """What a run trains.

    Attributes:
        denoiser: with ``forward(x, t, **condition)`` and ``tap(block_index)``.
        process: the noise it is trained against.
        conditioning: what it is told of images and samples.
        sampler: draws with it by a protocol.
        at_once: images that it is shown at a time when it is measured.
    """

    denoiser: Denoiser
    process: Process
    conditioning: Conditioning
    sampler: Callable[[EvaluateConfig], Sampler]
    at_once: int


def open_model(run: Run, images: Images, options: RunOptions, cache: Path, device: torch.device) -> Model:
    """The model of a run, initialised from its own stream or pretrained.

    Args:
        run: the run.
        images: its data.
        options: precisions.
        cache: where encoded captions are.
        device: where samples are drawn.

    Raises:
        PretrainedError: the pretrained pipeline cannot be had or is of another family.
        ProcessError: its scheduler's noise is not known.
    """
    if run.config.model.pretrained is None:
        return _from_scratch(run, images, device)
    return _pretrained(run, images, options, cache, device)


def build_denoiser(config: RunConfig, given: Input | None, seed: int, frozen: torch.dtype = torch.float32) -> Denoiser:
    """A run's denoiser before its first step: the same for every arm with this model and seed, whatever its
    regularizer.

    Args:
        config: the run's settings.
        given: what a family from scratch is built for.
        seed: the run's seed.
        frozen: the precision of weights that LoRA leaves alone.
    """
    family, size = FAMILIES[config.model.family], config.model.size
    if config.model.pretrained is None:
        assert given is not None
        with seeded(seed, "init"):
            return build(family.name, size or "", given)
    folder = pretrained_folder(config.model)
    if config.model.train == "full":
        return load_denoiser(folder, family)
    denoiser = load_denoiser(folder, family, frozen)
    with seeded(seed, "init"):
        adapt(denoiser, config.model.rank)
    return denoiser


def pretrained_folder(model: ModelConfig) -> Path:
    """The folder of a pretrained pipeline that is of the family.

    Raises:
        PretrainedError: it is not to be had, or not of the family.
    """
    assert model.pretrained is not None
    folder = _located(model.pretrained, model.revision)
    if message := problem_with(folder, FAMILIES[model.family]):
        raise PretrainedError(message)
    return folder


def open_data(config: RunConfig, cache: Path, device: torch.device, announce: Announce | None = None) -> Images:
    """The data of a run, in the latents of its pretrained pipeline if there is one and `data.vae` names no other.

    Raises:
        DataError: the data cannot be used.
        PretrainedError: the pipeline is not to be had.
    """
    if config.model.pretrained is None:
        return open_images(config.data, cache, announce, device)
    folder, pipeline = pretrained_folder(config.model), pipeline_of(FAMILIES[config.model.family])
    if config.data.vae is not None:
        _require_scaling(config.data.vae, folder)
    return open_images(config.data, cache, announce, device, str(folder), pipeline.shifted)


def _require_scaling(vae: str, folder: Path) -> None:
    """Refuse before anything is encoded a VAE that the pipeline in this folder could not draw with."""
    given, own = load_autoencoder(vae, "vae").model.config, read_json(folder / "vae" / "config.json") or {}
    lacking = [name for name in SCALING if own.get(name) is not None and given.get(name) is None]
    if lacking:
        names = ", ".join(lacking)
        raise DataError(
            "vae", f"the config of '{vae}' lacks {names}, which that of the pipeline's own VAE has and it draws by"
        )


# Asking the hub takes seconds; what was found stays for as long as the process.
_located = functools.cache(locate)


def _from_scratch(run: Run, images: Images, device: torch.device) -> Model:
    config, given = run.config, images.input
    denoiser = build_denoiser(config, given, run.seed)
    source, classes = images.source, images.source.num_classes

    def sampler(tier: EvaluateConfig) -> FieldSampler:
        shape = (given.channels, *given.size)
        sampling = Sampling(shape, classes, tier.sampler, tier.guidance, run.seed, tier.labels)
        return FieldSampler(sampling, denoiser, images.space, device, tier.rounding)

    return Model(
        denoiser,
        Flow(),
        Labels(source.labels, classes, classes),
        sampler,
        config.evaluate.batch_size,
    )


def _pretrained(run: Run, images: Images, options: RunOptions, cache: Path, device: torch.device) -> Model:
    config, folder = run.config, pretrained_folder(run.config.model)
    denoiser = build_denoiser(config, None, run.seed, PRECISION[options.precision])
    assert isinstance(denoiser, DiffusersDenoiser)
    assert isinstance(images.space, LatentSpace)
    conditioning = _conditioning(denoiser, images, folder, options, cache)
    side, vae, precision = config.data.side, images.space.vae, measuring_precision(config.evaluate, options.precision)

    def sampler(tier: EvaluateConfig) -> PipelineSampler:
        return PipelineSampler(folder, denoiser, vae, conditioning, tier, side, run.seed, device, precision)

    process = process_of(read_json(folder / SCHEDULER / "scheduler_config.json") or {})
    return Model(denoiser, process, conditioning, sampler, sampler(config.evaluate).at_once)


def _conditioning(
    denoiser: DiffusersDenoiser, images: Images, folder: Path, options: RunOptions, cache: Path
) -> Captions | Labels:
    """Captions where the family has text, else classes."""
    network, pipeline = network_of(denoiser.family), pipeline_of(denoiser.family)
    net: Any = denoiser.net
    if pipeline.num_classes is not None:
        known = pipeline.num_classes(net.config)
        if images.source.num_classes > known:
            raise DataError("path", class_problem(images.source.num_classes, known))
        (name,) = network.condition(net.config, 0)
        return Labels(images.source.labels, known, images.source.num_classes, name)
    texts = text_cache(denoiser.family, folder, options, cache)
    return Captions(images.source, images.split.train, texts, pipeline.sizes, net.config)
