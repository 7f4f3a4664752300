"""Triton kernels of vicreg.py, in one process.

Three launches forward beside the matrix products, one backward. Tables are that file's.

Shapes: V views, N batch, D embedding.
"""
# mypy: allow-untyped-defs
# (a Triton kernel's arguments have no Python types)

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastssl_kernels._autograd import no_gradient
from fastssl_kernels._precision import operand_dtype
from fastssl_kernels._triton.columns import (
    BLOCK_D,
    BLOCK_N,
    column_grid,
    column_mean,
    column_square,
    load_tile,
    tile_grid,
    weighted_total,
)
from fastssl_kernels._triton.second_moment import fused_energy_and_product

if TYPE_CHECKING:
    from fastssl_kernels.vicreg import Weights


def fused_loss(
    z: Tensor, weights: "Weights", resolved_path: str, gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As vicreg.py's op, in one process: three launches beside the matrix products."""
    views, n, width = z.shape
    grid = column_grid(z)
    x = torch.empty_like(z, dtype=operand_dtype(z, standardized=False))
    mean, diag_coef = (z.new_empty((views, width), dtype=torch.float32) for _ in range(2))
    factors = mean.new_empty(2)
    partial = mean.new_empty(grid[0] * views)
    includes_diagonal = float(resolved_path == "gram")  # the energy includes sum_i var_i^2
    _columns_kernel[grid](
        z,
        x,
        mean,
        diag_coef,
        factors,
        partial,
        views,
        n,
        width,
        weights.gamma,
        weights.eps,
        weights.invariance,
        weights.hinge,
        weights.energy * includes_diagonal,
        weights.alpha,
        weights.alpha * includes_diagonal,
        weights.invariance_grad,
        BLOCK_N=BLOCK_N,
        BLOCK_D=BLOCK_D,
    )
    energy, product = fused_energy_and_product(
        x, pairs=False, path=resolved_path, scale=1 / (n - 1), product=gradient
    )
    loss = weighted_total(partial, energy, weights.energy)
    return (loss, product, mean, diag_coef, factors) if gradient else no_gradient(loss)


@triton.jit
def _columns_kernel(
    z_ptr,
    x_ptr,
    mean_ptr,
    diag_coef_ptr,
    factors_ptr,
    partial_ptr,
    V,
    N,
    D,
    gamma,
    eps,
    invariance_weight,
    hinge_weight,
    diagonal_weight,
    alpha,
    diagonal_alpha,
    invariance_grad,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Centres columns of view a; sums its hinge, diagonal, half its distances to others."""
    a = tl.program_id(1)
    cols = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = cols < D
    mean = column_mean(z_ptr, a, cols, N, D, BLOCK_N, BLOCK_D)
    var = column_square(z_ptr, a, cols, mean, N, D, BLOCK_N, BLOCK_D) / (N - 1)
    distances = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    for start in range(0, N, BLOCK_N):
        za, rows, offsets = load_tile(z_ptr, a, start, cols, N, D, BLOCK_N)
        tl.store(x_ptr + offsets, za - mean[None, :], mask=rows)
        for b in range(V):
            zb, _, _ = load_tile(z_ptr, b, start, cols, N, D, BLOCK_N)
            distances += (za - zb) * (za - zb)
    std = tl.sqrt(var + eps)
    hinge = tl.where(std < gamma, gamma - std, 0.0 * std)  # 0 * std: NaN stays NaN
    diag_coef = tl.where(std < gamma, hinge_weight / (N - 1) / std, 0.0) + diagonal_alpha * var
    tl.store(mean_ptr + a * D + cols, mean, mask=inside)
    tl.store(diag_coef_ptr + a * D + cols, -diag_coef, mask=inside)
    terms = hinge_weight * hinge - diagonal_weight * var * var
    total = tl.sum(tl.where(inside, terms, 0.0)) + 0.5 * invariance_weight * tl.sum(distances)
    tl.store(partial_ptr + tl.program_id(0) * tl.num_programs(1) + a, total)
    if (a == 0) & (tl.program_id(0) == 0):
        tl.store(factors_ptr, alpha)
        tl.store(factors_ptr + 1, invariance_grad)


def fused_gradient(
    grad: Tensor, z: Tensor, product: Tensor, mean: Tensor, diag_coef: Tensor, factors: Tensor
) -> Tensor:
    """grad * dL/dz, (V, N, D) in z's dtype."""
    views, n, width = z.shape
    out = torch.empty_like(z)
    _gradient_kernel[tile_grid(z)](
        grad, z, product, mean, diag_coef, factors, out, views, n, width, BLOCK_N, BLOCK_D
    )
    return out


@triton.jit
def _gradient_kernel(
    grad_ptr,
    z_ptr,
    p_ptr,
    mean_ptr,
    diag_coef_ptr,
    factors_ptr,
    out_ptr,
    V,
    N,
    D,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """grad * dL/dz_a, the formula at the head of vicreg.py, on one tile of view a."""
    a = tl.program_id(2)
    cols = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    start = tl.program_id(1) * BLOCK_N
    mean = tl.load(mean_ptr + a * D + cols, mask=cols < D, other=0.0)
    diag_coef = tl.load(diag_coef_ptr + a * D + cols, mask=cols < D, other=0.0)
    p, _, _ = load_tile(p_ptr, a, start, cols, N, D, BLOCK_N)
    za, rows, offsets = load_tile(z_ptr, a, start, cols, N, D, BLOCK_N)
    differences = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    for b in range(V):
        zb, _, _ = load_tile(z_ptr, b, start, cols, N, D, BLOCK_N)
        differences += za - zb
    out = tl.load(factors_ptr) * p + diag_coef[None, :] * (za - mean[None, :])
    out += tl.load(factors_ptr + 1) / V * differences
    tl.store(out_ptr + offsets, out * tl.load(grad_ptr), mask=rows)
