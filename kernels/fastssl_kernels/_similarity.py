"""Log-sum-exp of every row and column of a similarity matrix that exists one tile at a time.

    s_ij = f(q_i . k_j),   row_i = log sum_j exp s_ij,   col_j = log sum_i exp s_ij
    positive_i = sum of s_ij over the positives of i
    H_ij = (g_row_i exp(s_ij - row_i) + g_col_j exp(s_ij - col_j) + g_positive_i [j in P(i)])
           f'(q_i . k_j)
    dq = H k,   dk = H^T q

f is the identity, the square or the absolute value; temperatures are factors of q and k. Positives
come from the products that the sums come from, and enter H before it is rounded, so that a small
loss is a difference of equal errors. Log-sum-exps are kept as two floats (_precision.py).

Positives: key first + i is query i itself, or its counterpart. Of the N keys from `first` on, the
positives of query i are those a multiple of `period` away from key first + i. With exclude_self
that key is excluded from every sum: a sample is no negative of itself. For q = k the matrix is
symmetric, col = row, and dz = H z with both sides' terms in H is the full gradient.

Shapes: N queries, M keys, D embedding. Tiles are R x C.
"""

# mypy: allow-untyped-defs
# (autograd callbacks carry no types)

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastssl_kernels._autograd import twice_differentiable
from fastssl_kernels._class_softmax import blocks, zeros_for_none
from fastssl_kernels._dispatch import matmul_t, use_triton
from fastssl_kernels._precision import (
    accumulation_dtype,
    power_of_two_scale,
    two_sum,
    without_autocast,
)
from fastssl_kernels._triton import similarity as kernels

KINDS = {"cosine": 0, "squared": 1, "absolute": 2}  # f
Statistics = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


class Pairs(NamedTuple):
    """Which keys are a query's positives, as diagonals of a tile; see above."""

    n: int  # queries
    first: int
    period: int
    exclude_self: bool

    def diagonals(self, rows: slice, columns: slice) -> list[tuple[int, bool]]:
        """(offset, whether its keys are first + i) of each diagonal of positives in the tile."""
        self_offset = self.first + rows.start - columns.start
        periods = self.n // self.period
        offsets = (self_offset + i * self.period for i in range(-periods, periods + 1))
        height, width = rows.stop - rows.start, columns.stop - columns.start
        return [(o, o == self_offset) for o in offsets if -height < o < width]


class Upstream(NamedTuple):
    """Log-sum-exps and their incoming gradients; those of columns are (0,) where unused."""

    row: Tensor  # (N,), as are g_row and g_positive
    g_row: Tensor
    g_positive: Tensor
    col: Tensor  # (M,), as is g_col
    g_col: Tensor
    g_positive_col: Tensor  # (M,) for q = k, else (0,)


def _sides(q: Tensor) -> tuple[int, int]:
    """R, C of a tile."""
    return kernels.SIDES if use_triton(q) else (512, 1024)


def _tiles(q: Tensor, k: Tensor) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of each tile, row by row of tiles."""
    rows, columns = _sides(q)
    for _, top, bottom in blocks(len(q), rows):
        for _, left, right in blocks(len(k), columns):
            yield slice(top, bottom), slice(left, right)


def _apply(z: Tensor, kind: int) -> Tensor:
    return z if kind == 0 else z.square() if kind == 1 else z.abs()


def _inside(view: Tensor, offset: int, pairs: Pairs, columns: slice) -> slice:
    """The part of a diagonal whose keys are among the N from `first` on."""
    start = max(offset, 0) + columns.start  # the diagonal's first key
    begin = max(pairs.first - start, 0)
    return slice(begin, max(min(pairs.first + pairs.n - start, len(view)), begin))


def _tile_sums(
    q: Tensor, k: Tensor, rows: slice, columns: slice, pairs: Pairs, kind: int, with_columns: bool
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor] | None, Tensor]:
    """(maximum, sum of exponentials) over rows and over columns, and positives (R,)."""
    s = _apply(matmul_t(q[rows], k[columns]), kind)
    positive = s.new_zeros(len(s))
    for offset, is_self in pairs.diagonals(rows, columns):
        diagonal = s.diagonal(offset)
        part = _inside(diagonal, offset, pairs, columns)
        if is_self and pairs.exclude_self:
            diagonal[part] = -1e30  # finite: a row of a tile may hold nothing else
        else:
            positive[max(-offset, 0) :][part] += diagonal[part]
    return _sums(s, 1), _sums(s, 0) if with_columns else None, positive


def _sums(s: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    top = s.amax(dim, keepdim=True)
    return top.squeeze(dim), (s - top).exp_().sum(dim)


def _merge(running: Tensor, part: slice, tile: tuple[Tensor, Tensor]) -> None:
    """Adds a tile's (maximum, sum of exponentials) to the running ones (2, N)."""
    top = torch.maximum(running[0, part], tile[0])
    rescaled = running[1, part] * (running[0, part] - top).exp()
    running[1, part] = rescaled + tile[1] * (tile[0] - top).exp()
    running[0, part] = top


