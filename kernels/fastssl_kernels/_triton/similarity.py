"""Triton kernels of _similarity.py: log-sum-exps of one tile of similarities, and its gradient.

The host walks over square tiles of 4096 x 4096, programs over their small tiles; row and column
sums come from the same products, as partial maxima and sums that are combined in a fixed order.

Shapes: N queries, M keys, D embedding; R x C a host tile.
"""

# mypy: allow-untyped-defs
# (a Triton kernel's arguments have no Python types)

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastssl_kernels._triton.class_softmax import LOG2E, dot_precision, logits_tile

SIDES = (4096, 4096)  # 32 MiB of H in two bytes


def tile(x: Tensor) -> dict[str, int]:
    """Tile sides, warps and stages for x's dtype; each compiles without spills."""
    if x.dtype == torch.float32:
        sides = {"BLOCK_N": 32, "BLOCK_M": 64, "BLOCK_D": 32}
        return {**sides, "num_warps": 4, "num_stages": 3}
    sides = {"BLOCK_N": 64, "BLOCK_M": 128, "BLOCK_D": 64}
    return {**sides, "num_warps": 8, "num_stages": 3}


@triton.jit
def _products(
    q_ptr, k_ptr, rows, cols, N, M, D, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr, P: tl.constexpr
):
    """q[rows] . k[cols]; past the ends the last row or column again."""
    near, here = tl.minimum(rows, N - 1), tl.minimum(cols, M - 1)
    return logits_tile(q_ptr, k_ptr, near, here, D, BLOCK_D, EVEN_D, P)


