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
from torch.utils.flop_counter import FlopCounterMode

from repa_lab.models.families import FAMILIES
from repa_lab.models.family import Family, network_of, pipeline_of
from repa_lab.models.flops import TEXT_TOKENS
from repa_lab.models.pretrained import DiffusersDenoiser, build_net

Count = tuple[int, int]


class _FlashAttention(torch.autograd.Function):
    """Attention that keeps for backward what flash attention keeps: no matrix of tokens by tokens."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        out = torch.matmul(torch.matmul(query, key.transpose(-1, -2)), value)
        ctx.save_for_backward(query, key, value, out)
        return out


def count(forward: Callable[[], Any], module: nn.Module) -> Count:
    """Return the FLOPs of a forward pass, and how many numbers it keeps for backward beside the module's own."""
    own = {tensor.untyped_storage()._cdata for tensor in (*module.parameters(), *module.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point() and (key := tensor.untyped_storage()._cdata) not in own:
            kept[key] = tensor  # the reference keeps the storage's address from being used again
        return tensor

    keeping = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with _on_meta(), FlopCounterMode(display=False) as counter, keeping:
        forward()
    return counter.get_total_flops(), sum(t.untyped_storage().nbytes() // t.element_size() for t in kept.values())


def count_family(family: Family, side: int, frozen: bool = False) -> Count:
    """Count a released model for an image of ``side`` tokens along each side, with its weights trained or frozen."""
    network = network_of(family)
    with torch.device("meta"):
        net: Any = build_net(family, network.config)
    net.requires_grad_(not frozen)
    denoiser, cells = DiffusersDenoiser(net, family).eval(), side * family.shapes[""].stride
    frames = (1,) if family.is_video else ()  # more of them cost what as many more tokens of one frame cost
    latents = torch.empty(1, network.channels, *frames, cells, cells, device="meta", requires_grad=True)
    condition = meta_condition(family, net.config, TEXT_TOKENS)
    return count(lambda: denoiser(latents, torch.empty(1, device="meta"), **condition), net)


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
    return f'    "{name}": Counted({side**2}, ({gflops}), ({kept}), {share:.2f}, {adapted(family):_}),'


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
