"""Bounds of rounding errors, derived from the arithmetic and not from what one processor gave."""

from __future__ import annotations

import math

import numpy as np
import torch

UNIT = 2.0**-24  # the largest relative error of one float32 operation
# Linear layers in a row, and the most terms that one of their sums has.
LITE0 = (50, 1152)
INCEPTION = (94, 4032)
VIT = (48, 1536)  # ViT-S; smaller ones have fewer
TINY_VIT = (30, 768)  # two blocks of ViT-S, or timm's test_vit
SIT = (40, 256)  # five blocks of five linear layers and two products of attention, at width 64
SIT_DOWN = (61, 128)  # seven blocks at width 32; two convolutions have nine times the terms and count as three layers
DENOISER = (60, 1600)  # a tiny network of any family: some have more layers, of far fewer terms
TINY_VAE = (20, 144)
# A cosine of tokens of at most 64 values: each of two norms is off by 4 units, and the sum of products by sqrt(64). Means
# of cosines, and squares of differences of two of them, are off by no more.
COSINE = 16 * UNIT
# A mean of at most 2**14 squares of one sign, which are summed pairwise.
MEAN = 16 * UNIT
# A regularizer's loss: a projector of three layers with sums of 16 terms, a resampling in two directions with two each, and
# a cosine, where the terms may cancel to a quarter of their size.
REGULARIZER = 4 * (3 * 4 + 4 + 16) * UNIT
# A Frechet distance is quadratic in features, whose largest errors are about 1e-5 of the largest feature.
FRECHET = 2e-5


def rounding(values: np.ndarray | torch.Tensor, network: tuple[int, int]) -> float:
    """Return by how much a network's float32 outputs may differ if its sums are taken in another order.

    A sum of n terms is off by about ``sqrt(n)`` units of its terms' size (Higham, Accuracy and Stability of Numerical
    Algorithms, 2.8), and the errors of layers in a row add up.
    """
    layers, terms = network
    return layers * math.sqrt(terms) * UNIT * float(abs(values).max())


def of_products(values: np.ndarray | torch.Tensor, factors: int) -> float:
    """Return by how much ``values`` times a product of so many float32 factors near 1 may be off."""
    return math.sqrt(factors) * UNIT * float(abs(values).max())
