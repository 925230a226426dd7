"""The model of a run: its denoiser and everything that the family decides about conditioning, training and sampling."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from repa_lab.data import DataError
from repa_lab.data.cache import Embeddings, Progress, TextCache
from repa_lab.data.folders import fingerprint_files
from repa_lab.data.latents import Autoencoder, LatentSpace, quantise
from repa_lab.models.families import FAMILIES
from repa_lab.models.family import TEXT_LENGTHS, Family, network_of, pipeline_of
from repa_lab.models.pretrained import DiffusersDenoiser, adapt, load_denoiser, sampling_pipeline, text_pipeline
from repa_lab.models.released import SCHEDULER, class_problem, read_json, settings, text_components
from repa_lab.models.scratch import Input, build
from repa_lab.models.tap import Denoiser
from repa_lab.spec import EvaluateConfig, ModelConfig, ResolvedOptions, RunConfig
from repa_lab.spec.identity import Run
from repa_lab.training.batches import Condition, Images, generator, pretrained_folder, seeded
from repa_lab.training.checkpoint import load_weights
from repa_lab.training.device import PRECISION, computing_in, measuring_precision
from repa_lab.training.diffusion import FieldSampler, Flow, Process, kinds_of, process_of, shares

# Held-out images get the same noise in every run, whatever its seed.
MEASURING_SEED = 0
_TEXTS_AT_ONCE = 16
_PIXELS_AT_ONCE = 8 << 20  # eight images of 1024 px
Sizes = Callable[[Any, torch.Tensor], Condition]  # see `repa_lab.models.family.Pipeline.sizes`


@dataclass(frozen=True)
class Model:
    """The model of a run.

    Attributes:
        sampler: returns the sampler of a measuring protocol.
        at_once: images in one forward pass while measuring.
    """

    denoiser: Denoiser
    process: Process
    conditioning: Labels | Captions
    sampler: Callable[[EvaluateConfig], FieldSampler | PipelineSampler]
    at_once: int

    def show(self, images: Images, index: torch.Tensor, timestep: float, device: torch.device) -> None:
        """Run the denoiser on images ``(b,)`` of one size, unconditionally, so that its taps capture them.

        The first image decides the noise. The denoiser is on ``device``.
        """
        draw = generator(MEASURING_SEED, "held-out", int(index[0]))
        stored = images.space.read(index)
        x = images.space.encode(stored, images.space.draw(stored, len(stored), draw))
        t = torch.full((len(x),), timestep)
        x_t, _ = self.process.corrupt(x, torch.randn(x.shape, generator=draw), t)
        null = self.conditioning(index, torch.ones(len(index), dtype=torch.bool))
        self.denoiser(x_t.to(device), t.to(device), **{name: value.to(device) for name, value in null.items()})


def open_model(run: Run, images: Images, options: ResolvedOptions, cache: Path, device: torch.device) -> Model:
    """Build the model of a run, initialised from the run's own random stream or pretrained.

    Raises:
        PretrainedError: the pretrained pipeline cannot be loaded, is of another family, or its noise is not known.
        DataError: the images have more classes than the pretrained model.
    """
    config = run.config
    if config.model.pretrained is None:
        given, classes = images.input, images.source.num_classes
        network, shape = build_denoiser(config, given, run.seed), (given.channels, *given.size)
        return Model(
            network,
            Flow(),
            Labels(images.source.labels, classes, classes),
            lambda protocol: FieldSampler(network, images.space, shape, classes, protocol, run.seed, device),
            config.evaluate.batch_size,
        )
    folder = pretrained_folder(config.model)
    denoiser = build_denoiser(config, None, run.seed, PRECISION[options.precision])
    assert isinstance(denoiser, DiffusersDenoiser)
    assert isinstance(images.space, LatentSpace)
    net, pipeline, family, vae = denoiser.net, pipeline_of(denoiser.family), denoiser.family, images.space.vae
    conditioning: Labels | Captions
    if pipeline.num_classes is None:
        texts = text_cache(family, folder, options, cache)
        conditioning = Captions(images, texts, pipeline.sizes, net.config, network_of(family).lengths)
    else:
        known, classes = pipeline.num_classes(net.config), images.source.num_classes
        if classes > known:
            raise DataError("path", class_problem(classes, known))
        (name,) = network_of(family).condition(net.config, 0)
        conditioning = Labels(images.source.labels, known, classes, name)
    precision = measuring_precision(config.evaluate, options.precision)

    def sampler(protocol: EvaluateConfig) -> PipelineSampler:
        return PipelineSampler(run, folder, denoiser, vae, conditioning, protocol, device, precision)

    process = process_of(read_json(folder / SCHEDULER / "scheduler_config.json") or {})
    return Model(denoiser, process, conditioning, sampler, sampler(config.evaluate).at_once)


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
        PretrainedError, KeyError: the pretrained pipeline cannot be loaded, or the checkpoint lacks a weight.
    """
    if run.config.model.pretrained is not None:
        encode_captions(run.config.model, images, (), options, cache, device)
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


