"""Log-sum-exp of every row and column of a similarity matrix that exists one tile at a time.

    s_ij = f(q_i . k_j),   row_i = log sum_j exp s_ij,   col_j = log sum_i exp s_ij
    H_ij = (g_row_i exp(s_ij - row_i) + g_col_j exp(s_ij - col_j)) f'(q_i . k_j)
    dq = H k,   dk = H^T q

f is the identity, the square or the absolute value. With `skip` >= 0 the entries (i, i + skip) take
no part: a sample is no negative of itself. Temperatures are factors of q and k. For q = k the
matrix is symmetric, col = row, and dz = H z with both terms in H is the whole gradient.

Shapes: N queries, M keys, D embedding. Tiles are R x C.
"""

# mypy: allow-untyped-defs
# (autograd callbacks carry no types)

from collections.abc import Iterator

import torch
from torch import Tensor

from fastssl_kernels import _similarity_kernels as kernels
from fastssl_kernels._class_softmax import blocks, or_zeros, work_dtype
from fastssl_kernels._gemm import matmul_t
from fastssl_kernels._launch import use_triton

KINDS = {"cosine": 0, "squared": 1, "absolute": 2}  # f


def _sides(q: Tensor) -> tuple[int, int]:
    """R, C of a tile."""
    return kernels.SIDES if use_triton(q) else (512, 1024)


def _tiles(q: Tensor, k: Tensor) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of each tile, row by row of tiles."""
    rows, columns = _sides(q)
    for _, top, bottom in blocks(len(q), rows):
        for _, left, right in blocks(len(k), columns):
            yield slice(top, bottom), slice(left, right)


def _products(q: Tensor, k: Tensor, rows: slice, columns: slice) -> Tensor:
    return matmul_t(q[rows], k[columns])


def _apply(z: Tensor, kind: int) -> Tensor:
    """f(z), in place where z is not needed for the derivative."""
    return z if kind == 0 else z.square() if kind == 1 else z.abs()


def _own(s: Tensor, rows: slice, columns: slice, skip: int) -> Tensor:
    """The tile's entries (i, i + skip), a view; empty where the tile has none, or skip < 0."""
    offset = rows.start + skip - columns.start
    if skip < 0 or offset >= s.shape[1] or -offset >= s.shape[0]:
        return s[:0, 0]
    return s.diagonal(offset)


def _tile_lse(
    q: Tensor, k: Tensor, rows: slice, columns: slice, skip: int, kind: int, wanted: bool
) -> tuple[Tensor, Tensor]:
    """Log-sum-exp over one tile's rows (R,), and columns (C,) or (0,)."""
    s = _apply(_products(q, k, rows, columns), kind)
    _own(s, rows, columns, skip).fill_(-1e30)  # finite: a row of a tile may hold nothing else
    return lse(s, 1), lse(s, 0) if wanted else s.new_empty(0)


def lse(s: Tensor, dim: int) -> Tensor:
    """torch.logsumexp, in the order of passes that a block in cache prefers."""
    top = s.amax(dim, keepdim=True)
    return ((s - top).exp_().sum(dim, keepdim=True).log_() + top).squeeze(dim)


def _similarity_lse(
    q: Tensor, k: Tensor, skip: int, kind: int, columns: bool
) -> tuple[Tensor, Tensor]:
    dtype = work_dtype(q)
    row = q.new_full((len(q),), -torch.inf, dtype=dtype)
    col = q.new_full((len(k) if columns else 0,), -torch.inf, dtype=dtype)
    run = kernels.tile_lse if use_triton(q) else _tile_lse
    for r, c in _tiles(q, k):
        across, down = run(q, k, r, c, skip, kind, columns)
        row[r] = torch.logaddexp(row[r], across)
        if columns:
            col[c] = torch.logaddexp(col[c], down)
    return row, col