def _similarity_lse(q: Tensor, k: Tensor, pairs: Pairs, kind: int, columns: bool) -> Statistics:
    dtype = accumulation_dtype(q)
    row, col = (q.new_zeros(2, n, dtype=dtype) for n in (len(q), len(k) if columns else 0))
    row[0], col[0] = -torch.inf, -torch.inf
    positive = q.new_zeros(len(q), dtype=dtype)
    run = kernels.tile_sums if use_triton(q) else _tile_sums
    for r, c in _tiles(q, k):
        row_sums, col_sums, tile_positive = run(q, k, r, c, pairs, kind, columns)
        _merge(row, r, row_sums)
        positive[r] += tile_positive
        if col_sums is not None:
            _merge(col, c, col_sums)
    return *two_sum(row[0], row[1].log()), *two_sum(col[0], col[1].log()), positive


def _tile_gradient(
    q: Tensor, k: Tensor, rows: slice, columns: slice, pairs: Pairs, kind: int, up: Upstream
) -> Tensor:
    """H (R, C) of one tile."""
    z = matmul_t(q[rows], k[columns])
    s = _apply(z, kind)
    h = (s - up.row[rows, None]).exp_().mul_(up.g_row[rows, None])
    if len(up.col):
        h += (s - up.col[columns]).exp_().mul_(up.g_col[columns])
    for offset, is_self in pairs.diagonals(rows, columns):
        diagonal = h.diagonal(offset)
        part = _inside(diagonal, offset, pairs, columns)
        if is_self and pairs.exclude_self:
            diagonal[part] = 0
            continue
        diagonal[part] += up.g_positive[rows][max(-offset, 0) :][part]
        if len(up.g_positive_col):
            diagonal[part] += up.g_positive_col[columns][max(offset, 0) :][part]
    if kind:
        h *= 2 * z if kind == 1 else z.sign()
    return h


def _gradients(
    q: Tensor, k: Tensor, pairs: Pairs, kind: int, up: Upstream, keys: bool
) -> tuple[Tensor, Tensor]:
    """dq (N, D), and dk (M, D) or (0,)."""
    dtype = accumulation_dtype(q)
    dq = torch.zeros_like(q, dtype=dtype)
    dk = torch.zeros_like(k, dtype=dtype) if keys else q.new_empty(0, dtype=dtype)
    unscale = torch.ones((), dtype=dtype, device=q.device)
    run = kernels.tile_gradient if use_triton(q) else _tile_gradient
    if use_triton(q) and q.dtype == torch.float16:
        grads = {n: g for n, g in up._asdict().items() if n.startswith("g_")}
        bound = torch.stack([g.abs().max() for g in grads.values() if len(g)]).sum()
        # not 2^15 as for class gradients: the derivative of the square, 2 q.k, multiplies it
        scale = power_of_two_scale(bound, exponent=10)
        unscale = 1 / scale
        up = up._replace(**{n: g * scale for n, g in grads.items()})
    for r, c in _tiles(q, k):
        h = run(q, k, r, c, pairs, kind, up)
        dq[r] += matmul_t(h, k[c].T)
        if keys:
            dk[c] += matmul_t(h.T, q[r].T)
    return dq.mul_(unscale).to(q.dtype), dk.mul_(unscale).to(q.dtype)


def _formula(
    q: Tensor, k: Tensor, first: int, period: int, exclude_self: bool, kind: int
) -> tuple[Tensor, Tensor, Tensor]:
    """row (N,), positive (N,) and col (M,) in eager PyTorch, for second derivatives."""
    dtype = accumulation_dtype(q)
    s = _apply(q.to(dtype) @ k.to(dtype).T, kind)  # (N, M)
    key = torch.arange(len(k), device=q.device) - first
    distance = key - torch.arange(len(q), device=q.device)[:, None]
    positive = (key >= 0) & (key < len(q)) & (distance % max(period, 1) == 0)
    if exclude_self:
        positive &= distance != 0
        s = s.masked_fill(distance == 0, -torch.inf)
    return s.logsumexp(1), s.where(positive, 0).sum(1), s.logsumexp(0)


