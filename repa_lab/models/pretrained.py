"""Released models of diffusers: the denoiser to train, its LoRA, its pipeline for texts and samples, and its export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from repa_lab.align.tokens import Grid, Tokens, flatten_map
from repa_lab.models.family import BlockIndex, Blocks, Family, network_of, pipeline_of
from repa_lab.models.released import INDEX, SCHEDULER, VAE, PretrainedError, components, read_json, text_components
from repa_lab.models.tap import Denoiser, Tap, TapError


class DiffusersDenoiser(Denoiser):
    """A model of diffusers as a denoiser.

    Attributes:
        grid: grid of the image's tokens in the latest forward pass.
        frames: latent frames of a clip in that pass; 1 for images.
        text_lengths: text tokens before the image of each sample ``(B,)`` in that pass; None where they are not needed.
    """

    def __init__(self, net: nn.Module, family: Family) -> None:
        super().__init__()
        self.net, self.family = net, family
        self.grid: Grid = (0, 0)
        self.frames = 1
        self.text_lengths: torch.Tensor | None = None
        self.depth = len(self._layers()) if family.kind == "transformer" else 0

    def forward(self, latents: torch.Tensor, time: torch.Tensor, **condition: torch.Tensor) -> torch.Tensor:
        """Return the family's prediction of noisy latents ``(B, C, H, W)``, or of clips ``(B, C, F, H, W)``.

        Times ``(B,)`` are in [0, 1], where 1 is noise. The conditioning is what :attr:`Network.condition` names;
        :data:`TEXT_LENGTHS` may be among it. An image that a family cannot take is a ValueError.
        """
        network = network_of(self.family)
        height, width = (side // self.family.shapes[""].stride for side in latents.shape[-2:])
        if network.square and height != width:
            grid = f"{height}x{width}"
            raise ValueError(f"{self.family.name} takes square images only, got a grid of {grid} tokens")
        self.grid, self.frames = (height, width), latents.shape[2] if self.family.is_video else 1
        self.text_lengths = network.lengths(condition) if network.lengths else None
        output = self.net(**network.inputs(self.net.config, latents, time, condition), return_dict=False)
        return network.output(output[0] if isinstance(output, tuple) else output, latents)

    def tap(self, block_index: BlockIndex) -> Tap:
        """Tap a block; see :meth:`Denoiser.tap`. No token of the text is among the block's tokens."""
        known: list[BlockIndex] = list(range(self.depth)) if self.depth else ["mid"]
        if block_index not in known:
            allowed = f"0 to {self.depth - 1}" if self.depth else "'mid'"
            raise TapError(f"{self.family.name}: block_index must be {allowed}, got {block_index!r}")
        layer, blocks = self._layers()[known.index(block_index)]
        return Tap(layer, lambda output: self._image_tokens(output, blocks))

    def export(self, folder: Path, rank: int | None = None) -> None:
        """Write the model as a folder of diffusers, or, given its ``rank``, the LoRA that was trained.

        LoRA is written as the family's pipeline loads it (`load_lora_weights`). If the pipeline loads none, it is
        written as peft loads it (`PeftModel.from_pretrained`).
        """
        import diffusers

        if rank is None:
            super().export(folder)
            return
        from peft import get_peft_model_state_dict

        pipeline, state = pipeline_of(self.family), get_peft_model_state_dict(self.net)
        pipeline_class: Any = getattr(diffusers, pipeline.classes[0])
        if hasattr(pipeline_class, "save_lora_weights"):
            pipeline_class.save_lora_weights(folder, **{f"{self.family.kind}_lora_layers": state})
            return
        named = {f"base_model.model.{name}": value for name, value in state.items()}
        save_file(named, folder / "adapter_model.safetensors")
        _lora_config(self.family, rank).save_pretrained(folder)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the model in place, so that the family's pipeline draws with the compiled one too."""
        self.net.compile(*args, **kwargs)

    @property
    def uncheckpointed(self) -> str:
        """Why the blocks cannot be checkpointed; empty if they can."""
        if not getattr(self.net, "_supports_gradient_checkpointing", False):
            return f"diffusers' {type(self.net).__name__} has no gradient checkpointing"
        return network_of(self.family).uncheckpointed

    def _layers(self) -> list[tuple[nn.Module, Blocks]]:
        """Return what can be tapped, in the order of ``block_index``: all blocks, or a UNet's mid block."""
        found = [(self.net.get_submodule(blocks.path), blocks) for blocks in network_of(self.family).blocks]
        lists = [(part if isinstance(part, nn.ModuleList) else [part], blocks) for part, blocks in found]
        return [(layer, blocks) for layers, blocks in lists for layer in layers]

    def _image_tokens(self, output: Any, blocks: Blocks) -> Tokens:
        values: torch.Tensor = output if blocks.item is None else output[blocks.item]
        values = values.transpose(0, blocks.samples)
        if blocks.place == "map":
            return flatten_map(values)
        count = self.frames * self.grid[0] * self.grid[1]
        return Tokens(_PLACES[blocks.place](values, count, self.text_lengths), self.grid, self.frames)


