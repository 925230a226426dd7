"""Fill the caches that all runs of a sweep share: latents, encoder features, reference statistics.

This is also the preflight before any run starts: an encoder that gives no patch tokens, or data that cannot be read, is
refused here.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from repa_lab.align.settings import EncoderSettings
from repa_lab.data import DataError
from repa_lab.errors import InputError
from repa_lab.metrics.reference import StatisticsError
from repa_lab.models.families import FAMILIES
from repa_lab.models.pretrained import skeleton
from repa_lab.models.released import SCHEDULER, PretrainedError, read_json
from repa_lab.models.tap import TapError
from repa_lab.settings import BlockIndex
from repa_lab.spec import ResolvedOptions, RunConfig, RunOptions
from repa_lab.timm_models import EncoderError
from repa_lab.training.aligner import open_targets
from repa_lab.training.batches import Announce, Images, open_data, pretrained_folder
from repa_lab.training.device import DeviceError, pick_device, resolved
from repa_lab.training.diffusion import ProcessError, process_of
from repa_lab.training.evaluate import metrics_with, open_extractor, open_reference, real_images
from repa_lab.training.model import encode_captions
from repa_lab.training.resolve import attended_blocks, encoders_of, needs_of


class RefusedError(InputError):
    """Something that a run needs cannot be had.

    Attributes:
        config: the index of the first settings at fault.
        path: the dotted path of the setting at fault.
    """

    def __init__(self, config: int, path: str, message: str) -> None:
        self.config, self.path = config, path
        super().__init__(message)


def prepare(configs: Iterable[RunConfig], options: RunOptions, cache: Path, announce: Announce) -> None:
    """Fill the caches for these settings; a need that several settings share is met once.

    Args:
        configs: the settings of the runs.
        options: the device and the precision to compute with.
        announce: called with a name; returns what to call with the number of images done, and in all.

    Raises:
        RefusedError: naming the setting at fault.
    """
    try:
        device = pick_device(options)
    except DeviceError as error:
        raise RefusedError(0, f"run.{error.field}", str(error)) from error
    preparation = _Preparation(resolved(options), cache, device, announce)
    for index, config in enumerate(configs):
        try:
            preparation.meet(config, index)
        except DataError as error:
            raise RefusedError(index, f"data.{error.field}", str(error)) from error
        except DeviceError as error:
            raise RefusedError(index, f"run.{error.field}", str(error)) from error
        except (PretrainedError, ProcessError) as error:
            raise RefusedError(index, "model.pretrained", str(error)) from error
        except TapError as error:
            raise RefusedError(index, "regularizer.block_index", str(error)) from error


@dataclass
class _Preparation:
    """Meets the needs of settings, each need once; a need is keyed by all settings that it depends on."""

    options: ResolvedOptions
    cache: Path
    device: torch.device
    announce: Announce
    _images: dict[Hashable, Images] = field(default_factory=dict)
    _met: set[Hashable] = field(default_factory=set)

    def meet(self, config: RunConfig, index: int) -> None:
        """Meet all needs of a run with these settings; ``index`` is the settings' own in a refusal."""
        sources = (config.data, config.model)
        if sources not in self._images:
            self._images[sources] = open_data(config, self.cache, self.device, self.announce)
        images = self._images[sources]
        blocks = (*(block for needs in needs_of(config) for block in needs.blocks), config.evaluate.block_index)
        if config.model.pretrained and self._is_new(sources, blocks, config.evaluate.prompts):
            self._meet_pretrained(config, images, blocks)
        for path, encoder in encoders_of(config):
            attention = attended_blocks(config, encoder)
            if self._is_new(sources, encoder, attention):
                try:
                    open_targets(encoder, images, self.options, self.cache, self.device, self.announce, attention)
                except EncoderError as error:
                    raise RefusedError(index, f"{path}.{error.field}", str(error)) from error
                except DataError as error:
                    raise RefusedError(index, _path_of(error.field, path), str(error)) from error
        for path, extractor in config.extractor_paths:
            if self._is_new(sources, extractor, metrics_with(config, extractor)):
                try:
                    network = open_extractor(config, extractor, self.device)
                    open_reference(extractor, network, real_images(images), self.cache)
                except EncoderError as error:
                    raise RefusedError(index, f"{path}.{error.field}", str(error)) from error
                except StatisticsError as error:
                    raise RefusedError(index, f"{path}.reference", str(error)) from error

    def _is_new(self, *need: Hashable) -> bool:
        is_new = need not in self._met
        self._met.add(need)
        return is_new

    def _meet_pretrained(self, config: RunConfig, images: Images, blocks: Sequence[BlockIndex | None]) -> None:
        """Encode captions, and look for the blocks in this folder's denoiser: sizes of a family differ in depth."""
        family, folder = FAMILIES[config.model.family], pretrained_folder(config.model)
        process_of(read_json(folder / SCHEDULER / "scheduler_config.json") or {})
        denoiser = skeleton(folder, family)
        if self.options.gradient_checkpointing and (message := denoiser.uncheckpointed):
            raise DeviceError("gradient_checkpointing", f"{family.name} cannot be checkpointed: {message}")
        for block in blocks:
            if block is not None:
                denoiser.tap(block).remove()
        progress = self.announce(f"captions for {family.name}")
        prompts = config.evaluate.prompts
        encode_captions(config.model, images, prompts, self.options, self.cache, self.device, progress)


def _path_of(field: str, encoder: str) -> str:
    """Return the dotted path of a field of the encoder at ``encoder``, of the options, or else of the data."""
    if field in EncoderSettings.model_fields:
        return f"{encoder}.{field}"
    return f"run.{field}" if field in RunOptions.model_fields else f"data.{field}"
