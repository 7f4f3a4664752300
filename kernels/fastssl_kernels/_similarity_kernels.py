"""Triton kernels of _similarity.py: log-sum-exps of one tile of similarities, and its gradient.

The host walks over square tiles of 4096 x 4096, programs over their small tiles; row and column
sums come from the same products, as partial maxima and sums that are combined in a fixed order.

Shapes: N queries, M keys, D embedding; R x C a host tile.
"""

# mypy: allow-untyped-defs
# (a Triton kernel's arguments have no Python types)

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastssl_kernels._class_softmax_kernels import LOG2E, dot_precision, logits_tile

SIDES = (4096, 4096)  # 32 MiB of H in two bytes


def tile(x: Tensor) -> dict[str, int]:
    """Tile sides, warps and stages for x's dtype; each compiles without spills."""
    if x.dtype == torch.float32:
        sides = {"BLOCK_N": 32, "BLOCK_M": 64, "BLOCK_D": 32}
        return {**sides, "num_warps": 4, "num_stages": 3}
    sides = {"BLOCK_N": 64, "BLOCK_M": 128, "BLOCK_D": 64}
    return {**sides, "num_warps": 8, "num_stages": 3}


def half_scale(g_row: Tensor, g_col: Tensor) -> Tensor:
    """() power of two for float16 tiles of H, as for blocks of class gradients.

    2^10, not 2^15: a derivative of the square, 2 q.k, comes on top.
    """
    bound = g_row.abs().max() + (g_col.abs().max() if len(g_col) else 0)
    return torch.exp2(torch.floor(10 - torch.log2(bound.clamp(min=1e-30))))


@triton.jit
def _products(
    q_ptr, k_ptr, rows, cols, N, M, D, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr, P: tl.constexpr
):
    """q[rows] . k[cols]; past the ends the last row or column again."""
    near, here = tl.minimum(rows, N - 1), tl.minimum(cols, M - 1)
    return logits_tile(q_ptr, k_ptr, near, here, D, BLOCK_D, EVEN_D, P)


@triton.jit
def _lse_kernel(
    q_ptr,
    k_ptr,
    row_ptr,  # (2, column tiles, R): maximum, sum of exponentials
    col_ptr,  # (2, row tiles, C)
    N,
    M,
    D,
    skip,
    KIND: tl.constexpr,
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
    counts = (rows < N)[:, None] & (cols < M)[None, :] & (cols[None, :] - skip != rows[:, None])
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


def tile_lse(
    q: Tensor, k: Tensor, rows: slice, columns: slice, skip: int, kind: int, wanted: bool
) -> tuple[Tensor, Tensor]:
    """Log-sum-exp over one host tile's rows (R,), and columns (C,) or (0,); float32."""
    a, b = q[rows], k[columns]
    config = tile(q)
    row_tiles = triton.cdiv(len(a), config["BLOCK_N"])
    col_tiles = triton.cdiv(len(b), config["BLOCK_M"])
    row = q.new_empty(2, col_tiles, len(a), dtype=torch.float32)
    col = q.new_empty(2, row_tiles, len(b), dtype=torch.float32) if wanted else row
    _lse_kernel[(row_tiles * col_tiles,)](
        a,
        b,
        row,
        col,
        len(a),
        len(b),
        q.shape[1],
        _offset(rows, columns, skip),
        KIND=kind,
        COLUMNS=wanted,
        EVEN_D=q.shape[1] % config["BLOCK_D"] == 0,
        PRECISION=dot_precision(q),
        **config,
    )
    across = torch.logsumexp(row[0] + row[1].log(), 0)
    return across, torch.logsumexp(col[0] + col[1].log(), 0) if wanted else row.new_empty(0)


def _offset(rows: slice, columns: slice, skip: int) -> int:
    """`skip` counted inside the host tile; far outside it where nothing is left out."""
    return rows.start + skip - columns.start if skip >= 0 else 2**30


@triton.jit
def _gradient_kernel(
    q_ptr,
    k_ptr,
    row_ptr,  # (R,) log-sum-exps, and their gradients below
    col_ptr,  # (C,)
    g_row_ptr,
    g_col_ptr,
    h_ptr,  # (R, C)
    N,
    M,
    D,
    skip,
    stride,
    KIND: tl.constexpr,
    COLUMNS: tl.constexpr,
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
    if KIND == 1:
        h = h * 2.0 * z
    if KIND == 2:
        h = tl.where(z < 0, -h, tl.where(z > 0, h, 0.0))
    h = tl.where(cols[None, :] - skip != rows[:, None], h, 0.0)
    at = rows.to(tl.int64)[:, None] * stride + cols[None, :]
    tl.store(h_ptr + at, h.to(h_ptr.dtype.element_ty), mask=inside)


def tile_gradient(
    q: Tensor,
    k: Tensor,
    row: Tensor,
    col: Tensor,
    g_row: Tensor,
    g_col: Tensor,
    rows: slice,
    columns: slice,
    skip: int,
    kind: int,
) -> Tensor:
    """H (R, C) of one host tile in q's dtype."""
    a, b = q[rows], k[columns]
    config = tile(q)
    stride = -(-len(b) // 8) * 8  # rows that start on 16 bytes
    h = q.new_empty(len(a), stride)
    programs = triton.cdiv(len(a), config["BLOCK_N"]) * triton.cdiv(len(b), config["BLOCK_M"])
    with_columns = len(col) > 0
    _gradient_kernel[(programs,)](
        a,
        b,
        row[rows],
        col[columns] if with_columns else row,
        g_row[rows],
        g_col[columns] if with_columns else row,
        h,
        len(a),
        len(b),
        q.shape[1],
        _offset(rows, columns, skip),
        stride,
        KIND=kind,
        COLUMNS=with_columns,
        EVEN_D=q.shape[1] % config["BLOCK_D"] == 0,
        PRECISION=dot_precision(q),
        **config,
    )
    return h[:, : len(b)]