def _after_text(values: torch.Tensor, count: int, lengths: torch.Tensor | None) -> torch.Tensor:
    assert lengths is not None
    rows = lengths.to(values.device, non_blocking=True).unsqueeze(1) + torch.arange(count, device=values.device)
    return values.gather(1, rows.unsqueeze(2).expand(-1, -1, values.shape[2]))


# The image's tokens from a sequence (B, M, D), their number, and the number of text tokens of each sample.
_PLACES: dict[str, Callable[[torch.Tensor, int, torch.Tensor | None], torch.Tensor]] = {
    "all": lambda values, count, lengths: values,
    "head": lambda values, count, lengths: values[:, :count],
    "tail": lambda values, count, lengths: values[:, -count:],
    "after_text": _after_text,
}


def load_denoiser(folder: Path, family: Family, dtype: torch.dtype = torch.float32) -> DiffusersDenoiser:
    """Load the denoiser of a pipeline, in training mode, or raise a PretrainedError.

    Some models keep a few weights in float32 whatever the dtype.
    """
    from diffusers.models.embeddings import LabelEmbedding

    try:
        net: nn.Module = _model_class(family).from_pretrained(folder / family.kind, torch_dtype=dtype)
    except (OSError, ValueError, RuntimeError) as error:
        raise PretrainedError(f"cannot load the {family.kind} of '{folder}': {_first_line(error)}") from None
    for layer in net.modules():
        if isinstance(layer, LabelEmbedding):  # the run's own stream drops labels, not the global one
            layer.dropout_prob = 0.0
    return DiffusersDenoiser(net, family).train()


def skeleton(folder: Path, family: Family) -> DiffusersDenoiser:
    """Build the denoiser of a pipeline on the meta device, that is, without weights."""
    model_class = _model_class(family)
    with torch.device("meta"):
        net = model_class.from_config(model_class.load_config(folder / family.kind))
    return DiffusersDenoiser(net, family)


def adapt(denoiser: DiffusersDenoiser, rank: int) -> None:
    """Freeze the denoiser and add LoRA to the family's layers, initialised from the global stream.

    LoRA's weights are float32. The scale is 1 (alpha is the rank), A is normal and B zero, as in the training scripts
    of diffusers.
    """
    from diffusers.training_utils import cast_training_params
    from peft import inject_adapter_in_model

    net = denoiser.net.requires_grad_(False)
    inject_adapter_in_model(_lora_config(denoiser.family, rank), net)  # some models of diffusers have no `add_adapter`
    cast_training_params(net, torch.float32)


def text_pipeline(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """Load a pipeline with its text encoders only, or raise a PretrainedError."""
    texts = text_components(folder)
    return _load_pipeline(folder, {name: None for name in components(folder) if name not in texts}, dtype).to(device)


def sampling_pipeline(folder: Path, denoiser: DiffusersDenoiser, vae: nn.Module, side: int) -> Any:
    """Load the pipeline around a denoiser in training, without text encoders and without a safety checker.

    It decodes samples of ``side`` pixels a side with the VAE. If it cannot be loaded, a PretrainedError is raised.
    """
    facts = pipeline_of(denoiser.family)
    given = {denoiser.family.kind: denoiser.net, VAE: vae}
    absent = dict.fromkeys(name for name in components(folder) if name not in (*given, SCHEDULER))
    pipeline = _load_pipeline(folder, {**absent, **given}, torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    if facts.allow is not None:
        facts.allow(pipeline, side, side)
    return pipeline


def _model_class(family: Family) -> Any:
    import diffusers

    return getattr(diffusers, network_of(family).model)


def _lora_config(family: Family, rank: int) -> Any:
    from peft import LoraConfig

    layers = list(pipeline_of(family).adapted)
    return LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=layers)


def _load_pipeline(folder: Path, given: dict[str, Any], dtype: torch.dtype) -> Any:
    import diffusers

    # By the class itself: the base class loads a component that the class may lack, although it is given.
    pipeline_class: Any = getattr(diffusers, (read_json(folder / INDEX) or {}).get("_class_name", "DiffusionPipeline"))
    try:
        return pipeline_class.from_pretrained(folder, torch_dtype=dtype, **given)
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise PretrainedError(f"cannot load the pipeline in '{folder}': {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