@torch.library.custom_op("fastssl::similarity_lse", mutates_args=())
def similarity_lse(
    q: Tensor, k: Tensor, first: int, period: int, exclude_self: bool, kind: int, columns: bool
) -> Statistics:
    """row, row_lo (N,), col, col_lo (M,), or (0,) without `columns`, and positive (N,)."""
    pairs = Pairs(len(q), first, period, exclude_self)
    with without_autocast(q):
        return _similarity_lse(q.contiguous(), k.contiguous(), pairs, kind, columns)


@similarity_lse.register_fake
def _(q, k, first, period, exclude_self, kind, columns):
    sizes = [len(q)] * 2 + [len(k) if columns else 0] * 2 + [len(q)]
    return tuple(q.new_empty(n, dtype=accumulation_dtype(q)) for n in sizes)


@torch.library.custom_op("fastssl::similarity_lse_backward", mutates_args=())
def similarity_lse_backward(
    q: Tensor,
    k: Tensor,
    upstream: list[Tensor],
    first: int,
    period: int,
    exclude_self: bool,
    kind: int,
    keys: bool,
) -> tuple[Tensor, Tensor]:
    """dq (N, D), and dk (M, D), or (0,) without `keys`. `upstream` in the order of Upstream."""
    up = Upstream(*(t.contiguous() for t in upstream))  # kernels take no strides
    pairs = Pairs(len(q), first, period, exclude_self)
    with without_autocast(q):
        return _gradients(q.contiguous(), k.contiguous(), pairs, kind, up, keys)


@similarity_lse_backward.register_fake
def _(q, k, upstream, first, period, exclude_self, kind, keys):
    return torch.empty_like(q), torch.empty_like(k) if keys else q.new_empty(0)


def _setup_context(ctx, inputs, output) -> None:
    q, k, *ctx.options, _ = inputs
    row, row_lo, col, col_lo, _ = output
    ctx.mark_non_differentiable(row_lo, col_lo)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, row, row_lo, col, col_lo)


def _backward(ctx, g_row, _, g_col, __, g_positive):
    q, k, row, row_lo, col, col_lo = ctx.saved_tensors
    g_row, g_positive = zeros_for_none((g_row, g_positive), row)
    (g_col,) = zeros_for_none((g_col,), col)
    with torch.no_grad():
        grads = (g_row * (-row_lo).exp(), g_positive, col, g_col * (-col_lo).exp())
        upstream = [row, *grads, q.new_empty(0)]
        dq, dk = similarity_lse_backward(q, k, upstream, *ctx.options, True)
    used = 3 if len(col) else 2

    def formula(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        return _formula(q, k, *ctx.options)[:used]

    used_grads = [g_row, g_positive, g_col][:used]
    dq, dk = twice_differentiable([dq, dk], [q, k], used_grads, formula)
    return dq, dk, None, None, None, None, None


similarity_lse.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("fastssl::self_similarity_lse", mutates_args=())
def self_similarity_lse(z: Tensor, period: int, kind: int) -> tuple[Tensor, Tensor, Tensor]:
    """Each row of z (N, D) against all others: row, row_lo and positive, (N,) each."""
    row, row_lo, _, _, positive = similarity_lse(z, z, 0, period, True, kind, False)
    return row, row_lo, positive


@self_similarity_lse.register_fake
def _(z, period, kind):
    return tuple(z.new_empty(len(z), dtype=accumulation_dtype(z)) for _ in range(3))


def _self_setup_context(ctx, inputs, output) -> None:
    z, ctx.period, ctx.kind = inputs
    row, row_lo, _ = output
    ctx.mark_non_differentiable(row_lo)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(z, row, row_lo)


def _self_backward(ctx, g, _, g_positive):
    z, row, row_lo = ctx.saved_tensors
    g, g_positive = zeros_for_none((g, g_positive), row)
    with torch.no_grad():
        scaled = g * (-row_lo).exp()
        upstream = [row, scaled, g_positive, row, scaled, g_positive]
        dz, _ = similarity_lse_backward(z, z, upstream, 0, ctx.period, True, ctx.kind, False)

    def formula(z: Tensor) -> tuple[Tensor, ...]:
        return _formula(z, z, 0, ctx.period, True, ctx.kind)[:2]

    (dz,) = twice_differentiable([dz], [z], [g, g_positive], formula)
    return dz, None, None


self_similarity_lse.register_autograd(_self_backward, setup_context=_self_setup_context)
