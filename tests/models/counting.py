"""Counts the numbers of :mod:`repa_lab.models.flops` on the meta device; prints its rows for families of diffusers.

Usage: ``python -m tests.models.counting FAMILY ...``
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from repa_lab.models.families import FAMILIES
from repa_lab.models.family import Family, network_of, pipeline_of
from repa_lab.models.flops import TEXT_TOKENS
from repa_lab.models.pretrained import DiffusersDenoiser
from repa_lab.models.tiny import build_net

Count = tuple[int, int]


class _FlashAttention(torch.autograd.Function):
    """Attention that keeps for backward what flash attention keeps: no matrix of tokens by tokens."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        out = torch.matmul(torch.matmul(query, key.transpose(-1, -2)), value)
        ctx.save_for_backward(query, key, value, out)
        return out


class _Kept:
    """The tensors that are kept for backward beside the module's own, each storage once."""

    def __init__(self, module: nn.Module) -> None:
        self._own = {tensor.untyped_storage()._cdata for tensor in (*module.parameters(), *module.buffers())}
        self._kept: dict[int, torch.Tensor] = {}  # the references keep the storages' addresses from being used again

    def add(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point() and (key := tensor.untyped_storage()._cdata) not in self._own:
            self._kept[key] = tensor
        return tensor

    def by(self) -> torch.autograd.graph.saved_tensors_hooks:
        """Return a context whose operations keep their tensors here."""
        return torch.autograd.graph.saved_tensors_hooks(self.add, lambda tensor: tensor)

    def numbers(self, beside: _Kept | None = None) -> int:
        """Return how many numbers there are, without those that others keep too."""
        kept = (tensor for key, tensor in self._kept.items() if beside is None or key not in beside._kept)
        return sum(tensor.untyped_storage().nbytes() // tensor.element_size() for tensor in kept)


def count(forward: Callable[[], Any], module: nn.Module) -> Count:
    """Return the FLOPs of a forward pass, and how many numbers it keeps for backward beside the module's own."""
    kept = _Kept(module)
    with _on_meta(), FlopCounterMode(display=False) as counter, kept.by():
        forward()
    return counter.get_total_flops(), kept.numbers()


def count_checkpointed(forward: Callable[[], Any], denoiser: Any) -> int:
    """Return the numbers at the peak of a backward pass with gradient checkpointing, which is turned on.

    They are what is kept outside of the blocks, the blocks' inputs, and all that the largest block keeps.
    """
    kept, blocks = _Kept(denoiser), [_Kept(denoiser)]

    def checkpoint(function: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
        for tensor in tree_leaves(inputs):
            if isinstance(tensor, torch.Tensor):
                kept.add(tensor)
        blocks.append(_Kept(denoiser))
        with blocks[-1].by():
            return function(*inputs)

    with (
        mock.patch("torch.utils.checkpoint.checkpoint", checkpoint),
        mock.patch("repa_lab.models.sit.checkpoint", checkpoint),
        _on_meta(),
        kept.by(),
    ):
        denoiser.enable_gradient_checkpointing()
        forward()
    return kept.numbers() + max(block.numbers(beside=kept) for block in blocks)


def count_family(family: Family, side: int, frozen: bool = False) -> Count:
    """Count a released model for an image of ``side`` tokens along each side, with its weights trained or frozen."""
    denoiser, forward = _on_one_image(family, side)
    denoiser.requires_grad_(not frozen)
    return count(forward, denoiser)


def checkpointed_share(family: Family) -> float:
    """Return the share of kept numbers that remains with gradient checkpointing, at the released model's native size."""
    denoiser, forward = _on_one_image(family, native_side(family))
    if denoiser.uncheckpointed:
        return 1.0
    kept = count(forward, denoiser)[1]
    return count_checkpointed(forward, denoiser) / kept


def _on_one_image(family: Family, side: int) -> tuple[DiffusersDenoiser, Callable[[], Any]]:
    """Return a released model on the meta device, and its forward pass on ``side`` tokens along each side."""
    network = network_of(family)
    with torch.device("meta"):
        net: Any = build_net(family, network.config)
    denoiser, cells = DiffusersDenoiser(net, family).eval(), side * family.shapes[""].stride
    frames = (1,) if family.is_video else ()  # more of them cost what as many more tokens of one frame cost
    latents = torch.empty(1, network.channels, *frames, cells, cells, device="meta", requires_grad=True)
    condition = meta_condition(family, net.config, TEXT_TOKENS)
    return denoiser, lambda: denoiser(latents, torch.empty(1, device="meta"), **condition)


def meta_condition(family: Family, config: Any, tokens: int) -> dict[str, torch.Tensor]:
    """Return conditioning on the meta device for one image with a text of so many tokens."""
    network = network_of(family)
    condition = {
        name: torch.empty(1, *shape, device="meta", dtype=torch.long if re.search("mask|labels", name) else None)
        for name, shape in network.condition(config, tokens).items()
    }
    if network.lengths:  # which needs the values of the masks
        masks = {name: mask for name, mask in condition.items() if "mask" in name}
        condition |= {name: torch.ones(mask.shape, dtype=torch.long) for name, mask in masks.items()}
    return condition


def native_side(family: Family) -> int:
    """Return the tokens along each side of an image at the released model's native size."""
    return network_of(family).native // family.latent_stride // family.shapes[""].stride


def adapted(family: Family) -> int:
    """Return the sum of the inputs and outputs of the layers that LoRA adapts."""
    with torch.device("meta"):
        net = build_net(family, network_of(family).config)
    ends = tuple(f".{end}" for end in pipeline_of(family).adapted)
    layers = (layer for name, layer in net.named_modules() if f".{name}".endswith(ends))
    return sum(layer.in_features + layer.out_features for layer in layers if isinstance(layer, nn.Linear))


def row(name: str) -> str:
    """Return a family's row of :data:`repa_lab.models.flops.COUNTED`."""
    family = FAMILIES[name]
    side = native_side(family)
    counts = [count_family(family, part) for part in (side, side // 2, side // 4)]
    gflops = ", ".join(f"{flops / 1e9:.6g}" for flops, _ in counts)
    kept = ", ".join(f"{numbers / 1e6:.6g}" for _, numbers in counts)
    share = count_family(family, side, frozen=True)[1] / counts[0][1]
    shares = f"{share:.2f}, {checkpointed_share(family):.3g}"
    return f'    "{name}": Counted({side**2}, ({gflops}), ({kept}), {shares}, {adapted(family):_}),'


@contextmanager
def _on_meta() -> Iterator[None]:
    """Replace routing by values and autocast, which meta tensors lack, and attention by :class:`_FlashAttention`."""
    from diffusers.models.transformers.transformer_hidream_image import MOEFeedForwardSwiGLU

    def attend(query: Any, key: Any, value: Any, *args: Any, **options: Any) -> Any:
        return _FlashAttention.apply(query, key, value)

    def route(self: Any, tokens: torch.Tensor, *choice: Any) -> torch.Tensor:
        return sum((self.experts[0](tokens) for _ in range(self.num_activated_experts)), torch.zeros_like(tokens))

    with (
        mock.patch.object(F, "scaled_dot_product_attention", attend),
        mock.patch.object(MOEFeedForwardSwiGLU, "moe_infer", route),
        mock.patch.object(torch, "autocast", lambda *args, **options: nullcontext()),
    ):
        yield


if __name__ == "__main__":
    for family_name in sys.argv[1:]:
        print(row(family_name))
