"""How a GPU computes float32 products and convolutions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def kernels(tf32: bool, benchmark: bool = False) -> Iterator[None]:
    """Choose CUDA's kernels within a with-statement; nothing changes on a CPU.

    Args:
        tf32: whether float32 products and convolutions may use TensorFloat-32, which keeps 10 bits of each factor. By
            default torch uses it in convolutions only.
        benchmark: whether cuDNN times its kernels for every new shape of a convolution and takes the fastest.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark
    matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = tf32, tf32, benchmark
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = before