def text_cache(family: Family, folder: Path, options: ResolvedOptions, cache: Path) -> TextCache:
    """Return the cache of captions as this pipeline's text encoders encode them."""
    content = {name: fingerprint_files(folder / name) for name in text_components(folder)} | settings(folder)
    identity = {"kind": "texts/2", "family": family.name, "parts": content, "precision": options.encoder_precision}
    return TextCache(cache / "texts", identity, about={"pipeline": str(folder)})


def encode_captions(
    model: ModelConfig,
    images: Images,
    prompts: Sequence[str],
    options: ResolvedOptions,
    cache: Path,
    device: torch.device,
    progress: Progress | None = None,
) -> None:
    """Encode the captions, the prompts and the empty caption that the cache lacks; does nothing without text encoders.

    Raises:
        DataError: there are no captions.
        PretrainedError: the text encoders cannot be loaded.
    """
    family, folder = FAMILIES[model.family], pretrained_folder(model)
    encode, precision = pipeline_of(family).encode, PRECISION[options.encoder_precision]
    if encode is None:
        return
    if not any(images.source.captions):
        message = f"{family.name} is trained with captions and there are none"
        raise DataError("path", f"{message}: give metadata.jsonl, or a .txt beside each image")
    load = functools.cache(lambda: text_pipeline(folder, precision, device))

    @torch.no_grad()
    def encoded(captions: Sequence[str]) -> Embeddings:
        return encode(load(), captions)

    texts = ["", *prompts, *images.source.captions]
    text_cache(family, folder, options, cache).build(texts, encoded, _TEXTS_AT_ONCE, progress)


class Labels:
    """Class labels as a denoiser's conditioning.

    Args:
        labels: of every image, ``(n,)``.
        null: the label for "no class".
        classes: number of classes that samples are drawn for.
    """

    def __init__(self, labels: torch.Tensor, null: int, classes: int, name: str = "y") -> None:
        self._labels, self._null, self.kinds, self._name = labels, null, classes, name

    def __call__(self, index: torch.Tensor, dropped: torch.Tensor) -> Condition:
        """Return the labels of the images ``index`` ``(B,)``, null where ``dropped`` ``(B,)``."""
        return {self._name: self._labels[index].masked_fill(dropped, self._null)}

    def of_samples(self, kinds: Sequence[int], dropped: bool = False) -> Condition:
        """Return the labels for samples of the given classes, or null labels if ``dropped``."""
        return {self._name: torch.tensor([self._null if dropped else kind for kind in kinds])}


class Captions:
    """Captions as a denoiser's conditioning, encoded by the family's text encoders; null is the empty caption.

    Args:
        sizes, lengths: of :class:`repa_lab.models.family.Pipeline` and of its network; None for a family without.
        config: of the denoiser's diffusers model.
    """

    def __init__(
        self,
        images: Images,
        texts: TextCache,
        sizes: Sizes | None,
        config: Any,
        lengths: Callable[[Condition], torch.Tensor] | None = None,
    ) -> None:
        self._captions, self._frames, self._train = images.source.captions, images.space.frames, images.split.train
        self._texts, self._sizes, self._config, self._lengths = texts, sizes, config, lengths
        self.kinds = len(self._train)  # captions that samples are drawn for

    def __call__(self, index: torch.Tensor, dropped: torch.Tensor) -> Condition:
        """Return captions and sizes of the images ``index`` ``(B,)``, null captions where ``dropped`` ``(B,)``."""
        texts = ["" if drop else self._captions[i] for i, drop in zip(index.tolist(), dropped.tolist(), strict=True)]
        sizes = self._sizes(self._config, self._frames(index).float()) if self._sizes else {}
        encoded = self.of_texts(texts)
        lengths = {TEXT_LENGTHS: self._lengths(encoded)} if self._lengths else {}
        return {**encoded, **sizes, **lengths}

    def of_samples(self, kinds: Sequence[int], dropped: bool = False) -> Condition:
        """Return captions for samples by number, or null captions if ``dropped``; the pipeline adds the sizes."""
        images = self._train[torch.tensor(kinds)].tolist()
        return self.of_texts(["" if dropped else self._captions[image] for image in images])

    def of_texts(self, texts: Sequence[str]) -> Condition:
        """Return texts that were encoded ahead of time, in float32; masks keep their type."""
        encoded = self._texts.read(texts)
        return {name: values.float() if values.is_floating_point() else values for name, values in encoded.items()}


