"""The data of a run: images and their split, latents, captions or labels, and what each encoder sees."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from repa_lab.align.settings import EncoderSettings
from repa_lab.data import DataError
from repa_lab.data.cache import Embeddings, Progress, TextCache
from repa_lab.data.latents import LatentSpace, PixelSpace, Reconstructions, Space, latent_space, load_autoencoder
from repa_lab.data.listing import fingerprint_files
from repa_lab.data.settings import SOURCES, SourceSettings
from repa_lab.data.sources import Flips, LatentFrames, Source, Split, split
from repa_lab.models.families import FAMILIES
from repa_lab.models.family import TEXT_LENGTHS, Family, pipeline_of
from repa_lab.models.pretrained import text_pipeline
from repa_lab.models.released import (
    SCALING,
    PretrainedError,
    locate,
    problem_with,
    read_json,
    settings,
    text_components,
)
from repa_lab.models.scratch import Input
from repa_lab.spec import ModelConfig, ResolvedOptions, RunConfig
from repa_lab.training.device import PRECISION

_CPU = torch.device("cpu")
_TEXTS_AT_ONCE = 16
# Takes the name of a long task and returns a callback for its progress.
Announce = Callable[[str], Progress]
Condition = dict[str, torch.Tensor]
Sizes = Callable[[Any, torch.Tensor], Condition]  # see `repa_lab.models.family.Pipeline.sizes`


@dataclass(frozen=True)
class Images:
    """The images of a run. With ``flips``, image ``base_count + i`` of the source is image i mirrored.

    Attributes:
        source: the images, mirrored ones included.
        split: numbers of the training and the held-out images; never of mirrored ones.
        space: pixels or latents.
    """

    source: Source
    split: Split
    space: Space

    @property
    def flips(self) -> bool:
        """Whether there are mirrored images."""
        return isinstance(self.source, Flips)

    @property
    def base(self) -> Source:
        """The images without mirrored ones."""
        return self.source.base if isinstance(self.source, Flips) else self.source

    @property
    def base_count(self) -> int:
        """The number of images without mirrored ones."""
        return len(self.base)

    @property
    def frame_stride(self) -> int:
        """Frames of a clip per latent frame after the first, or 1: also of images, and of clips of one frame."""
        frames = self.source.clip_frames
        latent = self.space.shape(self.split.train)[1] if frames else 1
        return (frames - 1) // (latent - 1) if latent > 1 else 1

    @property
    def input(self) -> Input:
        """The shape and the classes that a denoiser from scratch is built for; the images must have one size."""
        channels, height, width = self.space.shape(self.split.train)
        return Input(channels, (height, width), self.source.num_classes)


def open_data(config: RunConfig, cache: Path, device: torch.device, announce: Announce | None = None) -> Images:
    """Open the data of a run; a pretrained run uses its pipeline's VAE unless `data.vae` names another.

    Raises:
        DataError: the data cannot be used.
        PretrainedError: the pipeline cannot be loaded.
    """
    if config.model.pretrained is None:
        return open_images(config.data, cache, announce, device)
    folder, pipeline = pretrained_folder(config.model), pipeline_of(FAMILIES[config.model.family])
    if config.data.vae is not None:
        given = load_autoencoder(config.data.vae, "vae").model.config
        needed = read_json(folder / "vae" / "config.json") or {}
        missing = [name for name in SCALING if needed.get(name) is not None and given.get(name) is None]
        if missing:  # refuse it before encoding: the pipeline scales latents by these numbers when it samples
            raise DataError(
                "vae",
                f"the config of '{config.data.vae}' lacks {', '.join(missing)}, which the pipeline's own VAE has; "
                "sampling scales latents by it",
            )
    return open_images(config.data, cache, announce, device, str(folder), pipeline.shifted)


def open_images(
    data: SourceSettings,
    cache: Path,
    announce: Announce | None = None,
    device: torch.device = _CPU,
    vae: str | None = None,
    shifted: bool = True,
) -> Images:
    """Open the images of a run and compute the latents that the cache lacks.

    Args:
        cache: folder of the latents.
        announce: told of a long task.
        vae: the autoencoder, or the pipeline with it, if the settings name none.
        shifted: see :class:`repa_lab.data.latents.Autoencoder`.

    Raises:
        DataError: the data cannot be used.
    """
    vae = data.vae or vae
    if data.is_unset:
        raise DataError("path", "no folder is given; set data.path")
    base = SOURCES[data.source].open(data, cache)
    images = split(len(base), data.held_out(len(base)))
    source = Flips(base) if data.flip else base
    progress = announce("latents") if announce and vae else None
    space = latent_space(source, vae, cache, progress, device, shifted) if vae else PixelSpace(source)
    return Images(source, images, space)


def pixels_for(encoder: EncoderSettings, images: Images, device: torch.device = _CPU) -> Source:
    """Return what an encoder sees, by its ``pixels``: the images, or reconstructions by the VAE or a tiny autoencoder.

    Of clips the encoder sees the frames that stand for latent ones: :class:`repa_lab.data.sources.LatentFrames`.

    Raises:
        DataError: there are no latents (field ``vae``), or the tiny autoencoder does not fit them (field ``tae``).
    """
    pixels = _whole_pixels(encoder, images, device)
    return LatentFrames(pixels, images.frame_stride) if images.frame_stride > 1 else pixels


def _whole_pixels(encoder: EncoderSettings, images: Images, device: torch.device) -> Source:
    space = images.space
    if encoder.pixels == "image":
        return images.source
    if not isinstance(space, LatentSpace):
        raise DataError(
            "vae", f"pixels: {encoder.pixels} decodes latents, and there is no VAE; set data.vae, or pixels: image"
        )
    decoder = space.vae if encoder.pixels == "vae" else load_autoencoder(str(encoder.tae), "tae")
    return Reconstructions(images.source, space, decoder, device)


# Cached because asking the hub takes seconds.
_located = functools.cache(locate)


def pretrained_folder(model: ModelConfig) -> Path:
    """Return the folder of a run's pretrained pipeline.

    Raises:
        PretrainedError: the pipeline cannot be found, or is of another family.
    """
    assert model.pretrained is not None
    folder = _located(model.pretrained, model.revision)
    if message := problem_with(folder, FAMILIES[model.family]):
        raise PretrainedError(message)
    return folder


def text_cache(family: Family, folder: Path, options: ResolvedOptions, cache: Path) -> TextCache:
    """Return the cache of captions as this pipeline's text encoders encode them."""
    content = {name: fingerprint_files(folder / name) for name in text_components(folder)} | settings(folder)
    identity = {"kind": "texts/2", "family": family.name, "parts": content, "precision": options.encoder_precision}
    return TextCache(cache / "texts", identity, about={"pipeline": str(folder)})


def encode_captions(
    family: Family,
    folder: Path,
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
    encode, precision = pipeline_of(family).encode, PRECISION[options.encoder_precision]
    if encode is None:
        return
    if not any(images.source.captions):
        raise DataError(
            "path",
            f"{family.name} is trained with captions and there are none: "
            "give metadata.jsonl, or a .txt beside each image",
        )
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
        name: the denoiser's argument.

    Attributes:
        kinds: number of classes that samples are drawn for.
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
        sizes: returns the family's conditioning on image sizes; None if it has none.
        config: config of the denoiser's diffusers model.
        lengths: returns the lengths of texts, for a family that reads them; see
            :attr:`repa_lab.models.family.Network.lengths`.

    Attributes:
        kinds: number of captions that samples are drawn for.
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
        self.kinds = len(self._train)

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


# What a denoiser is given beside the noisy image and the time, by argument name, one row for each image.
Conditioning = Labels | Captions
