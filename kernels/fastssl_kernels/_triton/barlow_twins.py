"""Triton kernels of barlow_twins.py, for all pairs of views in one process.

Three launches forward beside the matrix products, one backward. Tables are that file's.

Shapes: V views, N batch, D embedding.
"""
# mypy: allow-untyped-defs
# (a Triton kernel's arguments have no Python types)

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastssl_kernels._autograd import no_gradient
from fastssl_kernels._triton.columns import (
    BLOCK_D,
    BLOCK_N,
    SLOTS,
    column_grid,
    column_mean,
    column_square,
    load_tile,
    reciprocal_root,
    slot_sum,
    tile_grid,
    weighted_total,
)
from fastssl_kernels._triton.second_moment import fused_energy_and_product

WARPS = 8  # of `_columns_kernel`, which with 4 spills on sm_100 where D is not a multiple of 16


def fused_loss(
    z: Tensor, lambd: float, eps: float, resolved_path: str, gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As barlow_twins.py's op over all pairs: three launches beside the matrix products."""
    views, n, width = z.shape
    # on the Gram path the energy includes the diagonals, which are subtracted here
    diagonal = lambd * float(resolved_path == "gram")
    pairs = views * (views - 1) / 2
    alpha = 2 * lambd / (n * pairs)
    grid = column_grid(z)
    h = torch.empty_like(z)
    mean, rstd, scale = (z.new_empty((views, width), dtype=torch.float32) for _ in range(3))
    r, coef = (z.new_empty((views, views, width), dtype=torch.float32) for _ in range(2))
    on = z.new_empty(grid[0] * views, dtype=torch.float32)
    blocks = {"BLOCK_N": BLOCK_N, "BLOCK_D": BLOCK_D}
    _columns_kernel[grid](
        z,
        h,
        mean,
        rstd,
        r,
        on,
        views,
        n,
        width,
        eps,
        diagonal,
        0.5 / pairs,
        **blocks,
        num_warps=WARPS,
    )
    energy, product = fused_energy_and_product(
        h, pairs=True, path=resolved_path, scale=1 / n, product=gradient
    )
    if not gradient:
        return no_gradient(weighted_total(on, energy, lambd / pairs))
    loss = on.new_empty(())
    _terms_kernel[grid](
        product,
        h,
        rstd,
        r,
        scale,
        coef,
        on,
        len(on),
        energy,
        len(energy),
        loss,
        views,
        n,
        width,
        alpha,
        diagonal,
        2 / (n * pairs),
        lambd / pairs,
        SLOTS=SLOTS,
        **blocks,
    )
    return loss, product, mean, scale, coef


@triton.jit
def _columns_kernel(
    z_ptr,
    h_ptr,
    mean_ptr,
    rstd_ptr,
    r_ptr,
    partial_ptr,
    V,
    N,
    D,
    eps,
    diagonal,
    weight,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Standardises columns of view a, correlates them with all views', sums diagonal terms."""
    a = tl.program_id(1)
    cols = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = cols < D
    mean_a = column_mean(z_ptr, a, cols, N, D, BLOCK_N, BLOCK_D)
    var_a = column_square(z_ptr, a, cols, mean_a, N, D, BLOCK_N, BLOCK_D) / N
    rstd_a = reciprocal_root(var_a + eps)
    on = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for b in range(V):
        mean_b = column_mean(z_ptr, b, cols, N, D, BLOCK_N, BLOCK_D)
        var_b = column_square(z_ptr, b, cols, mean_b, N, D, BLOCK_N, BLOCK_D) / N
        rstd_b = reciprocal_root(var_b + eps)
        gaps = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
        for start in range(0, N, BLOCK_N):
            za, rows, _ = load_tile(z_ptr, a, start, cols, N, D, BLOCK_N)
            zb, _, _ = load_tile(z_ptr, b, start, cols, N, D, BLOCK_N)
            ha = (za - mean_a[None, :]) * rstd_a[None, :]
            hb = (zb - mean_b[None, :]) * rstd_b[None, :]
            gaps += tl.where(rows, (ha - hb) * (ha - hb), 0.0)
        r = -0.5 * (tl.sum(gaps, axis=0) / N + eps * (rstd_a * rstd_a + rstd_b * rstd_b))
        tl.store(r_ptr + (a * V + b) * D + cols, r, mask=inside)
        on += tl.where(inside & (b != a), r * r - diagonal * (1 + r) * (1 + r), 0.0)
    for start in range(0, N, BLOCK_N):
        za, rows, offsets = load_tile(z_ptr, a, start, cols, N, D, BLOCK_N)
        tl.store(h_ptr + offsets, (za - mean_a[None, :]) * rstd_a[None, :], mask=rows)
    tl.store(mean_ptr + a * D + cols, mean_a, mask=inside)
    tl.store(rstd_ptr + a * D + cols, rstd_a, mask=inside)
    tl.store(partial_ptr + tl.program_id(0) * V + a, weight * tl.sum(on))


@triton.jit
def _terms_kernel(
    p_ptr,
    h_ptr,
    rstd_ptr,
    r_ptr,
    scale_ptr,
    coef_ptr,
    on_ptr,
    on_slots,
    energy_ptr,
    energy_slots,
    loss_ptr,
    V,
    N,
    D,
    alpha,
    diagonal,
    weight,
    energy_weight,
    SLOTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The backward pass's table for columns of view a; the first program adds up the loss."""
    a = tl.program_id(1)
    cols = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = cols < D
    dots = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    for start in range(0, N, BLOCK_N):
        p, _, _ = load_tile(p_ptr, a, start, cols, N, D, BLOCK_N)
        h, _, _ = load_tile(h_ptr, a, start, cols, N, D, BLOCK_N)
        dots += p * h
    t = alpha / N * tl.sum(dots, axis=0)
    rstd_a = tl.load(rstd_ptr + a * D + cols, mask=inside, other=0.0)
    for b in range(V):
        r = tl.load(r_ptr + (a * V + b) * D + cols, mask=inside, other=0.0)
        rstd_b = tl.load(rstd_ptr + b * D + cols, mask=inside, other=0.0)
        w = tl.where(b != a, weight * (r - diagonal * (1 + r)), 0.0)
        t += w + w * r
        tl.store(coef_ptr + (a * V + b) * D + cols, rstd_a * rstd_b * w, mask=inside & (b != a))
    tl.store(coef_ptr + (a * V + a) * D + cols, -rstd_a * rstd_a * t, mask=inside)
    tl.store(scale_ptr + a * D + cols, alpha * rstd_a, mask=inside)
    if (a == 0) & (tl.program_id(0) == 0):
        energy = slot_sum(energy_ptr, energy_slots, SLOTS)
        tl.store(loss_ptr, slot_sum(on_ptr, on_slots, SLOTS) + energy_weight * energy)


def fused_gradient(
    grad: Tensor, z: Tensor, product: Tensor, mean: Tensor, scale: Tensor, coef: Tensor
) -> Tensor:
    """grad * dL/dz, (V, N, D) in z's dtype. product is (V, N, D), or (1, N, D) for all views."""
    views, n, width = z.shape
    out = torch.empty_like(z)
    shared = 0 if len(product) == 1 else 1  # views' stride in product, in views
    _gradient_kernel[tile_grid(z)](
        grad, z, product, mean, scale, coef, out, views, n, width, shared, BLOCK_N, BLOCK_D
    )
    return out


@triton.jit
def _gradient_kernel(
    grad_ptr,
    z_ptr,
    p_ptr,
    mean_ptr,
    scale_ptr,
    coef_ptr,
    out_ptr,
    V,
    N,
    D,
    shared,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """grad * (scale_a P_a + sum_b coef_ab (z_b - mean_b)) on one tile of view a."""
    a = tl.program_id(2)
    cols = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    start = tl.program_id(1) * BLOCK_N
    inside = cols < D
    scale = tl.load(scale_ptr + a * D + cols, mask=inside, other=0.0)
    p, rows, _ = load_tile(p_ptr, a * shared, start, cols, N, D, BLOCK_N)
    out = p * scale[None, :]
    for b in range(V):
        coef = tl.load(coef_ptr + (a * V + b) * D + cols, mask=inside, other=0.0)
        mean = tl.load(mean_ptr + b * D + cols, mask=inside, other=0.0)
        z, _, _ = load_tile(z_ptr, b, start, cols, N, D, BLOCK_N)
        out += (z - mean[None, :]) * coef[None, :]
    _, _, offsets = load_tile(z_ptr, a, start, cols, N, D, BLOCK_N)
    tl.store(out_ptr + offsets, out * tl.load(grad_ptr), mask=rows)
