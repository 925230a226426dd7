"""SiT (2401.08740), the class-conditional transformer of the REPA papers, with the sizes and init of REPA's code."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file
from timm.layers.activations import GELUTanh
from timm.layers.attention import Attention
from timm.layers.mlp import Mlp
from timm.layers.patch_embed import PatchEmbed
from torch import nn
from torch.utils.checkpoint import checkpoint

from repa_lab.align.tokens import Grid, Tokens
from repa_lab.models.family import SIT, BlockIndex, shape_of
from repa_lab.models.tap import AttentionTap, Denoiser, Tap, TapError

_FREQUENCIES = 256
_MAX_PERIOD = 10_000.0


def sincos_positions(width: int, grid: Grid) -> torch.Tensor:
    """Return the fixed position table ``(h*w, width)``: first half the column, second half the row, sines first."""
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    omega = _MAX_PERIOD ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = [axis.reshape(-1, 1) * omega for axis in (columns, rows)]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1).float()


def timestep_features(t: torch.Tensor) -> torch.Tensor:
    """Return sinusoids ``(..., 256)`` of t ``(...)`` in [0, 1], not multiplied by 1,000; cosines come before sines."""
    omega = torch.exp(-math.log(_MAX_PERIOD) * torch.arange(_FREQUENCIES // 2, device=t.device) / (_FREQUENCIES // 2))
    angles = t.float()[..., None] * omega
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Shift and scale tokens ``(B, N, width)`` by ``(B, 1, width)`` or ``(B, N, width)``; zeros change nothing."""
    return x * (1 + scale) + shift


def for_tokens(vectors: torch.Tensor, is_second: torch.Tensor | None) -> torch.Tensor:
    """Return the vectors of images for their tokens.

    Args:
        vectors: ``(B, width)``, or ``(B, 2, width)`` for the two times of an image.
        is_second: ``(B, N, 1)``, whether a token has the second time; None if an image has one time.

    Returns:
        ``(B, 1, width)``, or ``(B, N, width)`` for two times.
    """
    return vectors.unsqueeze(1) if is_second is None else torch.where(is_second, vectors[:, 1:], vectors[:, :1])


class TimestepEmbedder(nn.Module):
    """Embedding of the time: sinusoids, then a two-layer SiLU MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        """Return the embedding ``(..., width)`` of t ``(...)``."""
        embedded: torch.Tensor = self.mlp(timestep_features(t).to(next(self.mlp.parameters()).dtype))
        return embedded


class SiTBlock(nn.Module):
    """Attention and MLP, each under adaLN-Zero modulation by the conditioning vector.

    Args:
        attention: a layer of that width.
        mlp: a layer of that width.
    """

    def __init__(self, width: int, attention: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attn = attention
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.mlp = mlp
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(
        self, x: torch.Tensor, c: torch.Tensor, is_second: torch.Tensor | None, *rope: torch.Tensor
    ) -> torch.Tensor:
        """Transform tokens ``(B, N, width)`` under conditioning.

        Args:
            x: the tokens.
            c: the conditioning ``(B, width)``, or ``(B, 2, width)`` for the two times of an image.
            is_second: ``(B, N, 1)``, whether a token has the second time; None if an image has one time.
            rope: the rotations ``(N, 2 * width / heads)`` of queries and keys, if the attention takes them.
        """
        modulation = for_tokens(self.adaLN_modulation(c), is_second)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation.chunk(6, dim=-1)
        x = x + gate_a * self.attn(modulate(self.norm1(x), shift_a, scale_a), *rope)
        out: torch.Tensor = x + gate_m * self.mlp(modulate(self.norm2(x), shift_m, scale_m))
        return out


class FinalLayer(nn.Module):
    """Modulated norm and a linear map to the pixels of each patch."""

    def __init__(self, width: int, patch_size: int, channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(width, patch_size**2 * channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: torch.Tensor, c: torch.Tensor, is_second: torch.Tensor | None = None) -> torch.Tensor:
        """Map tokens ``(B, N, width)`` to patches ``(B, N, patch_size**2 * channels)``; see :class:`SiTBlock`."""
        shift, scale = for_tokens(self.adaLN_modulation(c), is_second).chunk(2, dim=-1)
        patches: torch.Tensor = self.linear(modulate(self.norm_final(x), shift, scale))
        return patches


def unpatchify(patches: torch.Tensor, grid: Grid, patch_size: int) -> torch.Tensor:
    """Put patches ``(B, N, p*p*C)`` on ``grid`` together into an image ``(B, C, H, W)``."""
    (rows, columns), p = grid, patch_size
    x = patches.reshape(-1, rows, columns, p, p, patches.shape[-1] // p**2)
    return torch.einsum("bhwpqc->bchpwq", x).reshape(-1, x.shape[-1], rows * p, columns * p)


def initialise(
    model: nn.Module, patches: PatchEmbed, time: TimestepEmbedder, labels: nn.Embedding, final: FinalLayer
) -> None:
    """Initialise as REPA does.

    Linear maps and the patch kernel are Xavier-uniform, embeddings normal with a standard deviation of 0.02,
    modulations and the last layer zero.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    projection = patches.proj
    nn.init.xavier_uniform_(projection.weight.view(projection.weight.shape[0], -1))
    for weight in [labels.weight, *(layer.weight for layer in time.mlp if isinstance(layer, nn.Linear))]:
        nn.init.normal_(weight, std=0.02)
    modulations = [module[-1] for name, module in model.named_modules() if name.endswith("adaLN_modulation")]
    for parameter in [projection.bias, *(p for layer in (*modulations, final.linear) for p in layer.parameters())]:
        nn.init.zeros_(parameter)


