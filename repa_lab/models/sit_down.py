"""SiT-down, U-REPA's own denoiser (2503.18414): SiT with one downsampled stage, skips, RoPE and SwiGLU.

This is a reconstruction, because the paper's code was never released. The paper states the blocks per stage, the
widths, B's heads, 8x8 tokens in the middle of a 16x16 grid, skip connections, RoPE, SwiGLU, the parameters and the
GMACs (Table 2). The rest is chosen here: of some 12,000 combinations of ways to resize, to merge skips and to set the
widths of SwiGLU and of the middle stage, this one has the counts nearest to the paper's for the three sizes together.

- Down: each square of 2x2 tokens side by side (4 D), then a 3x3 convolution to D. Up: the reverse.
- The middle stage is as wide as the outer ones. Every block has its own modulation, as in SiT.
- The output of each block before the middle is added to the input of its counterpart after the middle.
- SwiGLU is 8/3 D wide, rounded up to a multiple of 256.
- RoPE turns queries and keys by row and column of the token's own grid. There is no other position table.

| size | parameters (paper) | off by | GMACs at 256 tokens (paper) | off by |
|---|---|---|---|---|
| B/2 | 204.7 M (199.7 M) | +2.5 % | 24.20 (24.1) | +0.4 % |
| L/2 | 692.9 M (686.6 M) | +0.9 % | 78.27 (79.3) | -1.3 % |
| XL/2 | 961.7 M (954.4 M) | +0.8 % | 107.43 (109.3) | -1.7 % |

Other combinations come within one point of these counts, for example skips that are concatenated and mapped back to D.
A result on this model is therefore about a model of the paper's shape, not about the paper's weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from timm.layers.attention import AttentionRope
from timm.layers.mlp import SwiGLU
from timm.layers.patch_embed import PatchEmbed
from timm.layers.pos_embed_sincos import RotaryEmbeddingCat
from torch import nn

from repa_lab.align.tokens import Grid, Tokens, flatten_map
from repa_lab.models.family import SIT_DOWN, shape_of, swiglu_width
from repa_lab.models.sit import FinalLayer, SiTBase, SiTBlock, TimestepEmbedder, initialise, unpatchify


class Resize(nn.Module):
    """Layers that map tokens on a grid to a quarter as many, or to four times as many, of the same width."""

    def __init__(self, grid: Grid, *layers: nn.Module) -> None:
        super().__init__()
        self.grid, self.layers = grid, nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Resize tokens ``(B, N, D)`` that fill the grid, row by row."""
        return flatten_map(self.layers(Tokens(x, self.grid).to_map())).values


@dataclass(frozen=True)
class SiTDownConfig:
    """Arguments of a SiT-down; ``stages`` counts the blocks before, in and after the middle; see `SiTConfig`."""

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
            reason = f"not a multiple of {2 * self.patch_size}, twice the patch size: the middle stage halves each side"
            raise ValueError(f"input size {self.input_size} is {reason}")


class SiTDown(SiTBase):
    """Velocity prediction for images or latents ``(B, C, H, W)`` under class labels.

    Label ``num_classes`` is the null label, as in `SiT`. The output is zero at initialisation.

    Attributes:
        blocks: the blocks of all stages, in order.
        grid: grid of the tokens in the outer stages.
        middle_grid: grid of the tokens in the middle stage.
    """

    name = "sit_down"
    config: SiTDownConfig

    def __init__(self, config: SiTDownConfig) -> None:
        super().__init__(config)
        (height, width), patch, dim = config.input_size, config.patch_size, config.width
        self.grid = (height // patch, width // patch)
        self.middle_grid: Grid = (self.grid[0] // 2, self.grid[1] // 2)
        self.x_embedder = PatchEmbed(config.input_size, patch, config.in_channels, dim)
        self.t_embedder = TimestepEmbedder(dim)
        self.y_embedder = nn.Embedding(config.num_classes + 1, dim)
        self.rope, self.middle_rope = (
            RotaryEmbeddingCat(dim // config.heads, in_pixels=False, feat_shape=list(grid))
            for grid in (self.grid, self.middle_grid)
        )
        self.blocks = nn.ModuleList(self._block() for _ in range(sum(config.stages)))
        self.down = Resize(self.grid, nn.PixelUnshuffle(2), nn.Conv2d(4 * dim, dim, 3, padding=1))
        self.up = Resize(self.middle_grid, nn.Conv2d(dim, 4 * dim, 3, padding=1), nn.PixelShuffle(2))
        self.final_layer = FinalLayer(dim, patch, config.in_channels)
        self.depth = len(self.blocks)
        initialise(self, self.x_embedder, self.t_embedder, self.y_embedder, self.final_layer)
        for layer in (*self.down.layers, *self.up.layers):
            if isinstance(layer, nn.Conv2d) and layer.bias is not None:
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)

    def _block(self) -> SiTBlock:
        width = self.config.width
        attention = AttentionRope(width, num_heads=self.config.heads, num_prefix_tokens=0)
        return SiTBlock(width, attention, SwiGLU(width, swiglu_width(width)))

    @classmethod
    def from_size(
        cls, size: str, in_channels: int = 4, input_size: int | tuple[int, int] = 32, num_classes: int = 1000
    ) -> SiTDown:
        """Build ``nano/2``, ``B/2``, ``L/2`` or ``XL/2``.

        Raises:
            ValueError: an unknown size, or an input that is not a multiple of twice the patch size.
        """
        shape = shape_of(SIT_DOWN, size)
        before, middle, after = shape.stages
        side = (input_size, input_size) if isinstance(input_size, int) else input_size
        sizes = (shape.width, shape.heads, shape.stride // 2)
        return cls(SiTDownConfig((before, middle, after), *sizes, in_channels, side, num_classes))

    def grid_of(self, block_index: int) -> Grid:
        """Return the grid of the tokens that leave a block."""
        before, middle, _ = self.config.stages
        return self.middle_grid if before <= block_index < before + middle else self.grid

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return the velocity ``(B, C, H, W)``.

        Args:
            x: noisy images ``(B, C, H, W)``.
            t: times ``(B,)``, from 0 (data) to 1 (noise).
            y: labels ``(B,)``.
        """
        condition = self.t_embedder(t) + self.y_embedder(y)
        rope, middle_rope = self.rope.get_embed(), self.middle_rope.get_embed()
        before, middle, _ = self.config.stages
        tokens, skips = self.x_embedder(x), []
        for block in self.blocks[:before]:
            tokens = self._run(block, tokens, condition, None, rope)
            skips.append(tokens)
        tokens = self.down(tokens)
        for block in self.blocks[before : before + middle]:
            tokens = self._run(block, tokens, condition, None, middle_rope)
        tokens = self.up(tokens)
        for block in self.blocks[before + middle :]:
            tokens = self._run(block, tokens + skips.pop(), condition, None, rope)
        return unpatchify(self.final_layer(tokens, condition), self.grid, self.config.patch_size)
