"""SiT (2401.08740), the class-conditional transformer of the REPA papers, and U-REPA's SiT-down (2503.18414).

The sizes and the initialisation of SiT are those of REPA's code. SiT-down is a reconstruction; see :class:`SiTDown`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors.torch import save_file
from timm.layers.activations import GELUTanh
from timm.layers.attention import Attention, AttentionRope
from timm.layers.mlp import Mlp, SwiGLU
from timm.layers.patch_embed import PatchEmbed
from timm.layers.pos_embed_sincos import RotaryEmbeddingCat
from torch import nn
from torch.utils.checkpoint import checkpoint

from repa_lab.align.tokens import Grid, Tokens, flatten_map
from repa_lab.models.family import SIT, SIT_DOWN, BlockIndex, Family, shape_of, swiglu_width
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
    """Return the vectors of images ``(B, width)`` for their tokens ``(B, 1, width)``.

    For the two times of an image they are ``(B, 2, width)`` and ``(B, N, width)``; ``is_second`` ``(B, N, 1)`` says
    whether a token has the second time, and is None if an image has one time.
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
    """Attention and MLP, each under adaLN-Zero modulation by the conditioning vector."""

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
        """Transform tokens ``(B, N, width)`` under conditioning; see :func:`for_tokens`.

        ``rope`` are the rotations ``(N, 2 * width / heads)`` of queries and keys, if the attention takes them.
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

    @property
    def depth(self) -> int:
        """The number of blocks of all stages."""
        return sum(self.stages)

    def __post_init__(self) -> None:
        if self.stages[0] != self.stages[2]:
            raise ValueError(f"stages {self.stages}: a skip joins each block before the middle with one after it")
        if any(side % (2 * self.patch_size) for side in self.input_size):
            reason = f"not a multiple of {2 * self.patch_size}, twice the patch size: the middle stage halves each side"
            raise ValueError(f"input size {self.input_size} is {reason}")


class SiTBase(Denoiser):
    """Velocity prediction for images or latents ``(B, C, H, W)`` under class labels.

    Label ``num_classes`` is the null label. The caller drops labels by passing it, so evaluation never drops any.
    The output is zero at initialisation (adaLN-Zero).

    Attributes:
        blocks: all blocks, in order.
        grid: grid of the input's tokens.
    """

    family: ClassVar[Family]
    Config: ClassVar[type[SiTConfig | SiTDownConfig]]
    final_layer: FinalLayer

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config, self.depth = config, config.depth
        height, width = config.input_size
        self.grid: Grid = (height // config.patch_size, width // config.patch_size)
        self.x_embedder = PatchEmbed(config.input_size, config.patch_size, config.in_channels, config.width)
        self.t_embedder = TimestepEmbedder(config.width)
        self.y_embedder = nn.Embedding(config.num_classes + 1, config.width)
        self.blocks = nn.ModuleList(self._block() for _ in range(self.depth))
        self._is_checkpointed = False

    def _block(self) -> SiTBlock:
        raise NotImplementedError

    @classmethod
    def from_size(
        cls, size: str, in_channels: int = 4, input_size: int | tuple[int, int] = 32, num_classes: int = 1000
    ) -> Self:
        """Build a size of the family; ``B/2`` is B with patches of 2. Input that they do not fit is a ValueError."""
        shape = shape_of(cls.family, size)
        blocks, patch = (shape.stages, shape.stride // 2) if shape.stages else (shape.depth, shape.stride)
        side = (input_size, input_size) if isinstance(input_size, int) else input_size
        config: Any = cls.Config
        return cls(config(blocks, shape.width, shape.heads, patch, in_channels, side, num_classes))

    def initialise(self) -> None:
        """Initialise as REPA does.

        Linear maps and the patch kernel are Xavier-uniform, embeddings normal with a standard deviation of 0.02,
        modulations and the last layer zero.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        patches = self.x_embedder.proj
        nn.init.xavier_uniform_(patches.weight.view(len(patches.weight), -1))
        for embedding in (self.y_embedder, *self.t_embedder.mlp):
            if not isinstance(embedding, nn.SiLU):
                nn.init.normal_(embedding.weight, std=0.02)
        modulations = [module[-1] for name, module in self.named_modules() if name.endswith("adaLN_modulation")]
        zeros = [patches.bias, *(p for layer in (*modulations, self.final_layer.linear) for p in layer.parameters())]
        for parameter in zeros:
            nn.init.zeros_(parameter)

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
        """Return a block, or raise a TapError if there is none."""
        if isinstance(block_index, int) and 0 <= block_index < self.depth:
            return self.blocks[block_index]
        message = f"has {self.depth} blocks: block_index must be 0 to {self.depth - 1}, got {block_index!r}"
        raise TapError(f"{self.family.name} {message}")

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
    """SiT; its sizes are ``nano/p``, ``S/p``, ``B/p``, ``L/p`` and ``XL/p`` with patch size p. See :class:`SiTBase`."""

    family, Config = SIT, SiTConfig

    def __init__(self, config: SiTConfig) -> None:
        super().__init__(config)
        self.pos_embed = nn.Parameter(sincos_positions(config.width, self.grid).unsqueeze(0), requires_grad=False)
        self.final_layer = FinalLayer(config.width, config.patch_size, config.in_channels)
        self.input_grid = self.grid
        self.initialise()

    def _block(self) -> SiTBlock:
        width = self.config.width
        attention = Attention(width, num_heads=self.config.heads, qkv_bias=True)
        return SiTBlock(width, attention, Mlp(width, 4 * width, act_layer=GELUTanh))

    def tap_attention(self, block_index: BlockIndex) -> AttentionTap:
        """Tap queries and keys of a block's attention; see :meth:`Denoiser.tap_attention`."""
        attention: Any = self.block(block_index).attn
        return AttentionTap(attention.q_norm, attention.k_norm, lambda: self.grid)

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


