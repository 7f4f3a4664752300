"""VICReg: variance, invariance and covariance of embeddings. arXiv:2105.04906, eq. 1-6.

    L = sim_coeff * MSE(za, zb)
      + std_coeff * mean over views of mean_i relu(gamma - sqrt(var_i + eps))
      + cov_coeff * sum over the two views of sum_{i != j} cov_ij^2 / D

var and cov are unbiased. V > 2 views: mean over pairs, mean over views, 2 / V times the sum.

The gradient. With gram.py's P_a = x_a x_a^T x_a / (N - 1) of the centred view x_a, per column:

    dL/dz_a = alpha P_a + own_a (z_a - mean_a) + pull (z_a - mean_v z_v)

`own` holds the hinge and, on the Gram path, minus the covariance's diagonal. The centring needs no
backward pass: the columns of P_a and of z_a - mean_a sum to 0 already.

Shapes: V views, N batch, n rows of this rank, D embedding.
"""
# mypy: allow-untyped-defs
# (a Triton kernel's arguments have no Python types)

from collections.abc import Sequence
from itertools import combinations
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from fastssl_kernels._columns import (
    BLOCK_D,
    BLOCK_N,
    accumulation_dtype,
    centred,
    column_dots,
    column_mean,
    column_square,
    cross_gaps,
    load_tile,
    row_chunks,
    weighted_total,
)
from fastssl_kernels._group import gather_batch, group_name, local_rows, row_counts, sum_ranks
from fastssl_kernels._launch import use_triton
from fastssl_kernels._views import stack_views
from fastssl_kernels.gram import (
    Path,
    check_path,
    choose_path,
    energy_and_product,
    fused_energy_and_product,
    no_gradient,
    wants_gradient,
)


def vicreg_loss_reference(
    views: Tensor | Sequence[Tensor],
    *,
    sim_coeff: float = 25.0,
    std_coeff: float = 25.0,
    cov_coeff: float = 1.0,
    gamma: float = 1.0,
    eps: float = 1e-4,
) -> Tensor:
    """(V, N, D) -> (): the formula above in eager PyTorch. Any device, any dtype."""
    views = list(views)
    covariance = 2 * torch.stack([_off_diagonal_energy(z) for z in views]).mean()
    return (
        sim_coeff * invariance(views)
        + std_coeff * variance(views, gamma, eps)
        + cov_coeff * covariance
    )


def invariance(views: Sequence[Tensor]) -> Tensor:
    """The mean over pairs of the mean squared difference, V x (N, D) -> ()."""
    return torch.stack([F.mse_loss(a, b) for a, b in combinations(views, 2)]).mean()


def variance(views: Sequence[Tensor], gamma: float, eps: float) -> Tensor:
    """The mean over views and columns of relu(gamma - std), V x (N, D) -> ()."""
    return torch.stack([F.relu(gamma - (z.var(0) + eps).sqrt()).mean() for z in views]).mean()


def _off_diagonal_energy(z: Tensor) -> Tensor:
    """sum_{i != j} cov_ij^2 / D of one view (N, D)."""
    x = z - z.mean(0)
    cov = x.T @ x / (len(x) - 1)  # (D, D)
    return (cov - torch.diag(cov.diagonal())).square().sum() / len(cov)


def vicreg_loss(
    views: Tensor | Sequence[Tensor],
    *,
    sim_coeff: float = 25.0,
    std_coeff: float = 25.0,
    cov_coeff: float = 1.0,
    gamma: float = 1.0,
    eps: float = 1e-4,
    path: Path = "auto",
    group: Any = None,
) -> Tensor:
    """VICReg loss of views (V, N, D), or of a sequence of V tensors (N, D) -> ().

    sim_coeff, std_coeff, cov_coeff: weights of invariance, variance, covariance.
    gamma: the standard deviation that the hinge asks for. eps: added to the unbiased variance.
    path: "gram" | "direct", "auto" for the one that multiplies less, or "eager", the reference.
    group: ranks whose rows form one batch. Statistics and loss are the whole batch's, and so is the
        gradient after data-parallel averaging (`_group` has the contract).

    Takes float64, 32, 16 or bfloat16, V >= 2, N >= 2; returns float32 (float64 for float64).
    ValueError on other shapes, dtypes, mixed devices, an unknown path, a foreign group.
    Source: arXiv:2105.04906, eq. 1-6, with the official code's halved variance term.
    """
    name = "vicreg_loss"
    z = stack_views(views, name, rows=local_rows(group))
    check_path(path, name)
    ranks = group_name(group, name)
    weights = (sim_coeff, std_coeff, cov_coeff, gamma, eps)
    if path == "eager":
        keywords = ("sim_coeff", "std_coeff", "cov_coeff", "gamma", "eps")
        loss = vicreg_loss_reference(
            gather_batch(z, ranks), **dict(zip(keywords, weights, strict=True))
        )
        return loss.to(accumulation_dtype(z))
    return _loss(z.contiguous(), *weights, path, ranks, wants_gradient(z))[0]


