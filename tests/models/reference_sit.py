"""SiT once more, in NumPy float64 and from its description, to hold the torch one against."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def forward(weights: Mapping[str, Array], heads: int, patch: int, x: Array, t: Array, y: NDArray[np.int64]) -> Array:
    """Velocity ``(B, C, H, W)``; ``weights`` is the state dict in float64, without its position table.

    Times are ``(B,)``, or ``(B, N)`` with one for every token, whose conditioning is then its own.
    """
    batch, channels, height, width = x.shape
    rows, columns = height // patch, width // patch
    kernel = weights["x_embedder.proj.weight"].reshape(-1, channels * patch * patch)
    tokens = np.zeros((batch, rows * columns, len(kernel)))
    for r in range(rows):
        for c in range(columns):
            piece = x[:, :, r * patch : (r + 1) * patch, c * patch : (c + 1) * patch].reshape(batch, -1)
            tokens[:, r * columns + c] = (
                piece @ kernel.T + weights["x_embedder.proj.bias"] + position(r, c, len(kernel))
            )
    condition = _mlp(weights, "t_embedder.mlp.0", "t_embedder.mlp.2", time_features(t.reshape(batch, -1)), silu)
    condition = condition + weights["y_embedder.weight"][y][:, None]
    depth = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
    for index in range(depth):
        tokens = _block(weights, f"blocks.{index}", heads, tokens, condition)
    shift, scale = np.split(_linear(weights, "final_layer.adaLN_modulation.1", silu(condition)), 2, axis=-1)
    patches = _linear(weights, "final_layer.linear", norm(tokens) * (1 + scale) + shift)
    velocity = np.zeros_like(x)
    for r in range(rows):
        for c in range(columns):
            piece = patches[:, r * columns + c].reshape(batch, patch, patch, channels).transpose(0, 3, 1, 2)
            velocity[:, :, r * patch : (r + 1) * patch, c * patch : (c + 1) * patch] = piece
    return velocity


def position(row: int, column: int, width: int) -> Array:
    """sin and cos of the column, then sin and cos of the row, each over a quarter of the width."""
    quarter = width // 4
    frequencies = np.array([10_000.0 ** (-k / quarter) for k in range(quarter)])
    angles = [column * frequencies, row * frequencies]
    return np.concatenate([wave(angle) for angle in angles for wave in (np.sin, np.cos)])


def time_features(t: Array) -> Array:
    """128 cosines, then 128 sines, of t in [0, 1] itself."""
    frequencies = np.array([10_000.0 ** (-k / 128) for k in range(128)])
    return np.concatenate([np.cos(t[..., None] * frequencies), np.sin(t[..., None] * frequencies)], axis=-1)


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def gelu(x: Array) -> Array:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def norm(x: Array) -> Array:
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)


def _linear(weights: Mapping[str, Array], name: str, x: Array) -> Array:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def _mlp(weights: Mapping[str, Array], first: str, second: str, x: Array, activation=gelu) -> Array:
    return _linear(weights, second, activation(_linear(weights, first, x)))


def _block(weights: Mapping[str, Array], name: str, heads: int, x: Array, condition: Array) -> Array:
    parts = np.split(_linear(weights, f"{name}.adaLN_modulation.1", silu(condition)), 6, axis=-1)
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = parts
    x = x + gate_a * _attention(weights, f"{name}.attn", heads, norm(x) * (1 + scale_a) + shift_a)
    hidden = norm(x) * (1 + scale_m) + shift_m
    return x + gate_m * _mlp(weights, f"{name}.mlp.fc1", f"{name}.mlp.fc2", hidden)


def _attention(weights: Mapping[str, Array], name: str, heads: int, x: Array) -> Array:
    queries, keys, values = np.split(_linear(weights, f"{name}.qkv", x), 3, axis=-1)
    size = x.shape[-1] // heads
    mixed = np.zeros_like(x)
    for h in range(heads):
        part = slice(h * size, (h + 1) * size)
        scores = queries[..., part] @ keys[..., part].transpose(0, 2, 1) / np.sqrt(size)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        mixed[..., part] = scores / scores.sum(-1, keepdims=True) @ values[..., part]
    return _linear(weights, f"{name}.proj", mixed)