@dataclass(frozen=True)
class PipelineSampler:
    """Draws with the family's own diffusers pipeline, from conditioning that was encoded ahead of time.

    Attributes:
        precision: of the denoiser; the scheduler and the autoencoder compute in float32.
    """

    run: Run
    folder: Path
    denoiser: DiffusersDenoiser
    vae: Autoencoder
    conditioning: Captions | Labels
    protocol: EvaluateConfig
    device: torch.device
    precision: str

    def __call__(self, index: range) -> torch.Tensor | None:
        """Return samples as :class:`FieldSampler` does, clips as ``(n, C, frames, H, W)``."""
        images = []
        for part in shares(len(index), self.at_once):
            numbers = index[part.start : part.stop]
            kinds = kinds_of(numbers, self.conditioning.kinds, self.protocol.labels, self.run.seed)
            condition, null = (self.conditioning.of_samples(kinds, dropped) for dropped in (False, True))
            images.append(self._draw(condition, null, "sampling", numbers))
        return _joined(images)

    def shown(self) -> torch.Tensor | None:
        """Return samples of the spec's prompts, each always from the same noise; None without prompts."""
        texts, conditioning = self.protocol.prompts, self.conditioning
        if not texts or not isinstance(conditioning, Captions):
            return None
        null = conditioning.of_texts([""])
        images = []
        for part in shares(len(texts), self.at_once):
            empty = {name: values.expand(len(part), *values.shape[1:]) for name, values in null.items()}
            images.append(self._draw(conditioning.of_texts(texts[part.start : part.stop]), empty, "prompts", part))
        return _joined(images)

    @property
    def at_once(self) -> int:
        """Images in one pass of the denoiser: an evaluation batch, or fewer if the images are large."""
        data = self.run.config.data
        return min(self.protocol.batch_size, max(1, _PIXELS_AT_ONCE // (data.side**2 * max(data.clip_frames, 1))))

    @torch.no_grad()
    def _draw(self, condition: Condition, null: Condition, stream: str, index: range) -> torch.Tensor | None:
        data = self.run.config.data
        condition, null = ({name: part.to(self.device) for name, part in given.items()} for given in (condition, null))
        arguments = pipeline_of(self.denoiser.family).call(condition, null, self.protocol.guidance.scale)
        if "height" in inspect.signature(type(self._pipeline).__call__).parameters:  # class-conditional ones lack it
            arguments = {**arguments, "height": data.side, "width": data.side}
        if data.clip_frames:
            arguments = {**arguments, "num_frames": data.clip_frames}
        draws = [generator(self.run.seed, stream, i, device=self.device) for i in index]
        steps = self.protocol.sampler.steps
        with computing_in(self.denoiser.net, self.precision, self.device):
            (images, *_) = self._pipeline(
                **arguments, num_inference_steps=steps, output_type="np", return_dict=False, generator=draws
            )
        if not np.isfinite(images).all():
            return None
        return quantise(torch.from_numpy(images) * 255, self.protocol.rounding).movedim(-1, 1)

    @functools.cached_property
    def _pipeline(self) -> Any:
        self.vae.model.to(self.device)
        return sampling_pipeline(self.folder, self.denoiser, self.vae.model, self.run.config.data.side)


def _joined(images: list[torch.Tensor | None]) -> torch.Tensor | None:
    """Return all images in one tensor; None if a part is None."""
    finite = [part for part in images if part is not None]
    return torch.cat(finite) if len(finite) == len(images) else None
