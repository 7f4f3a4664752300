"""Statistics of embedding columns over the batch, and passes over rows that stay in the cache.

Shapes: V views, n rows of this rank, N rows of all ranks, D embedding.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from fastssl_kernels._precision import accumulation_dtype
from fastssl_kernels.distributed import all_reduce_sum

CHUNK = 2**18  # elements (1 MiB of fp32) that a pass handles at once, to stay in the cache


def row_chunks(z: Tensor) -> Iterator[slice]:
    """Slices of z's rows (V, n, D), each of about CHUNK elements; an empty one without rows."""
    views, rows, width = z.shape
    step = max(1, CHUNK // (views * width))
    for start in range(0, max(rows, 1), step):
        yield slice(start, start + step)


def centred(z: Tensor, total: int, group: str) -> tuple[Tensor, Tensor]:
    """(mean (V, D), z - mean (V, n, D)) over the `total` rows of all ranks."""
    dtype = accumulation_dtype(z)
    mean = all_reduce_sum(z.sum(1, dtype=dtype), group) / total
    return mean, torch.sub(z, mean[:, None], out=z.new_empty(z.shape, dtype=dtype))


def column_dots(x: Tensor, y: Tensor) -> Tensor:
    """(V, n, D), (V, n, D) -> (V, D): inner products of the columns of this rank's rows."""
    parts = [(x[:, r] * y[:, r]).sum(1) for r in row_chunks(x)]
    return torch.stack(parts).sum(0)


def cross_gaps(x: Tensor) -> Tensor:
    """(V, n, D) -> (V, V, D): squared distances of all views' columns, in one pass over x."""
    views, _, width = x.shape
    dtype = accumulation_dtype(x)
    gaps = x.new_zeros((views, views, width), dtype=dtype)
    for r in row_chunks(x):
        rows = x[:, r].to(dtype)
        for a in range(views - 1):
            gaps[a, a + 1 :] += (rows[a + 1 :] - rows[a]).square().sum(1)
    return gaps + gaps.transpose(0, 1)


def cross_dots(x: Tensor) -> Tensor:
    """(V, n, D) -> (V, V, D): inner products of all views' columns, in one pass over x."""
    views, _, width = x.shape
    dots = x.new_zeros(views, views, width)
    for r in row_chunks(x):
        for a in range(views):
            dots[a, a:] += (x[a, r] * x[a:, r]).sum(1)
    for a in range(views):
        dots[a + 1 :, a] = dots[a, a + 1 :]
    return dots
