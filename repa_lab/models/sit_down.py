"""SiT-down, U-REPA's own denoiser (2503.18414): SiT with one downsampled stage, skips, RoPE and SwiGLU.

This is a reconstruction. The paper's code was never released. Stated are the blocks per stage, the widths, B's heads,
8x8 tokens in the middle of a 16x16 grid, skip connections, RoPE, SwiGLU, the parameters and the GMACs (Table 2). All
else is chosen here, from some 12,000 combinations of ways to go down and up, to merge skips, of the width of SwiGLU and
of the middle stage, as the one whose counts are nearest to the paper's for the three sizes at once:

- down: each square of 2x2 tokens side by side (4 D), then a 3x3 convolution to D; up: the reverse;
- the middle stage is as wide as the outer ones, and every block has a modulation of its own, as SiT's;
- the output of each block before the middle is added to the input of its counterpart after it;
- SwiGLU is 8/3 D wide, rounded up to a multiple of 256;
- RoPE turns queries and keys by row and column of the token's own grid; there is no other position table.

| size | parameters (paper) | off by | GMACs at 256 tokens (paper) | off by |
|---|---|---|---|---|
| B/2 | 204.7 M (199.7 M) | +2.5 % | 24.20 (24.1) | +0.4 % |
| L/2 | 692.9 M (686.6 M) | +0.9 % | 78.27 (79.3) | -1.3 % |
| XL/2 | 961.7 M (954.4 M) | +0.8 % | 107.43 (109.3) | -1.7 % |

Others come within one point of it, such as skips that are concatenated and mapped back to D: the counts single out no
design, and a result on this model is one about a model of the paper's shape, not about the paper's weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from timm.layers.attention import AttentionRope
from timm.layers.mlp import SwiGLU
from timm.layers.patch_embed import PatchEmbed
from timm.layers.pos_embed_sincos import RotaryEmbeddingCat
from torch import nn
from torch.utils.checkpoint import checkpoint

from repa_lab.align.tokens import Grid, Tokens, flatten_map
from repa_lab.models.facts import sit_down_shape, swiglu_width
from repa_lab.models.sit import FinalLayer, TimestepEmbedder, initialise, modulate, unpatchify


class SiTDownBlock(nn.Module):
    """Attention with rotary positions and a SwiGLU, each under adaLN-Zero modulation by the conditioning vector."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attn = AttentionRope(width, num_heads=heads, num_prefix_tokens=0)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.mlp = SwiGLU(width, swiglu_width(width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: torch.Tensor, c: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
        """Tokens ``(B, N, width)`` under conditioning ``(B, width)``, with the rotations ``(N, 2 * width / heads)``."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, dim=-1)
        x = x + gate_a.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_a, scale_a), rope)
        out: torch.Tensor = x + gate_m.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_m, scale_m))
        return out


class Resize(nn.Module):
    """Tokens ``(B, N, D)`` on a grid to a quarter as many, or to four times as many, of the same width."""

    def __init__(self, grid: Grid, *layers: nn.Module) -> None:
        super().__init__()
        self.grid, self.layers = grid, nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens ``(B, N, D)`` that fill the grid, row by row."""
        return flatten_map(self.layers(Tokens(x, self.grid).to_map())).values


def _down(width: int, grid: Grid) -> Resize:
    return Resize(grid, nn.PixelUnshuffle(2), nn.Conv2d(4 * width, width, 3, padding=1))


def _up(width: int, grid: Grid) -> Resize:
    return Resize(grid, nn.Conv2d(width, 4 * width, 3, padding=1), nn.PixelShuffle(2))


