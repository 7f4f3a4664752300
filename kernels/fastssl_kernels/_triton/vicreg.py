"""Triton kernels of vicreg.py, in one process.

Three launches forward beside the matrix products, one backward. Tables are that file's.

Shapes: V views, N batch, D embedding.
"""
# mypy: allow-untyped-defs
# (a Triton kernel's arguments have no Python types)

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastssl_kernels._autograd import no_gradient
from fastssl_kernels._precision import operand_dtype
from fastssl_kernels._triton.columns import (
    BLOCK_D,
    BLOCK_N,
    column_mean,
    column_square,
    load_tile,
    weighted_total,
)
from fastssl_kernels._triton.second_moment import fused_energy_and_product


class Weights(NamedTuple):
    """What each sum counts in the loss, and in the gradient."""

    apart: float  # of sum_{a < b} ||z_a - z_b||^2
    hinge: float  # of sum over views and columns of relu(gamma - std)
    energy: float  # of sum over views of sum_{i != j} cov_ij^2
    alpha: float  # of P_a
    pull: float  # of z_a - mean_v z_v


def fused_loss(
    z: Tensor, weights: Weights, gamma: float, eps: float, way: str, gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As vicreg.py's op, in one process: three launches beside the matrix products."""
    views, n, width = z.shape
    grid = (triton.cdiv(width, BLOCK_D), views)
    x = torch.empty_like(z, dtype=operand_dtype(z, standardized=False))
    mean, own = (z.new_empty((views, width), dtype=torch.float32) for _ in range(2))
    factors = mean.new_empty(2)
    spread = mean.new_empty(grid[0] * views)
    diagonal = float(way == "gram")  # the energy holds the diagonals, sum_i var_i^2
    _columns_kernel[grid](
        z,
        x,
        mean,
        own,
        factors,
        spread,
        views,
        n,
        width,
        gamma,
        eps,
        weights.apart,
        weights.hinge,
        weights.energy * diagonal,
        weights.alpha,
        weights.alpha * diagonal,
        weights.pull,
        BLOCK_N=BLOCK_N,
        BLOCK_D=BLOCK_D,
    )
    energy, product = fused_energy_and_product(
        x, pairs=False, path=way, scale=1 / (n - 1), product=gradient
    )
    loss = weighted_total(spread, energy, weights.energy)
    return (loss, product, mean, own, factors) if gradient else no_gradient(loss)


@triton.jit
def _columns_kernel(
    z_ptr,
    x_ptr,
    mean_ptr,
    own_ptr,
    factors_ptr,
    partial_ptr,
    V,
    N,
    D,
    gamma,
    eps,
    apart_weight,
    hinge_weight,
    diagonal_weight,
    alpha,
    diagonal_alpha,
    pull,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Centres columns of view a; sums its hinge, diagonal, half its distances to others."""
    a = tl.program_id(1)
    cols = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = cols < D
    mean = column_mean(z_ptr, a, cols, N, D, BLOCK_N, BLOCK_D)
    var = column_square(z_ptr, a, cols, mean, N, D, BLOCK_N, BLOCK_D) / (N - 1)
    apart = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    for start in range(0, N, BLOCK_N):
        za, rows, offsets = load_tile(z_ptr, a, start, cols, N, D, BLOCK_N)
        tl.store(x_ptr + offsets, za - mean[None, :], mask=rows)
        for b in range(V):
            zb, _, _ = load_tile(z_ptr, b, start, cols, N, D, BLOCK_N)
            apart += (za - zb) * (za - zb)
    std = tl.sqrt(var + eps)
    hinge = tl.where(std < gamma, gamma - std, 0.0 * std)  # 0 * std: NaN stays NaN
    own = tl.where(std < gamma, hinge_weight / (N - 1) / std, 0.0) + diagonal_alpha * var
    tl.store(mean_ptr + a * D + cols, mean, mask=inside)
    tl.store(own_ptr + a * D + cols, -own, mask=inside)
    terms = hinge_weight * hinge - diagonal_weight * var * var
    total = tl.sum(tl.where(inside, terms, 0.0)) + 0.5 * apart_weight * tl.sum(apart)
    tl.store(partial_ptr + tl.program_id(0) * tl.num_programs(1) + a, total)
    if (a == 0) & (tl.program_id(0) == 0):
        tl.store(factors_ptr, alpha)
        tl.store(factors_ptr + 1, pull)


def fused_gradient(
    grad: Tensor, z: Tensor, product: Tensor, mean: Tensor, own: Tensor, factors: Tensor
) -> Tensor:
    """grad * dL/dz, (V, N, D) in z's dtype."""
    views, n, width = z.shape
    out = torch.empty_like(z)
    grid = (triton.cdiv(width, BLOCK_D), triton.cdiv(n, BLOCK_N), views)
    sizes = (views, n, width, BLOCK_N, BLOCK_D)
    _gradient_kernel[grid](grad, z, product, mean, own, factors, out, *sizes)
    return out


@triton.jit
def _gradient_kernel(
    grad_ptr,
    z_ptr,
    p_ptr,
    mean_ptr,
    own_ptr,
    factors_ptr,
    out_ptr,
    V,
    N,
    D,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """grad * (alpha P_a + own_a (z_a - mean_a) + pull (z_a - mean_v z_v)) on one tile of view a."""
    a = tl.program_id(2)
    cols = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    start = tl.program_id(1) * BLOCK_N
    mean = tl.load(mean_ptr + a * D + cols, mask=cols < D, other=0.0)
    own = tl.load(own_ptr + a * D + cols, mask=cols < D, other=0.0)
    p, _, _ = load_tile(p_ptr, a, start, cols, N, D, BLOCK_N)
    za, rows, offsets = load_tile(z_ptr, a, start, cols, N, D, BLOCK_N)
    apart = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    for b in range(V):
        zb, _, _ = load_tile(z_ptr, b, start, cols, N, D, BLOCK_N)
        apart += za - zb
    out = tl.load(factors_ptr) * p + own[None, :] * (za - mean[None, :])
    out += tl.load(factors_ptr + 1) / V * apart
    tl.store(out_ptr + offsets, out * tl.load(grad_ptr), mask=rows)
