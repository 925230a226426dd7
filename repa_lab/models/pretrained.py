"""A released pipeline, loaded in parts: the denoiser to train, its texts' encoders, and what draws samples with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from repa_lab.models.denoiser import Denoiser
from repa_lab.models.facts import Family, network_of, pipeline_of
from repa_lab.models.released import SCHEDULER, VAE, PretrainedError, components, text_components


def load_denoiser(folder: Path, family: Family, dtype: torch.dtype = torch.float32) -> Denoiser:
    """The denoiser of a pipeline, in training mode.

    Args:
        folder: of the pipeline.
        family: its family.
        dtype: of the weights, but for those that the model's class keeps in float32.

    Raises:
        PretrainedError: the weights are missing or do not fit.
    """
    import diffusers

    network, pipeline = network_of(family), pipeline_of(family)
    kind: Any = getattr(diffusers, network.model)
    try:
        net: nn.Module = kind.from_pretrained(folder / pipeline.denoiser, torch_dtype=dtype)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise PretrainedError(f"cannot load the {pipeline.denoiser} of '{folder}': {reason}") from None
    return Denoiser(prepared(net), family).train()


def prepared(net: nn.Module) -> nn.Module:
    """A model as the lab trains it: labels are dropped by the run's own stream, not by each block's from the global one."""
    from diffusers.models.embeddings import LabelEmbedding

    for layer in net.modules():
        if isinstance(layer, LabelEmbedding):
            layer.dropout_prob = 0.0
    return net


def skeleton(folder: Path, family: Family) -> Denoiser:
    """The denoiser of a pipeline on the meta device: its blocks and their sizes without any weight."""
    import diffusers

    network, pipeline = network_of(family), pipeline_of(family)
    kind: Any = getattr(diffusers, network.model)
    with torch.device("meta"):
        return Denoiser(kind.from_config(kind.load_config(folder / pipeline.denoiser)), family)


def adapt(denoiser: Denoiser, rank: int) -> None:
    """Freeze the denoiser and add LoRA to the family's layers, drawn from the global stream.

    Its weights are float32. The scale is 1 (alpha is the rank), A is normal and B zero, as in diffusers' training
    scripts.
    """
    from diffusers.training_utils import cast_training_params
    from peft import inject_adapter_in_model

    net = denoiser.net.requires_grad_(False)
    inject_adapter_in_model(_lora(denoiser.family, rank), net)  # some models of diffusers have no `add_adapter`
    cast_training_params(net, torch.float32)


def text_pipeline(folder: Path, family: Family, dtype: torch.dtype, device: torch.device) -> Any:
    """The pipeline with its encoders of text alone.

    Raises:
        PretrainedError: it cannot be loaded.
    """
    return _load(folder, {name: None for name in components(folder) if name not in text_components(folder)}, dtype).to(
        device
    )


def sampling_pipeline(folder: Path, denoiser: Denoiser, vae: nn.Module, side: int) -> Any:
    """The pipeline around a denoiser in training: without encoders of text, for it is given what they encode, and
    without anything that would judge the images.

    Raises:
        PretrainedError: it cannot be loaded.
    """
    facts = pipeline_of(denoiser.family)
    name = facts.denoiser
    absent = dict.fromkeys(part for part in components(folder) if part not in (name, VAE, SCHEDULER))
    found = _load(folder, {**absent, name: denoiser.net, VAE: vae}, torch.float32)
    found.set_progress_bar_config(disable=True)
    if facts.allow is not None:
        facts.allow(found, side, side)
    return found


def export(denoiser: Denoiser, folder: Path, rank: int | None) -> None:
    """Write what was trained: the model as a folder of diffusers, or its LoRA of a ``rank``.

    LoRA is written as the pipeline loads it (`load_lora_weights`); where diffusers has no such thing, as peft does
    (`PeftModel.from_pretrained`).
    """
    import diffusers

    net: Any = denoiser.net
    if rank is None:
        net.save_pretrained(folder)
        return
    from peft import get_peft_model_state_dict

    pipeline, state = pipeline_of(denoiser.family), get_peft_model_state_dict(net)
    kind: Any = getattr(diffusers, pipeline.classes[0])
    if hasattr(kind, "save_lora_weights"):
        kind.save_lora_weights(folder, **{f"{pipeline.denoiser}_lora_layers": state})
        return
    save_file(
        {f"base_model.model.{name}": value for name, value in state.items()}, folder / "adapter_model.safetensors"
    )
    _lora(denoiser.family, rank).save_pretrained(folder)


def _lora(family: Family, rank: int) -> Any:
    from peft import LoraConfig

    layers = list(pipeline_of(family).adapted)
    return LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=layers)


def _load(folder: Path, given: dict[str, Any], dtype: torch.dtype) -> Any:
    from diffusers import DiffusionPipeline

    try:
        return DiffusionPipeline.from_pretrained(folder, torch_dtype=dtype, **given)
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise PretrainedError(f"cannot load the pipeline in '{folder}': {reason}") from None
