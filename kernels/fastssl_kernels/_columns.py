"""Statistics of embedding columns over the batch, and passes over rows that stay in the cache.

Shapes: V views, n rows of this rank, N rows of all ranks, D embedding.
"""
# mypy: allow-untyped-defs
# (a Triton kernel's arguments have no Python types)

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastssl_kernels.distributed import sum_ranks

BLOCK_N = 64  # rows of a kernel's tile
BLOCK_D = 32  # columns of a kernel's tile: 64 B of bf16, two sectors
SLOTS = 1024  # partial sums that a kernel adds at once
CHUNK = 2**18  # elements (1 MiB of fp32) that a pass handles at once, to stay in the cache


def accumulation_dtype(z: Tensor) -> torch.dtype:
    """What sums over z are kept in: float64 for float64, else float32."""
    return torch.float64 if z.dtype == torch.float64 else torch.float32


def row_chunks(z: Tensor) -> Iterator[slice]:
    """Slices of z's rows (V, n, D), each of about CHUNK elements."""
    views, rows, width = z.shape
    step = max(1, CHUNK // (views * width))
    for start in range(0, rows, step):
        yield slice(start, start + step)


def centred(z: Tensor, total: int, group: str) -> tuple[Tensor, Tensor]:
    """(mean (V, D), z - mean (V, n, D)) over the `total` rows of all ranks."""
    dtype = accumulation_dtype(z)
    mean = sum_ranks(z.sum(1, dtype=dtype), group) / total
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


@triton.jit
def load_tile(z_ptr, view, start, cols, N, D, BLOCK_N: tl.constexpr):
    """z[view, start : start + BLOCK_N, cols] in fp32, 0 outside, and which rows are inside."""
    rows = start + tl.arange(0, BLOCK_N)
    inside = (rows < N)[:, None] & (cols < D)[None, :]
    offsets = (view * N + rows).to(tl.int64)[:, None] * D + cols[None, :]  # int64: V * N * D
    return tl.load(z_ptr + offsets, mask=inside, other=0.0).to(tl.float32), inside, offsets


@triton.jit
def column_mean(z_ptr, view, cols, N, D, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Means of z[view, :, cols]."""
    total = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    for start in range(0, N, BLOCK_N):
        tile, _, _ = load_tile(z_ptr, view, start, cols, N, D, BLOCK_N)
        total += tile
    return tl.sum(total, axis=0) / N


@triton.jit
def column_square(z_ptr, view, cols, mean, N, D, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Sums over rows of (z[view, :, cols] - mean)^2."""
    total = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    for start in range(0, N, BLOCK_N):
        tile, inside, _ = load_tile(z_ptr, view, start, cols, N, D, BLOCK_N)
        x = tl.where(inside, tile - mean[None, :], 0.0)
        total += x * x
    return tl.sum(total, axis=0)


@triton.jit
def reciprocal_root(x):
    """1 / sqrt(x) to the last bits: one Newton step after the hardware's approximation."""
    guess = tl.rsqrt(x)
    return guess * (1.5 - 0.5 * x * guess * guess)


@triton.jit
def slot_sum(ptr, count, BLOCK: tl.constexpr):
    """The sum of `count` fp32 partial sums, in a fixed order."""
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, count, BLOCK):
        slots = start + tl.arange(0, BLOCK)
        total += tl.load(ptr + slots, mask=slots < count, other=0.0)
    return tl.sum(total)


@triton.jit
def _total_kernel(first_ptr, first, second_ptr, second, weight, out_ptr, BLOCK: tl.constexpr):
    tl.store(
        out_ptr, slot_sum(first_ptr, first, BLOCK) + weight * slot_sum(second_ptr, second, BLOCK)
    )


def weighted_total(first: Tensor, second: Tensor, weight: float) -> Tensor:
    """first.sum() + weight * second.sum() of fp32 partial sums, in one launch -> ()."""
    out = first.new_empty(())
    _total_kernel[(1,)](first, len(first), second, len(second), weight, out, BLOCK=SLOTS)
    return out
