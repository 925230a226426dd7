"""Counts what `flops` keeps as data, on the meta device: ``python -m repa_lab.models.counting FAMILY ...`` prints its rows."""

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

from repa_lab.models.denoiser import Denoiser, build_net
from repa_lab.models.facts import Family, network_of, pipeline_of
from repa_lab.models.families import family_facts
from repa_lab.models.flops import TEXT_TOKENS

_INTEGERS = re.compile("mask|labels")
Count = tuple[int, int]


class _Flash(torch.autograd.Function):
    """Attention that keeps what flash attention keeps: no square of the tokens."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        out = torch.matmul(torch.matmul(query, key.transpose(-1, -2)), value)
        ctx.save_for_backward(query, key, value, out)
        return out


def count(forward: Callable[[], Any], module: nn.Module) -> Count:
    """FLOPs of a forward pass, and the floating-point numbers kept for backward that are not the module's own."""
    own = {tensor.untyped_storage()._cdata for tensor in (*module.parameters(), *module.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point() and (key := tensor.untyped_storage()._cdata) not in own:
            kept[key] = tensor  # held, for an address is free for another once nothing holds it
        return tensor

    keeping = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with _without_values(), FlopCounterMode(display=False) as counter, keeping:
        forward()
    return counter.get_total_flops(), sum(t.untyped_storage().nbytes() // t.element_size() for t in kept.values())


def count_family(family: Family, side: int, frozen: bool = False) -> Count:
    """The count of a released model for an image of ``side`` tokens each way, with or without gradients of its weights."""
    network = network_of(family)
    with torch.device("meta"):
        net: Any = build_net(family, network.config)
    net.requires_grad_(not frozen)
    denoiser, cells = Denoiser(net, family).eval(), side * family.shapes[""].stride
    latents = torch.empty(1, network.channels, cells, cells, device="meta", requires_grad=True)
    condition = _condition(family, net.config)
    return count(lambda: denoiser(latents, torch.empty(1, device="meta"), **condition), net)


def native_side(family: Family) -> int:
    """Tokens along each side of the released model's own images."""
    return network_of(family).native // family.latent_stride // family.shapes[""].stride


def adapted(family: Family) -> int:
    """Inputs and outputs of the layers that LoRA adapts, summed."""
    with torch.device("meta"):
        net = build_net(family, network_of(family).config)
    ends = tuple(f".{end}" for end in pipeline_of(family).adapted)
    layers = (layer for name, layer in net.named_modules() if f".{name}".endswith(ends))
    return sum(layer.in_features + layer.out_features for layer in layers if isinstance(layer, nn.Linear))


def row(name: str) -> str:
    """A family's row of :data:`repa_lab.models.flops.COUNTED`."""
    family = family_facts(name)
    side = native_side(family)
    counts = [count_family(family, part) for part in (side, side // 2, side // 4)]
    flops = ", ".join(f"{one / 1e9:.6g}" for one, _ in counts)
    kept = ", ".join(f"{one / 1e6:.6g}" for _, one in counts)
    share = count_family(family, side, frozen=True)[1] / counts[0][1]
    return f'    "{name}": Counted({side**2}, ({flops}), ({kept}), {share:.2f}, {adapted(family):_}),'


def _condition(family: Family, config: Any) -> dict[str, torch.Tensor]:
    network, found = network_of(family), dict[str, torch.Tensor]()
    for name, shape in network.condition(config, TEXT_TOKENS).items():
        dtype = torch.long if _INTEGERS.search(name) else None
        found[name] = torch.empty(1, *shape, device="meta", dtype=dtype)
    if network.lengths:  # words are counted
        found |= {name: torch.ones(mask.shape, dtype=torch.long) for name, mask in found.items() if "mask" in name}
    return found


@contextmanager
def _without_values() -> Iterator[None]:
    """Without what goes by values, or by a device's autocast: meta lacks both."""
    from diffusers.models.transformers.transformer_hidream_image import MOEFeedForwardSwiGLU

    def attend(query: Any, key: Any, value: Any, *args: Any, **options: Any) -> Any:
        return _Flash.apply(query, key, value)

    def choose(self: Any, tokens: torch.Tensor, *choice: Any) -> torch.Tensor:
        return sum((self.experts[0](tokens) for _ in range(self.num_activated_experts)), torch.zeros_like(tokens))

    with (
        mock.patch.object(F, "scaled_dot_product_attention", attend),
        mock.patch.object(MOEFeedForwardSwiGLU, "moe_infer", choose),
        mock.patch.object(torch, "autocast", lambda *args, **options: nullcontext()),
    ):
        yield


if __name__ == "__main__":
    for family_name in sys.argv[1:]:
        print(row(family_name))