@torch.library.custom_op("fastssl::vicreg", mutates_args=())
def _loss(
    z: Tensor,
    sim_coeff: float,
    std_coeff: float,
    cov_coeff: float,
    gamma: float,
    eps: float,
    path: str,
    group: str,
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, P (V, n, D), mean (V, D), own (V, D), [alpha, pull] (2,)), see the file's head.

    All but the loss are for the backward pass, and empty where no gradient is wanted.
    """
    rows = row_counts(z, group)
    way = choose_path(path, z, sum(rows), pairs=False)
    weights = _weights(z, sum(rows), sim_coeff, std_coeff, cov_coeff)
    with torch.autocast(z.device.type, enabled=False):
        if use_triton(z) and not group:
            return _fused_loss(z, weights, gamma, eps, way, gradient)
        return _lean_loss(z, rows, weights, gamma, eps, way, group, gradient)


class _Weights(NamedTuple):
    """What each sum counts in the loss, and in the gradient."""

    apart: float  # of sum_{a < b} ||z_a - z_b||^2
    hinge: float  # of sum over views and columns of relu(gamma - std)
    energy: float  # of sum over views of sum_{i != j} cov_ij^2
    alpha: float  # of P_a
    pull: float  # of z_a - mean_v z_v


def _weights(z: Tensor, total: int, sim: float, std: float, cov: float) -> _Weights:
    views, _, width = z.shape
    apart = 2 * sim / (views * (views - 1) * total * width)
    energy = 2 * cov / (views * width)
    return _Weights(
        apart=apart,
        hinge=std / (views * width),
        energy=energy,
        alpha=4 * energy / (total - 1),
        pull=2 * views * apart,
    )


def _lean_loss(
    z: Tensor,
    rows: list[int],
    weights: _Weights,
    gamma: float,
    eps: float,
    way: str,
    group: str,
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`_loss` in torch operations: any device, any group."""
    total, world = sum(rows), len(rows)
    kept = way == "gram"  # the energy holds the diagonals, sum_i var_i^2
    mean, x = centred(z, total, group)
    var = sum_ranks(column_dots(x, x), group) / (total - 1)  # (V, D)
    operand, scale = x.to(_operand_dtype(z)), 1 / (total - 1)
    energy, product = energy_and_product(
        operand, rows, pairs=False, path=way, scale=scale, group=group, product=gradient
    )
    std = (var + eps).sqrt()
    apart = sum_ranks(cross_gaps(z).sum() / 2, group)
    off = energy - var.square().sum() if kept else energy
    loss = weights.apart * apart + weights.hinge * F.relu(gamma - std).sum() + weights.energy * off
    if not gradient:
        return no_gradient(loss)
    hinge = torch.where(std < gamma, weights.hinge / (total - 1) / std, 0)
    own = -world * (hinge + weights.alpha * kept * var)  # averaging divides by world again
    alpha, pull = (own.new_full((1,), world * w) for w in (weights.alpha, weights.pull))
    return loss, product, mean, own, torch.cat([alpha, pull])


def _operand_dtype(z: Tensor) -> torch.dtype:
    """What the matrix products read. Not float16: z is not standardised, x x^T could overflow."""
    return z.dtype if use_triton(z) and z.dtype == torch.bfloat16 else accumulation_dtype(z)


def _from_first(z: Tensor) -> Tensor:
    """z_a - z_0 for a >= 1, (V, n, D) -> (V - 1, n, D): exact where views are close."""
    dtype = accumulation_dtype(z)
    return z[1:].to(dtype) - z[0].to(dtype)


def _fused_loss(
    z: Tensor, weights: _Weights, gamma: float, eps: float, way: str, gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`_loss` in one process: three Triton launches beside the matrix products."""
    views, n, width = z.shape
    grid = (triton.cdiv(width, BLOCK_D), views)
    x = torch.empty_like(z, dtype=_operand_dtype(z))
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


@_loss.register_fake
def _(
    z: Tensor,
    sim_coeff: float,
    std_coeff: float,
    cov_coeff: float,
    gamma: float,
    eps: float,
    path: str,
    group: str,
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(z)
    loss = z.new_empty((), dtype=dtype)
    if not gradient:
        return no_gradient(loss)
    columns = (z.shape[0], z.shape[2])
    return (
        loss,
        z.new_empty(z.shape, dtype=_operand_dtype(z)),
        z.new_empty(columns, dtype=dtype),
        z.new_empty(columns, dtype=dtype),
        z.new_empty(2, dtype=dtype),
    )


@torch.library.custom_op("fastssl::vicreg_backward", mutates_args=())
def _gradient(
    grad: Tensor, z: Tensor, product: Tensor, mean: Tensor, own: Tensor, factors: Tensor
) -> Tensor:
    """grad * dL/dz, (V, n, D) in z's dtype."""
    out = torch.empty_like(z)
    if use_triton(z):
        views, n, width = z.shape
        grid = (triton.cdiv(width, BLOCK_D), triton.cdiv(n, BLOCK_N), views)
        _gradient_kernel[grid](
            grad, z, product, mean, own, factors, out, views, n, width, BLOCK_N, BLOCK_D
        )
        return out
    with torch.autocast(z.device.type, enabled=False):
        own = own * grad
        alpha, pull = factors * grad
        for r in row_chunks(z):
            apart = _from_first(z[:, r])
            rows = product[:, r] * alpha
            rows.addcmul_(z[:, r] - mean[:, None], own[:, None])
            rows -= apart.sum(0) * (pull / len(z))  # mean_v z_v - z_0
            rows[1:] += apart * pull
            out[:, r] = rows
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


@_gradient.register_fake
def _(
    grad: Tensor, z: Tensor, product: Tensor, mean: Tensor, own: Tensor, factors: Tensor
) -> Tensor:
    return torch.empty_like(z)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[0], *output[1:])


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    dz = None if grad is None else _gradient(grad, *ctx.saved_tensors)
    return dz, *(None,) * 8


_loss.register_autograd(_backward, setup_context=_save)
