"""The model of a run: its denoiser and everything that the family decides about training and sampling it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from repa_lab.data import DataError
from repa_lab.data.latents import LatentSpace
from repa_lab.models.families import FAMILIES
from repa_lab.models.family import network_of, pipeline_of
from repa_lab.models.pretrained import DiffusersDenoiser, adapt, load_denoiser
from repa_lab.models.released import SCHEDULER, class_problem, read_json
from repa_lab.models.scratch import Input, build
from repa_lab.models.tap import Denoiser
from repa_lab.spec import EvaluateConfig, ResolvedOptions, RunConfig
from repa_lab.spec.identity import Run
from repa_lab.training.batches import seeded
from repa_lab.training.checkpoint import load_weights
from repa_lab.training.data import (
    Captions,
    Conditioning,
    Images,
    Labels,
    encode_captions,
    pretrained_folder,
    text_cache,
)
from repa_lab.training.device import PRECISION, measuring_precision
from repa_lab.training.diffusion import Flow, Process, process_of
from repa_lab.training.sampling import FieldSampler, PipelineSampler, Sampler


@dataclass(frozen=True)
class Model:
    """The model of a run.

    Attributes:
        denoiser: with ``forward(x, t, **condition)`` and ``tap(block_index)``.
        process: the noise process.
        conditioning: labels or captions of images and samples.
        sampler: returns the sampler of a measuring protocol.
        at_once: images in one forward pass while measuring.
    """

    denoiser: Denoiser
    process: Process
    conditioning: Conditioning
    sampler: Callable[[EvaluateConfig], Sampler]
    at_once: int


def open_model(run: Run, images: Images, options: ResolvedOptions, cache: Path, device: torch.device) -> Model:
    """Build the model of a run, initialised from the run's own random stream or pretrained.

    Args:
        cache: folder of the encoded captions.

    Raises:
        PretrainedError: the pretrained pipeline cannot be loaded, or is of another family.
        ProcessError: the noise of its scheduler is not known.
        DataError: the images have more classes than the pretrained model.
    """
    if run.config.model.pretrained is None:
        return _from_scratch(run, images, device)
    return _pretrained(run, images, options, cache, device)


def open_trained(
    run: Run,
    checkpoint: Path,
    weights: str,
    images: Images,
    options: ResolvedOptions,
    cache: Path,
    device: torch.device,
) -> Model:
    """Build the model of a run with the weights of a checkpoint, in evaluation mode on the device.

    Missing captions are encoded. The denoiser computes in float32, or see :func:`device.computing_in`.

    Raises:
        PretrainedError: the pretrained pipeline cannot be loaded.
        KeyError: the checkpoint lacks a weight.
    """
    if run.config.model.pretrained is not None:
        family, folder = FAMILIES[run.config.model.family], pretrained_folder(run.config.model)
        encode_captions(family, folder, images, (), options, cache, device)
    model = open_model(run, images, options, cache, device)
    load_weights(model.denoiser, checkpoint, weights)
    model.denoiser.eval().to(device)
    return model


def build_denoiser(config: RunConfig, given: Input | None, seed: int, frozen: torch.dtype = torch.float32) -> Denoiser:
    """Build the denoiser of a run before its first step; it depends on model and seed only, not on the regularizer.

    Args:
        given: the input that a family from scratch is built for.
        frozen: precision of the weights that LoRA does not train.
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


def _from_scratch(run: Run, images: Images, device: torch.device) -> Model:
    config, given, classes = run.config, images.input, images.source.num_classes
    denoiser = build_denoiser(config, given, run.seed)
    shape = (given.channels, *given.size)
    return Model(
        denoiser,
        Flow(),
        Labels(images.source.labels, classes, classes),
        lambda protocol: FieldSampler(denoiser, images.space, shape, classes, protocol, run.seed, device),
        config.evaluate.batch_size,
    )


def _pretrained(run: Run, images: Images, options: ResolvedOptions, cache: Path, device: torch.device) -> Model:
    config, folder = run.config, pretrained_folder(run.config.model)
    denoiser = build_denoiser(config, None, run.seed, PRECISION[options.precision])
    assert isinstance(denoiser, DiffusersDenoiser)
    assert isinstance(images.space, LatentSpace)
    conditioning = _conditioning(denoiser, images, folder, options, cache)
    side, frames, vae = config.data.side, config.data.clip_frames, images.space.vae
    precision = measuring_precision(config.evaluate, options.precision)

    def sampler(protocol: EvaluateConfig) -> PipelineSampler:
        return PipelineSampler(folder, denoiser, vae, conditioning, protocol, side, frames, run.seed, device, precision)

    process = process_of(read_json(folder / SCHEDULER / "scheduler_config.json") or {})
    return Model(denoiser, process, conditioning, sampler, sampler(config.evaluate).at_once)


def _conditioning(
    denoiser: DiffusersDenoiser, images: Images, folder: Path, options: ResolvedOptions, cache: Path
) -> Conditioning:
    """Return captions if the family has text encoders, else labels."""
    pipeline = pipeline_of(denoiser.family)
    net: Any = denoiser.net
    if pipeline.num_classes is not None:
        known = pipeline.num_classes(net.config)
        if images.source.num_classes > known:
            raise DataError("path", class_problem(images.source.num_classes, known))
        (name,) = network_of(denoiser.family).condition(net.config, 0)
        return Labels(images.source.labels, known, images.source.num_classes, name)
    texts = text_cache(denoiser.family, folder, options, cache)
    return Captions(images, texts, pipeline.sizes, net.config, network_of(denoiser.family).lengths)