def _tile_gradient(
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
    """H (R, C) of one tile; without columns col and g_col are (0,)."""
    z = _products(q, k, rows, columns)
    s = _apply(z, kind)
    h = (s - row[rows, None]).exp_().mul_(g_row[rows, None])
    if len(col):
        h += (s - col[columns]).exp_().mul_(g_col[columns])
    if kind:
        h *= 2 * z if kind == 1 else z.sign()
    _own(h, rows, columns, skip).fill_(0)
    return h


def _gradients(
    q: Tensor,
    k: Tensor,
    row: Tensor,
    col: Tensor,
    g_row: Tensor,
    g_col: Tensor,
    skip: int,
    kind: int,
    keys: bool,
) -> tuple[Tensor, Tensor]:
    """dq (N, D), and dk (M, D) or (0,)."""
    dtype = work_dtype(q)
    dq = torch.zeros_like(q, dtype=dtype)
    dk = torch.zeros_like(k, dtype=dtype) if keys else q.new_empty(0)
    unscale = torch.ones((), dtype=dtype, device=q.device)
    run = _tile_gradient
    if use_triton(q):
        run = kernels.tile_gradient
        if q.dtype == torch.float16:
            scale = kernels.half_scale(g_row, g_col)
            g_row, g_col, unscale = g_row * scale, g_col * scale, 1 / scale
    for r, c in _tiles(q, k):
        h = run(q, k, row, col, g_row, g_col, r, c, skip, kind)
        dq[r] += matmul_t(h, k[c].T)
        if keys:
            dk[c] += matmul_t(h.T, q[r].T)
    return dq.mul_(unscale).to(q.dtype), dk.mul_(unscale).to(q.dtype)


@torch.library.custom_op("fastssl::similarity_lse", mutates_args=())
def similarity_lse(
    q: Tensor, k: Tensor, skip: int, kind: int, columns: bool
) -> tuple[Tensor, Tensor]:
    """row (N,), and col (M,), or (0,) without `columns`."""
    with torch.autocast(q.device.type, enabled=False):
        return _similarity_lse(q.contiguous(), k.contiguous(), skip, kind, columns)


@similarity_lse.register_fake
def _(q, k, skip, kind, columns):
    dtype = work_dtype(q)
    return q.new_empty(len(q), dtype=dtype), q.new_empty(len(k) if columns else 0, dtype=dtype)


@torch.library.custom_op("fastssl::similarity_lse_backward", mutates_args=())
def similarity_lse_backward(
    q: Tensor,
    k: Tensor,
    row: Tensor,
    col: Tensor,
    g_row: Tensor,
    g_col: Tensor,
    skip: int,
    kind: int,
    keys: bool,
) -> tuple[Tensor, Tensor]:
    """dq (N, D), and dk (M, D), or (0,) without `keys`."""
    q, k, g_row, g_col = (t.contiguous() for t in (q, k, g_row, g_col))  # kernels take no strides
    with torch.autocast(q.device.type, enabled=False):
        return _gradients(q, k, row, col, g_row, g_col, skip, kind, keys)


@similarity_lse_backward.register_fake
def _(q, k, row, col, g_row, g_col, skip, kind, keys):
    return torch.empty_like(q), torch.empty_like(k) if keys else q.new_empty(0)


def _setup_context(ctx, inputs, output) -> None:
    q, k, ctx.skip, ctx.kind, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, *output)


def _backward(ctx, g_row, g_col):
    q, k, row, col = ctx.saved_tensors
    (g_row,), (g_col,) = or_zeros((g_row,), row), or_zeros((g_col,), col)
    grads = similarity_lse_backward(q, k, row, col, g_row, g_col, ctx.skip, ctx.kind, True)
    return *grads, None, None, None


similarity_lse.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("fastssl::self_similarity_lse", mutates_args=())
def self_similarity_lse(z: Tensor, kind: int) -> Tensor:
    """Each sample against all others: row (N,) of z (N, D) with itself, the diagonal left out."""
    return similarity_lse(z, z, 0, kind, False)[0]


@self_similarity_lse.register_fake
def _(z, kind):
    return z.new_empty(len(z), dtype=work_dtype(z))


def _self_setup_context(ctx, inputs, output) -> None:
    z, ctx.kind = inputs
    ctx.save_for_backward(z, output)


def _self_backward(ctx, g):
    z, row = ctx.saved_tensors
    return similarity_lse_backward(z, z, row, row, g, g, 0, ctx.kind, False)[0], None


self_similarity_lse.register_autograd(_self_backward, setup_context=_self_setup_context)
