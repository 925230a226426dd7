"""SiT: the class-conditional transformer of the REPA papers (2401.08740; sizes and init as REPA's released code)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from timm.layers.activations import GELUTanh
from timm.layers.attention import Attention
from timm.layers.mlp import Mlp
from timm.layers.patch_embed import PatchEmbed
from torch import nn
from torch.utils.checkpoint import checkpoint

from repa_lab.align.tokens import Grid
from repa_lab.models.facts import sit_shape

_FREQUENCIES = 256
_MAX_PERIOD = 10_000.0


def sincos_positions(width: int, grid: Grid) -> torch.Tensor:
    """The fixed position table ``(h*w, width)``: first half the column, second the row, sines first."""
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    omega = _MAX_PERIOD ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = [axis.reshape(-1, 1) * omega for axis in (columns, rows)]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1).float()


def timestep_features(t: torch.Tensor) -> torch.Tensor:
    """Sinusoids ``(B, 256)`` of t in [0, 1], taken raw (not times 1,000), cosines before sines."""
    omega = torch.exp(-math.log(_MAX_PERIOD) * torch.arange(_FREQUENCIES // 2, device=t.device) / (_FREQUENCIES // 2))
    angles = t.float()[:, None] * omega[None]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Tokens ``(B, N, width)`` shifted and scaled by vectors ``(B, width)``; zeros change nothing."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class TimestepEmbedder(nn.Module):
    """t ``(B,)`` to ``(B, width)``: sinusoids, then a two-layer SiLU MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        """Embed t ``(B,)``."""
        embedded: torch.Tensor = self.mlp(timestep_features(t).to(next(self.mlp.parameters()).dtype))
        return embedded


class SiTBlock(nn.Module):
    """Attention and MLP, each under adaLN-Zero modulation by the conditioning vector."""

    def __init__(self, width: int, heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(width, num_heads=heads, qkv_bias=True)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.mlp = Mlp(width, int(width * mlp_ratio), act_layer=GELUTanh)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """Tokens ``(B, N, width)`` under conditioning ``(B, width)``."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, dim=-1)
        x = x + gate_a.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_a, scale_a))
        out: torch.Tensor = x + gate_m.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_m, scale_m))
        return out


class FinalLayer(nn.Module):
    """adaLN, then a linear map to the pixels of each patch."""

    def __init__(self, width: int, patch_size: int, channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(width, patch_size**2 * channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """Tokens ``(B, N, width)`` to patches ``(B, N, patch_size**2 * channels)``."""
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        patches: torch.Tensor = self.linear(modulate(self.norm_final(x), shift, scale))
        return patches


def unpatchify(patches: torch.Tensor, grid: Grid, patch_size: int) -> torch.Tensor:
    """Patches ``(B, N, p*p*C)`` on ``grid`` back to an image ``(B, C, H, W)``."""
    (rows, columns), p = grid, patch_size
    x = patches.reshape(-1, rows, columns, p, p, patches.shape[-1] // p**2)
    return torch.einsum("bhwpqc->bchpwq", x).reshape(-1, x.shape[-1], rows * p, columns * p)


def initialise(
    model: nn.Module, patches: PatchEmbed, time: TimestepEmbedder, labels: nn.Embedding, final: FinalLayer
) -> None:
    """REPA's initialisation: linear maps Xavier-uniform, embeddings normal with 0.02, modulations and the last layer zero."""
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
    """The shape of a SiT; ``input_size`` is ``(height, width)``, ``num_classes`` excludes the null label."""

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


class SiT(nn.Module):
    """Velocity prediction for images or latents ``(B, C, H, W)`` at t in [0, 1] (0 is data, 1 is noise) and class
    labels.

    Label ``num_classes`` is the null label; the caller drops labels by passing it, so evaluation never drops any.
    The output is zero at initialisation (adaLN-Zero).
    """

    def __init__(self, config: SiTConfig) -> None:
        super().__init__()
        self.config = config
        height, width = config.input_size
        self.grid: Grid = (height // config.patch_size, width // config.patch_size)
        self.x_embedder = PatchEmbed(config.input_size, config.patch_size, config.in_channels, config.width)
        self.t_embedder = TimestepEmbedder(config.width)
        self.y_embedder = nn.Embedding(config.num_classes + 1, config.width)
        self.pos_embed = nn.Parameter(sincos_positions(config.width, self.grid).unsqueeze(0), requires_grad=False)
        self.blocks = nn.ModuleList([SiTBlock(config.width, config.heads) for _ in range(config.depth)])
        self.final_layer = FinalLayer(config.width, config.patch_size, config.in_channels)
        self._checkpoints = False
        initialise(self, self.x_embedder, self.t_embedder, self.y_embedder, self.final_layer)

    def enable_gradient_checkpointing(self) -> None:
        """Keep only the blocks' inputs for the backward pass, which then runs each block once more."""
        self._checkpoints = True

    @classmethod
    def from_size(
        cls, size: str, in_channels: int = 4, input_size: int | tuple[int, int] = 32, num_classes: int = 1000
    ) -> SiT:
        """Build ``nano/p``, ``S/p``, ``B/p``, ``L/p`` or ``XL/p`` with patch size p.

        Raises:
            ValueError: an unknown size, or an input that is not a multiple of the patch size.
        """
        shape, patch_size = sit_shape(size)
        side = (input_size, input_size) if isinstance(input_size, int) else input_size
        return cls(SiTConfig(shape.depth, shape.width, shape.heads, patch_size, in_channels, side, num_classes))

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Velocity ``(B, C, H, W)`` from ``x`` ``(B, C, H, W)``, ``t`` ``(B,)`` in [0, 1] and labels ``y`` ``(B,)``."""
        tokens = self.x_embedder(x) + self.pos_embed
        condition = self.t_embedder(t) + self.y_embedder(y)
        for block in self.blocks:
            if self._checkpoints and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, condition, use_reentrant=False)
            else:
                tokens = block(tokens, condition)
        return unpatchify(self.final_layer(tokens, condition), self.grid, self.config.patch_size)
