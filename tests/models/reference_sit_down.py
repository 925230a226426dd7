"""SiT-down once more, in NumPy float64 and from its description, to hold the torch one against."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from tests.models.reference_sit import Array, norm, silu, time_features

Weights = Mapping[str, Array]


def forward(
    weights: Weights, stages: tuple[int, int, int], heads: int, patch: int, x: Array, t: Array, y: NDArray[np.int64]
) -> Array:
    """Velocity ``(B, C, H, W)``; ``weights`` is the state dict in float64."""
    kernel, bias = weights["x_embedder.proj.weight"], weights["x_embedder.proj.bias"]
    rows, columns = x.shape[2] // patch, x.shape[3] // patch
    tokens = np.zeros((len(x), rows, columns, len(kernel)))
    for r in range(rows):
        for c in range(columns):
            piece = x[:, :, r * patch : (r + 1) * patch, c * patch : (c + 1) * patch]
            tokens[:, r, c] = np.einsum("bcpq,dcpq->bd", piece, kernel) + bias
    condition = linear(weights, "t_embedder.mlp.2", silu(linear(weights, "t_embedder.mlp.0", time_features(t))))
    condition = condition + weights["y_embedder.weight"][y]
    before, middle, after = stages
    kept = []
    for index in range(before):
        tokens = block(weights, index, heads, tokens, condition)
        kept.append(tokens)
    tokens = down(weights, tokens)
    for index in range(before, before + middle):
        tokens = block(weights, index, heads, tokens, condition)
    tokens = up(weights, tokens)
    for index in range(before + middle, before + middle + after):
        tokens = block(weights, index, heads, tokens + kept[before + middle + after - 1 - index], condition)
    shift, scale = np.split(
        linear(weights, "final_layer.adaLN_modulation.1", silu(condition))[:, None, None], 2, axis=-1
    )
    patches = linear(weights, "final_layer.linear", norm(tokens) * (1 + scale) + shift)
    velocity = np.zeros_like(x)
    for r in range(rows):
        for c in range(columns):
            piece = patches[:, r, c].reshape(len(x), patch, patch, x.shape[1]).transpose(0, 3, 1, 2)
            velocity[:, :, r * patch : (r + 1) * patch, c * patch : (c + 1) * patch] = piece
    return velocity


def linear(weights: Weights, name: str, x: Array) -> Array:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def convolve(weights: Weights, name: str, x: Array) -> Array:
    """3x3 over a map ``(B, h, w, C)`` with zeros around it."""
    kernel, (height, width) = weights[f"{name}.weight"], x.shape[1:3]
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifted = (padded[:, i : i + height, j : j + width] @ kernel[:, :, i, j].T for i in range(3) for j in range(3))
    return sum(shifted, weights[f"{name}.bias"])


def down(weights: Weights, x: Array) -> Array:
    """Each square of 2x2 tokens side by side, channel by channel, then the convolution."""
    batch, height, width, channels = x.shape
    squares = x.reshape(batch, height // 2, 2, width // 2, 2, channels).transpose(0, 1, 3, 5, 2, 4)
    return convolve(weights, "down.layers.1", squares.reshape(batch, height // 2, width // 2, 4 * channels))


def up(weights: Weights, x: Array) -> Array:
    batch, height, width, channels = x.shape
    squares = convolve(weights, "up.layers.0", x).reshape(batch, height, width, channels, 2, 2)
    return squares.transpose(0, 1, 4, 2, 5, 3).reshape(batch, 2 * height, 2 * width, channels)


def block(weights: Weights, index: int, heads: int, x: Array, condition: Array) -> Array:
    name = f"blocks.{index}"
    parts = np.split(linear(weights, f"{name}.adaLN_modulation.1", silu(condition))[:, None, None], 6, axis=-1)
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = parts
    x = x + gate_a * attention(weights, f"{name}.attn", heads, norm(x) * (1 + scale_a) + shift_a)
    hidden = norm(x) * (1 + scale_m) + shift_m
    gated = silu(linear(weights, f"{name}.mlp.fc1_g", hidden)) * linear(weights, f"{name}.mlp.fc1_x", hidden)
    return x + gate_m * linear(weights, f"{name}.mlp.fc2", gated)


def attention(weights: Weights, name: str, heads: int, x: Array) -> Array:
    batch, height, width, channels = x.shape
    size = channels // heads
    queries, keys, values = np.split(linear(weights, f"{name}.qkv", x).reshape(batch, height * width, -1), 3, axis=-1)
    mixed = np.zeros_like(values)
    for h in range(heads):
        part = slice(h * size, (h + 1) * size)
        query, key = (turn(one[..., part], height, width) for one in (queries, keys))
        scores = query @ key.transpose(0, 2, 1) / np.sqrt(size)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        mixed[..., part] = scores / scores.sum(-1, keepdims=True) @ values[..., part]
    return linear(weights, f"{name}.proj", mixed).reshape(x.shape)


def turn(x: Array, height: int, width: int) -> Array:
    """Pairs of channels as complex numbers, turned by the row in the first half of a head and by the column in the second."""
    quarter = x.shape[-1] // 4
    frequencies = 10_000.0 ** (-np.arange(quarter) / quarter)
    row, column = (place.reshape(-1, 1) for place in np.mgrid[:height, :width])
    angles = np.concatenate([row * frequencies, column * frequencies], axis=1)
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angles)
    return np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)
