"""What all runs of a sweep share, made once before any of them starts: latents, encoder features, reference statistics.

This is also the preflight: an encoder that gives no patch tokens, or data that cannot be read, is refused here.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from repa_lab.data.errors import DataError
from repa_lab.encoders.encoder import EncoderError
from repa_lab.metrics.reference import StatisticsError
from repa_lab.models.denoiser import tap_block, uncheckpointed
from repa_lab.models.families import family_facts
from repa_lab.models.pretrained import skeleton
from repa_lab.models.released import SCHEDULER, PretrainedError, read_json
from repa_lab.models.tap import TapError
from repa_lab.spec import EncoderSettings, ExtractorConfig, RunConfig, RunOptions
from repa_lab.training.aligner import open_targets
from repa_lab.training.device import DeviceError, pick_device
from repa_lab.training.diffusion import ProcessError, process_of
from repa_lab.training.images import Announce, Images
from repa_lab.training.model import open_data, pretrained_folder
from repa_lab.training.needs import encoders_of, needs_of
from repa_lab.training.quality import metrics_with, open_extractor, open_reference, real_images
from repa_lab.training.texts import encode_captions


class RefusedError(ValueError):
    """Something an arm needs cannot be had; ``path`` is the setting at fault, ``arm`` the number of the config that has it."""

    def __init__(self, arm: int, path: str, message: str) -> None:
        self.arm, self.path, self.message = arm, path, message
        super().__init__(message)


def prepare(configs: Iterable[RunConfig], options: RunOptions, cache: Path, announce: Announce) -> None:
    """Fill the caches for these settings, on the device that the options choose; what several settings need is looked
    at once.

    Raises:
        RefusedError: naming the setting at fault.
    """
    try:
        device = pick_device(options)
    except DeviceError as error:
        raise RefusedError(0, f"run.{error.field}", str(error)) from error
    preparation = _Preparation(options, cache, device, announce)
    for number, config in enumerate(configs):
        try:
            preparation.meet(config, number)
        except DataError as error:
            raise RefusedError(number, f"data.{error.field}", str(error)) from error
        except DeviceError as error:
            raise RefusedError(number, f"run.{error.field}", str(error)) from error


@dataclass
class _Preparation:
    """What has been found in order so far; each need is keyed by all the settings that it depends on."""

    options: RunOptions
    cache: Path
    device: torch.device
    announce: Announce
    _images: dict[Hashable, Images] = field(default_factory=dict)
    _met: set[Hashable] = field(default_factory=set)

    def meet(self, config: RunConfig, number: int) -> None:
        """All that a run with these settings needs; ``number`` is theirs in a refusal."""
        given = (config.data, config.model)
        try:
            if given not in self._images:
                self._images[given] = open_data(config, self.cache, self.device, self.announce)
            images = self._images[given]
            blocks = (*(needs := needs_of(config)).taps, *needs.ema_taps, config.evaluate.block_index)
            if config.model.pretrained and self._is_new(given, blocks, config.evaluate.prompts):
                self._pretrained(config, images)
        except (PretrainedError, ProcessError) as error:
            raise RefusedError(number, "model.pretrained", str(error)) from error
        except TapError as error:
            raise RefusedError(number, "regularizer.block_index", str(error)) from error
        for path, encoder in encoders_of(config):
            if self._is_new(given, encoder):
                self._targets(number, path, encoder, images)
        for path, extractor in config.extractor_paths:
            if self._is_new(given, extractor, metrics_with(config, extractor)):
                self._reference(number, path, extractor, config, images)

    def _is_new(self, *need: Hashable) -> bool:
        is_new = need not in self._met
        self._met.add(need)
        return is_new

    def _targets(self, number: int, path: str, encoder: EncoderSettings, images: Images) -> None:
        try:
            open_targets(encoder, images, self.options, self.cache, self.device, self.announce)
        except EncoderError as error:
            raise RefusedError(number, f"{path}.{error.field}", str(error)) from error
        except DataError as error:
            raise RefusedError(number, _place(path, error.field), str(error)) from error

    def _reference(self, number: int, path: str, extractor: ExtractorConfig, config: RunConfig, images: Images) -> None:
        try:
            open_reference(extractor, open_extractor(config, extractor, self.device), real_images(images), self.cache)
        except EncoderError as error:
            raise RefusedError(number, f"{path}.{error.field}", str(error)) from error
        except StatisticsError as error:
            raise RefusedError(number, f"{path}.reference", str(error)) from error

    def _pretrained(self, config: RunConfig, images: Images) -> None:
        """Captions, and whether what is asked of the denoiser is in this very folder's: sizes of a family differ in depth."""
        family, folder = family_facts(config.model.family), pretrained_folder(config.model)
        process_of(read_json(folder / SCHEDULER / "scheduler_config.json") or {})
        denoiser = skeleton(folder, family)
        if self.options.gradient_checkpointing and (message := uncheckpointed(denoiser)):
            raise DeviceError("gradient_checkpointing", f"{family.name} cannot be checkpointed: {message}")
        for block in (*(needs := needs_of(config)).taps, *needs.ema_taps, config.evaluate.block_index):
            if block is not None:
                tap_block(denoiser, block).remove()
        progress = self.announce(f"captions for {family.name}")
        encode_captions(
            family, folder, images, config.evaluate.prompts, self.options, self.cache, self.device, progress
        )


def _place(path: str, field: str) -> str:
    """The dotted path of what stands in the way of an encoder's features: of the encoder, the options or the data."""
    if field in EncoderSettings.model_fields:
        return f"{path}.{field}"
    return f"run.{field}" if field in RunOptions.model_fields else f"data.{field}"
