"""Passes over columns of embeddings and sums of partial results, shared by the loss kernels.

Shapes: V views, N batch, D embedding; a tile is BLOCK_N x BLOCK_D.
"""
# mypy: allow-untyped-defs
# (a Triton kernel's arguments have no Python types)

import triton
import triton.language as tl
from torch import Tensor

BLOCK_N = 64  # rows of a kernel's tile
BLOCK_D = 32  # columns of a kernel's tile: 64 B of bf16, two sectors
SLOTS = 1024  # partial sums that a kernel adds at once


def column_grid(z: Tensor) -> tuple[int, int]:
    """A program for each block of columns of each view of z (V, N, D)."""
    views, _, width = z.shape
    return triton.cdiv(width, BLOCK_D), views


def tile_grid(z: Tensor) -> tuple[int, int, int]:
    """A program for each tile of each view of z (V, N, D)."""
    views, n, width = z.shape
    return triton.cdiv(width, BLOCK_D), triton.cdiv(n, BLOCK_N), views


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