@dataclass(frozen=True)
class SiTConfig:
    """Arguments of a SiT; ``input_size`` is ``(height, width)``, ``num_classes`` excludes the null label."""

    depth: int
    width: int
    heads: int
    patch_size: int
    in_channels: int
    input_size: tuple[int, int]
    num_classes: int

    def __post_init__(self) -> None:
        if any(side % self.patch_size for side in self.input_size):
            raise ValueError(f"input size {self.input_size} is not a multiple of the patch size {self.patch_size}")


class SiTBase(Denoiser):
    """What SiT and SiT-down have in common beside their layers: taps, export and gradient checkpointing."""

    name: ClassVar[str]
    blocks: nn.ModuleList
    grid: Grid

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self._is_checkpointed = False

    def grid_of(self, block_index: int) -> Grid:
        """Return the grid of the tokens that leave a block."""
        return self.grid

    def tap(self, block_index: BlockIndex) -> Tap:
        """Tap a block; see :meth:`Denoiser.tap`."""
        block = self.block(block_index)
        assert isinstance(block_index, int)
        grid = self.grid_of(block_index)
        return Tap(block, lambda output: Tokens(output, grid))

    def block(self, block_index: BlockIndex) -> nn.Module:
        """Return a block.

        Raises:
            TapError: there is no such block.
        """
        depth = len(self.blocks)
        if not isinstance(block_index, int) or not 0 <= block_index < depth:
            raise TapError(f"{self.name} has {depth} blocks: block_index must be 0 to {depth - 1}, got {block_index!r}")
        return self.blocks[block_index]

    def export(self, folder: Path) -> None:
        """Write ``model.safetensors`` and a ``config.json`` with the fields of the config."""
        save_file(self.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(asdict(self.config), indent=2) + "\n", encoding="utf-8")

    def enable_gradient_checkpointing(self) -> None:
        """Keep only the inputs of the blocks for the backward pass, which runs each block again."""
        self._is_checkpointed = True

    def _run(self, block: Callable[..., torch.Tensor], *inputs: torch.Tensor | None) -> torch.Tensor:
        if self._is_checkpointed and torch.is_grad_enabled():
            output: torch.Tensor = checkpoint(block, *inputs, use_reentrant=False)
            return output
        return block(*inputs)


class SiT(SiTBase):
    """Velocity prediction for images or latents ``(B, C, H, W)`` under class labels.

    Label ``num_classes`` is the null label. The caller drops labels by passing it, so evaluation never drops any.
    The output is zero at initialisation (adaLN-Zero).
    """

    name = "sit"
    config: SiTConfig

    def __init__(self, config: SiTConfig) -> None:
        super().__init__(config)
        height, width = config.input_size
        self.grid = (height // config.patch_size, width // config.patch_size)
        self.x_embedder = PatchEmbed(config.input_size, config.patch_size, config.in_channels, config.width)
        self.t_embedder = TimestepEmbedder(config.width)
        self.y_embedder = nn.Embedding(config.num_classes + 1, config.width)
        self.pos_embed = nn.Parameter(sincos_positions(config.width, self.grid).unsqueeze(0), requires_grad=False)
        self.blocks = nn.ModuleList(self._block() for _ in range(config.depth))
        self.final_layer = FinalLayer(config.width, config.patch_size, config.in_channels)
        self.depth, self.input_grid = config.depth, self.grid
        initialise(self, self.x_embedder, self.t_embedder, self.y_embedder, self.final_layer)

    def _block(self) -> SiTBlock:
        width = self.config.width
        attention = Attention(width, num_heads=self.config.heads, qkv_bias=True)
        return SiTBlock(width, attention, Mlp(width, 4 * width, act_layer=GELUTanh))

    def tap_attention(self, block_index: BlockIndex) -> AttentionTap:
        """Tap queries and keys of a block's attention; see :meth:`Denoiser.tap_attention`."""
        attention: Any = self.block(block_index).attn
        return AttentionTap(attention.q_norm, attention.k_norm, lambda: self.grid)

    @classmethod
    def from_size(
        cls, size: str, in_channels: int = 4, input_size: int | tuple[int, int] = 32, num_classes: int = 1000
    ) -> SiT:
        """Build ``nano/p``, ``S/p``, ``B/p``, ``L/p`` or ``XL/p`` with patch size p.

        Raises:
            ValueError: an unknown size, or an input that is not a multiple of the patch size.
        """
        shape = shape_of(SIT, size)
        side = (input_size, input_size) if isinstance(input_size, int) else input_size
        return cls(SiTConfig(shape.depth, shape.width, shape.heads, shape.stride, in_channels, side, num_classes))

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return the velocity ``(B, C, H, W)``.

        Args:
            x: noisy images ``(B, C, H, W)``.
            t: times ``(B,)``, from 0 (data) to 1 (noise), or ``(B, 1, h, w)`` with a time for every token of the grid,
                of which an image has two at most: the conditioning is computed for the least and the greatest.
            y: labels ``(B,)``.
        """
        tokens, labels, is_second = self.x_embedder(x) + self.pos_embed, self.y_embedder(y), None
        if t.ndim > 1:
            of_tokens, labels = t.flatten(1), labels.unsqueeze(1)
            t = torch.stack(of_tokens.aminmax(dim=1), dim=1)
            is_second = (of_tokens == t[:, 1:]).unsqueeze(-1)
        condition = self.t_embedder(t) + labels
        for block in self.blocks:
            tokens = self._run(block, tokens, condition, is_second)
        return unpatchify(self.final_layer(tokens, condition, is_second), self.grid, self.config.patch_size)