class Resize(nn.Module):
    """Layers that map tokens on a grid to a quarter as many, or to four times as many, of the same width."""

    def __init__(self, grid: Grid, *layers: nn.Module) -> None:
        super().__init__()
        self.grid, self.layers = grid, nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Resize tokens ``(B, N, D)`` that fill the grid, row by row."""
        return flatten_map(self.layers(Tokens(x, self.grid).to_map())).values


class SiTDown(SiTBase):
    """SiT with one downsampled stage, skips, RoPE and SwiGLU: ``nano/2``, ``B/2``, ``L/2`` and ``XL/2``.

    This is a reconstruction, because the paper's code was never released. The paper states the blocks per stage, the
    widths, B's heads, 8x8 tokens in the middle of a 16x16 grid, skip connections, RoPE, SwiGLU, the parameters and the
    GMACs (Table 2). The rest is chosen here: of some 12,000 combinations of ways to resize, to merge skips and to set
    the widths of SwiGLU and of the middle stage, this one has the counts nearest to the paper's for the three sizes
    together.

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

    Other combinations come within one point of these counts, for example skips that are concatenated and mapped back to
    D. A result on this model is therefore about a model of the paper's shape, not about the paper's weights.

    Attributes:
        middle_grid: grid of the tokens in the middle stage; ``grid`` is that of the outer stages.
    """

    family, Config = SIT_DOWN, SiTDownConfig

    def __init__(self, config: SiTDownConfig) -> None:
        super().__init__(config)
        width = config.width
        self.middle_grid: Grid = (self.grid[0] // 2, self.grid[1] // 2)
        self.rope, self.middle_rope = (
            RotaryEmbeddingCat(width // config.heads, in_pixels=False, feat_shape=list(grid))
            for grid in (self.grid, self.middle_grid)
        )
        self.down = Resize(self.grid, nn.PixelUnshuffle(2), nn.Conv2d(4 * width, width, 3, padding=1))
        self.up = Resize(self.middle_grid, nn.Conv2d(width, 4 * width, 3, padding=1), nn.PixelShuffle(2))
        self.final_layer = FinalLayer(width, config.patch_size, config.in_channels)
        self.initialise()
        for layer in (*self.down.layers, *self.up.layers):
            if isinstance(layer, nn.Conv2d) and layer.bias is not None:
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)

    def _block(self) -> SiTBlock:
        width = self.config.width
        attention = AttentionRope(width, num_heads=self.config.heads, num_prefix_tokens=0)
        return SiTBlock(width, attention, SwiGLU(width, swiglu_width(width)))

    def grid_of(self, block_index: int) -> Grid:
        """Return the grid of the tokens that leave a block."""
        before, middle, _ = self.config.stages
        return self.middle_grid if before <= block_index < before + middle else self.grid

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return the velocity ``(B, C, H, W)``; see :meth:`SiT.forward`. An image has one time ``(B,)``."""
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
