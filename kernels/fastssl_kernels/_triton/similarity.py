"""Triton kernels of _similarity.py: log-sum-exps of one tile of similarities, and its gradient.

The host walks over square tiles of 4096 x 4096, programs over their small tiles; row and column
sums come from the same products, as partial maxima and sums that are combined in a fixed order.

Shapes: N queries, M keys, D embedding; R x C a host tile.
"""

# mypy: allow-untyped-defs
# (a Triton kernel's arguments have no Python types)

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastssl_kernels._triton.class_softmax import LOG2E, dot_precision, logits_tile

if TYPE_CHECKING:
    from fastssl_kernels._similarity import Pairs, Upstream

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
    """q[rows] . k[cols]; rows and columns past the end repeat the last one."""
    safe_rows, safe_cols = tl.minimum(rows, N - 1), tl.minimum(cols, M - 1)
    return logits_tile(q_ptr, k_ptr, safe_rows, safe_cols, D, BLOCK_D, EVEN_D, P)


@triton.jit
def _holds_positives(top, left, first, period, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    """Whether a tile has an entry on a diagonal a multiple of `period` from that of self keys."""
    lowest = left - first - top - (BLOCK_N - 1)
    highest = left + (BLOCK_M - 1) - first - top
    shift = period * (tl.abs(lowest) // period + 1)  # makes both dividends non-negative
    return (highest + shift) // period > (lowest + shift - 1) // period


@triton.jit
def _lse_kernel(
    q_ptr,
    k_ptr,
    row_ptr,  # (3, column tiles, R): maximum, sum of exponentials, positives
    col_ptr,  # (2, row tiles, C)
    N,
    M,
    D,
    first,  # column of row 0's self key
    positives_start,  # columns in [positives_start, positives_stop) can be positives
    positives_stop,
    period,
    KIND: tl.constexpr,
    EXCLUDE_SELF: tl.constexpr,
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
    offset = cols[None, :] - first - rows[:, None]
    valid = inside & (offset != 0) if EXCLUDE_SELF else inside
    positive = tl.zeros((BLOCK_N,), tl.float32)
    if _holds_positives(i * BLOCK_N, j * BLOCK_M, first, period, BLOCK_N, BLOCK_M):
        is_candidate = (cols >= positives_start) & (cols < positives_stop)
        is_positive = valid & is_candidate[None, :] & (offset % period == 0)
        positive = tl.sum(tl.where(is_positive, s, 0.0), 1)
    tl.store(row_ptr + (2 * col_tiles + j) * N + rows, positive, mask=rows < N)
    s = tl.where(valid, s, -1e30)  # finite: a row of a tile may have no valid entry
    top = tl.max(s, 1)
    exps = tl.sum(tl.where(valid, tl.exp2((s - top[:, None]) * LOG2E), 0.0), 1)
    tl.store(row_ptr + j * N + rows, top, mask=rows < N)
    tl.store(row_ptr + (col_tiles + j) * N + rows, exps, mask=rows < N)
    if COLUMNS:
        top = tl.max(s, 0)
        exps = tl.sum(tl.where(valid, tl.exp2((s - top[None, :]) * LOG2E), 0.0), 0)
        tl.store(col_ptr + i * M + cols, top, mask=cols < M)
        tl.store(col_ptr + (row_tiles + i) * M + cols, exps, mask=cols < M)


def tile_sums(
    q: Tensor, k: Tensor, rows: slice, columns: slice, pairs: "Pairs", kind: int, with_columns: bool
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor] | None, Tensor]:
    """(maximum, sum of exponentials) over a host tile's rows and columns, and positives (R,)."""
    a, b = q[rows], k[columns]
    config = tile(q)
    row_tiles = triton.cdiv(len(a), config["BLOCK_N"])
    col_tiles = triton.cdiv(len(b), config["BLOCK_M"])
    row = q.new_empty(3, col_tiles, len(a), dtype=torch.float32)
    col = q.new_empty(2, row_tiles, len(b), dtype=torch.float32) if with_columns else row
    _lse_kernel[(row_tiles * col_tiles,)](
        a,
        b,
        row,
        col,
        len(a),
        len(b),
        q.shape[1],
        *_relative_to_tile(pairs, rows, columns),
        KIND=kind,
        EXCLUDE_SELF=pairs.exclude_self,
        COLUMNS=with_columns,
        EVEN_D=q.shape[1] % config["BLOCK_D"] == 0,
        PRECISION=dot_precision(),
        **config,
    )
    return _combined(row), _combined(col) if with_columns else None, row[2].sum(0)


def _combined(partial: Tensor) -> tuple[Tensor, Tensor]:
    """One (maximum, sum of exponentials) from those of the tiles, (2 or 3, tiles, n)."""
    top = partial[0].amax(0)
    return top, (partial[1] * (partial[0] - top).exp()).sum(0)


def _relative_to_tile(pairs: "Pairs", rows: slice, columns: slice) -> tuple[int, int, int, int]:
    """first, positives_start, positives_stop and period, relative to a host tile's corner."""
    positives_start = pairs.first - columns.start
    return positives_start + rows.start, positives_start, positives_start + pairs.n, pairs.period


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
    positives_start,
    positives_stop,
    period,
    stride,
    KIND: tl.constexpr,
    EXCLUDE_SELF: tl.constexpr,
    COLUMNS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
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
    offset = cols[None, :] - first - rows[:, None]
    if _holds_positives(i * BLOCK_N, j * BLOCK_M, first, period, BLOCK_N, BLOCK_M):
        g = tl.load(g_positive_ptr + rows, mask=rows < N, other=0.0)[:, None]
        if SYMMETRIC:
            g += tl.load(g_positive_col_ptr + cols, mask=cols < M, other=0.0)[None, :]
        is_candidate = (cols >= positives_start) & (cols < positives_stop)
        h += tl.where(is_candidate[None, :] & (offset % period == 0), g, 0.0)
    if KIND == 1:
        h = h * 2.0 * z
    if KIND == 2:
        h = tl.where(z < 0, -h, tl.where(z > 0, h, 0.0))
    if EXCLUDE_SELF:
        h = tl.where(offset != 0, h, 0.0)
    offsets = rows.to(tl.int64)[:, None] * stride + cols[None, :]
    tl.store(h_ptr + offsets, h.to(h_ptr.dtype.element_ty), mask=inside)


def tile_gradient(
    q: Tensor, k: Tensor, rows: slice, columns: slice, pairs: "Pairs", kind: int, up: "Upstream"
) -> Tensor:
    """H (R, C) of one host tile in q's dtype."""
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
        *_relative_to_tile(pairs, rows, columns),
        stride,
        KIND=kind,
        EXCLUDE_SELF=pairs.exclude_self,
        COLUMNS=len(up.col) > 0,
        SYMMETRIC=len(up.g_positive_col) > 0,
        EVEN_D=q.shape[1] % config["BLOCK_D"] == 0,
        PRECISION=dot_precision(),
        **config,
    )
    return h[:, : len(b)]
