"""A family's pipeline as a folder of diffusers, tiny and random: what tests train and what a rehearsal rehearses with."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from repa_lab.models.denoiser import build_net
from repa_lab.models.facts import Family, network_of, pipeline_of
from repa_lab.models.pipeline import Part
from repa_lab.models.tokenizers import TOKENIZERS


def write_tiny_pipeline(family: Family, folder: Path, seed: int = 0, config: Mapping[str, Any] | None = None) -> None:
    """Write a random pipeline of the family's own classes, in the layout of a released one.

    Args:
        family: one that has a pipeline.
        folder: a new folder.
        seed: of the weights.
        config: arguments of the denoiser that replace those of :attr:`Network.tiny`.
    """
    import diffusers

    pipeline, network = pipeline_of(family), network_of(family)
    kind = getattr(diffusers, pipeline.classes[0])
    absent = dict.fromkeys(kind._optional_components)
    with torch.random.fork_rng(), _quiet():
        torch.manual_seed(seed)
        parts = {name: build_part(part) for name, part in pipeline.tiny.items()}
        parts[pipeline.denoiser] = _awake(build_net(family, {**network.tiny, **(config or {})}))
        kind(**{**absent, **parts}).save_pretrained(folder)


def _awake(net: nn.Module) -> nn.Module:
    """A model without weights at zero, as after training: where gates begin closed, nothing before them would learn."""
    for parameter in net.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return net


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without progress bars, and without warnings of what is meant here: untrained models, an absent safety checker."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    libraries = (of_diffusers, of_transformers)
    before = [library.get_verbosity() for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    for library, verbosity in zip(libraries, before, strict=True):
        library.set_verbosity(verbosity)
        library.enable_progress_bar()


def full_depth(family: Family) -> dict[str, Any]:
    """What gives the tiny denoiser as many blocks as the released one, so that a block index means the same in both."""
    import diffusers

    network = network_of(family)
    defaults = inspect.signature(getattr(diffusers, network.model)).parameters
    depths = {name: network.config.get(name, defaults[name].default) for name in network.depths}
    count = sum(depths.values())
    entries = {name: network.tiny[name] for name in network.per_block}
    return {**depths, **{name: (*held, *[held[-1]] * (count - len(held))) for name, held in entries.items()}}


def build_part(part: Part) -> Any:
    """A component with random weights."""
    library, name = part.name.rsplit(".", 1)
    kind = getattr(importlib.import_module(library), name)
    config = {key: build_part(value) if isinstance(value, Part) else value for key, value in part.config.items()}
    if name in TOKENIZERS:
        return kind(**TOKENIZERS[name](), **config)
    if hasattr(kind, "config_class"):  # of transformers
        return _randomised(kind(kind.config_class(**config))).eval()
    with contextlib.suppress(AttributeError):
        return kind.from_config(config)
    return kind(**config)


def _randomised(model: nn.Module) -> nn.Module:
    """The model with every weight random: ChatGLM's constructor leaves memory as it finds it."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.1)
    return model