@triton.jit
def _meets(top, left, first, period, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    """Whether a tile holds an entry a multiple of `period` away from the own key's diagonal."""
    least = left - first - top - (BLOCK_N - 1)
    most = left + (BLOCK_M - 1) - first - top
    shift = period * (tl.abs(least) // period + 1)  # remainders of what is not negative
    return (most + shift) // period > (least + shift - 1) // period


@triton.jit
def _lse_kernel(
    q_ptr,
    k_ptr,
    row_ptr,  # (3, column tiles, R): maximum, sum of exponentials, positives
    col_ptr,  # (2, row tiles, C)
    N,
    M,
    D,
    first,  # column that is the own key of row 0
    low,  # columns in [low, high) can be positives
    high,
    period,
    KIND: tl.constexpr,
    OWN: tl.constexpr,
    COLUMNS: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row_tiles, col_tiles = tl.cdiv(N, BLOCK_N), tl.cdiv(M, BLOCK_M)
    i, j = tl.program_id(0) % row_tiles, tl.program_id(0) // row_tiles
    rows, cols = i * BLOCK_N + tl.arange(0, BLOCK_N), j * BLOCK_M + tl.arange(0, BLOCK_M)
    s = _products(q_ptr, k_ptr, rows, cols, N, M, D, BLOCK_D, EVEN_D, PRECISION)
    if KIND == 1:
        s = s * s
    if KIND == 2:
        s = tl.abs(s)
    inside = (rows < N)[:, None] & (cols < M)[None, :]
    away = cols[None, :] - first - rows[:, None]
    counts = inside & (away != 0) if OWN else inside
    positive = tl.zeros((BLOCK_N,), tl.float32)
    if _meets(i * BLOCK_N, j * BLOCK_M, first, period, BLOCK_N, BLOCK_M):
        among = (cols >= low) & (cols < high)
        positive = tl.sum(tl.where(counts & among[None, :] & (away % period == 0), s, 0.0), 1)
    tl.store(row_ptr + (2 * col_tiles + j) * N + rows, positive, mask=rows < N)
    s = tl.where(counts, s, -1e30)  # finite: a row of a tile may count nothing
    top = tl.max(s, 1)
    exps = tl.sum(tl.where(counts, tl.exp2((s - top[:, None]) * LOG2E), 0.0), 1)
    tl.store(row_ptr + j * N + rows, top, mask=rows < N)
    tl.store(row_ptr + (col_tiles + j) * N + rows, exps, mask=rows < N)
    if COLUMNS:
        top = tl.max(s, 0)
        exps = tl.sum(tl.where(counts, tl.exp2((s - top[None, :]) * LOG2E), 0.0), 0)
        tl.store(col_ptr + i * M + cols, top, mask=cols < M)
        tl.store(col_ptr + (row_tiles + i) * M + cols, exps, mask=cols < M)


def tile_sums(
    q: Tensor, k: Tensor, rows: slice, columns: slice, pairs: Any, kind: int, wanted: bool
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor] | None, Tensor]:
    """(maximum, sum of exponentials) over a host tile's rows and columns, and positives (R,)."""
    a, b = q[rows], k[columns]
    config = tile(q)
    row_tiles = triton.cdiv(len(a), config["BLOCK_N"])
    col_tiles = triton.cdiv(len(b), config["BLOCK_M"])
    row = q.new_empty(3, col_tiles, len(a), dtype=torch.float32)
    col = q.new_empty(2, row_tiles, len(b), dtype=torch.float32) if wanted else row
    _lse_kernel[(row_tiles * col_tiles,)](
        a,
        b,
        row,
        col,
        len(a),
        len(b),
        q.shape[1],
        *_counted(pairs, rows, columns),
        KIND=kind,
        OWN=pairs.own,
        COLUMNS=wanted,
        EVEN_D=q.shape[1] % config["BLOCK_D"] == 0,
        PRECISION=dot_precision(),
        **config,
    )
    return _combined(row), _combined(col) if wanted else None, row[2].sum(0)


def _combined(partial: Tensor) -> tuple[Tensor, Tensor]:
    """One (maximum, sum of exponentials) from those of the tiles, (2 or 3, tiles, n)."""
    top = partial[0].amax(0)
    return top, (partial[1] * (partial[0] - top).exp()).sum(0)


def _counted(pairs: Any, rows: slice, columns: slice) -> tuple[int, int, int, int]:
    """first, low, high and period, counted from a host tile's first row and column."""
    low = pairs.first - columns.start
    return low + rows.start, low, low + pairs.n, pairs.period


@triton.jit
def _gradient_kernel(
    q_ptr,
    k_ptr,
    row_ptr,  # (R,) log-sum-exps, then the gradients of Upstream
    g_row_ptr,
    g_positive_ptr,
    col_ptr,  # (C,)
    g_col_ptr,
    g_positive_col_ptr,
    h_ptr,  # (R, C)
    N,
    M,
    D,
    first,
    low,
    high,
    period,
    stride,
    KIND: tl.constexpr,
    OWN: tl.constexpr,
    COLUMNS: tl.constexpr,
    SELF: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row_tiles = tl.cdiv(N, BLOCK_N)
    i, j = tl.program_id(0) % row_tiles, tl.program_id(0) // row_tiles
    rows, cols = i * BLOCK_N + tl.arange(0, BLOCK_N), j * BLOCK_M + tl.arange(0, BLOCK_M)
    z = _products(q_ptr, k_ptr, rows, cols, N, M, D, BLOCK_D, EVEN_D, PRECISION)
    s = z
    if KIND == 1:
        s = z * z
    if KIND == 2:
        s = tl.abs(z)
    inside = (rows < N)[:, None] & (cols < M)[None, :]
    row = tl.load(row_ptr + rows, mask=rows < N, other=0.0)
    g_row = tl.load(g_row_ptr + rows, mask=rows < N, other=0.0)
    h = g_row[:, None] * tl.exp2((s - row[:, None]) * LOG2E)
    if COLUMNS:
        col = tl.load(col_ptr + cols, mask=cols < M, other=0.0)
        g_col = tl.load(g_col_ptr + cols, mask=cols < M, other=0.0)
        h += g_col[None, :] * tl.exp2((s - col[None, :]) * LOG2E)
    away = cols[None, :] - first - rows[:, None]
    if _meets(i * BLOCK_N, j * BLOCK_M, first, period, BLOCK_N, BLOCK_M):
        g = tl.load(g_positive_ptr + rows, mask=rows < N, other=0.0)[:, None]
        if SELF:
            g += tl.load(g_positive_col_ptr + cols, mask=cols < M, other=0.0)[None, :]
        among = (cols >= low) & (cols < high)
        h += tl.where(among[None, :] & (away % period == 0), g, 0.0)
    if KIND == 1:
        h = h * 2.0 * z
    if KIND == 2:
        h = tl.where(z < 0, -h, tl.where(z > 0, h, 0.0))
    if OWN:
        h = tl.where(away != 0, h, 0.0)
    at = rows.to(tl.int64)[:, None] * stride + cols[None, :]
    tl.store(h_ptr + at, h.to(h_ptr.dtype.element_ty), mask=inside)


def tile_gradient(
    q: Tensor, k: Tensor, rows: slice, columns: slice, pairs: Any, kind: int, up: Any
) -> Tensor:
    """H (R, C) of one host tile in q's dtype; `pairs` and `up` as in _similarity.py."""
    a, b = q[rows], k[columns]
    config = tile(q)
    stride = -(-len(b) // 8) * 8  # rows that start on 16 bytes
    h = q.new_empty(len(a), stride)
    programs = triton.cdiv(len(a), config["BLOCK_N"]) * triton.cdiv(len(b), config["BLOCK_M"])
    _gradient_kernel[(programs,)](
        a,
        b,
        *(x[rows] for x in up[:3]),
        *(x[columns] if len(x) else up.row for x in up[3:]),
        h,
        len(a),
        len(b),
        q.shape[1],
        *_counted(pairs, rows, columns),
        stride,
        KIND=kind,
        OWN=pairs.own,
        COLUMNS=len(up.col) > 0,
        SELF=len(up.g_positive_col) > 0,
        EVEN_D=q.shape[1] % config["BLOCK_D"] == 0,
        PRECISION=dot_precision(),
        **config,
    )
    return h[:, : len(b)]