def _rope(config: SiTDownConfig, grid: Grid) -> RotaryEmbeddingCat:
    return RotaryEmbeddingCat(config.width // config.heads, in_pixels=False, feat_shape=list(grid))


@dataclass(frozen=True)
class SiTDownConfig:
    """The shape of a SiT-down; ``stages`` are blocks before, in and after the middle stage, the rest is as in `SiTConfig`."""

    stages: tuple[int, int, int]
    width: int
    heads: int
    patch_size: int
    in_channels: int
    input_size: tuple[int, int]
    num_classes: int

    def __post_init__(self) -> None:
        if self.stages[0] != self.stages[2]:
            raise ValueError(f"stages {self.stages}: a skip joins each block before the middle with one after it")
        if any(side % (2 * self.patch_size) for side in self.input_size):
            message = (
                f"is not a multiple of {2 * self.patch_size}, twice the patch size: the middle stage halves each side"
            )
            raise ValueError(f"input size {self.input_size} {message}")


class SiTDown(nn.Module):
    """Velocity prediction for images or latents ``(B, C, H, W)`` at t in [0, 1] (0 is data, 1 is noise) and class
    labels.

    Label ``num_classes`` is the null label, as in `SiT`; the output is zero at initialisation.

    Attributes:
        blocks: of all stages in order.
        grid: of the tokens in the outer stages.
    """

    def __init__(self, config: SiTDownConfig) -> None:
        super().__init__()
        self.config = config
        (height, width), patch = config.input_size, config.patch_size
        self.grid: Grid = (height // patch, width // patch)
        self.middle_grid: Grid = (self.grid[0] // 2, self.grid[1] // 2)
        self.x_embedder = PatchEmbed(config.input_size, patch, config.in_channels, config.width)
        self.t_embedder = TimestepEmbedder(config.width)
        self.y_embedder = nn.Embedding(config.num_classes + 1, config.width)
        self.rope, self.middle_rope = _rope(config, self.grid), _rope(config, self.middle_grid)
        self.blocks = nn.ModuleList([SiTDownBlock(config.width, config.heads) for _ in range(sum(config.stages))])
        self.down, self.up = _down(config.width, self.grid), _up(config.width, self.middle_grid)
        self.final_layer = FinalLayer(config.width, patch, config.in_channels)
        self._checkpoints = False
        self._init_weights()

    def enable_gradient_checkpointing(self) -> None:
        """Keep only the blocks' inputs for the backward pass, which then runs each block once more."""
        self._checkpoints = True

    @classmethod
    def from_size(
        cls, size: str, in_channels: int = 4, input_size: int | tuple[int, int] = 32, num_classes: int = 1000
    ) -> SiTDown:
        """Build ``nano/2``, ``B/2``, ``L/2`` or ``XL/2``.

        Raises:
            ValueError: an unknown size, or an input that is not a multiple of twice the patch size.
        """
        shape, patch_size = sit_down_shape(size)
        side = (input_size, input_size) if isinstance(input_size, int) else input_size
        before, middle, after = shape.stages
        stages = (before, middle, after)
        return cls(SiTDownConfig(stages, shape.width, shape.heads, patch_size, in_channels, side, num_classes))

    def grid_of(self, block_index: int) -> Grid:
        """The grid of the tokens that leave a block."""
        before, middle, _ = self.config.stages
        return self.middle_grid if before <= block_index < before + middle else self.grid

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Velocity ``(B, C, H, W)`` from ``x`` ``(B, C, H, W)``, ``t`` ``(B,)`` in [0, 1] and labels ``y`` ``(B,)``."""
        condition = self.t_embedder(t) + self.y_embedder(y)
        rope, middle_rope = self.rope.get_embed(), self.middle_rope.get_embed()
        before, middle, _ = self.config.stages
        tokens, skips = self.x_embedder(x), []
        for block in self.blocks[:before]:
            tokens = self._run(block, tokens, condition, rope)
            skips.append(tokens)
        tokens = self.down(tokens)
        for block in self.blocks[before : before + middle]:
            tokens = self._run(block, tokens, condition, middle_rope)
        tokens = self.up(tokens)
        for block in self.blocks[before + middle :]:
            tokens = self._run(block, tokens + skips.pop(), condition, rope)
        return unpatchify(self.final_layer(tokens, condition), self.grid, self.config.patch_size)

    def _run(self, block: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
        if self._checkpoints and torch.is_grad_enabled():
            kept: torch.Tensor = checkpoint(block, *inputs, use_reentrant=False)
            return kept
        return block(*inputs)

    def _init_weights(self) -> None:
        """As SiT's; the convolutions are Xavier-uniform too."""
        initialise(self, self.x_embedder, self.t_embedder, self.y_embedder, self.final_layer)
        for resize in (self.down, self.up):
            for layer in resize.layers:
                if isinstance(layer, nn.Conv2d) and layer.bias is not None:
                    nn.init.xavier_uniform_(layer.weight)
                    nn.init.zeros_(layer.bias)
