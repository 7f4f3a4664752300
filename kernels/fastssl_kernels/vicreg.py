"""VICReg: variance, invariance and covariance of embeddings. arXiv:2105.04906, eq. 1-6.

    L = sim_coeff * MSE(za, zb)
      + std_coeff * mean over views of mean_i relu(gamma - sqrt(var_i + eps))
      + cov_coeff * sum over the two views of sum_{i != j} cov_ij^2 / D

var and cov are unbiased. V > 2 views: mean over pairs, mean over views, 2 / V times the sum.

The gradient. With second_moment.py's P_a = x_a x_a^T x_a / (N - 1) of the centred view x_a, per
column:

    dL/dz_a = alpha P_a + own_a (z_a - mean_a) + pull (z_a - mean_v z_v)

`own` holds the hinge and, on the Gram path, minus the covariance's diagonal. The centring needs no
backward pass: the columns of P_a and of z_a - mean_a sum to 0 already.

Shapes: V views, N batch, n rows of this rank, D embedding.
"""

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastssl_kernels._autograd import no_gradient, register_gradient, wants_gradient
from fastssl_kernels._columns import (
    centred,
    column_dots,
    cross_gaps,
    row_chunks,
)
from fastssl_kernels._dispatch import use_triton
from fastssl_kernels._precision import accumulation_dtype, operand_dtype
from fastssl_kernels._triton.vicreg import Weights, fused_gradient, fused_loss
from fastssl_kernels._validation import Path, check_views
from fastssl_kernels.distributed import (
    all_gather_with_grad,
    all_reduce_sum,
    row_counts,
)
from fastssl_kernels.second_moment import choose_path, energy_and_product


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
    z, ranks = check_views(views, "vicreg_loss", path=path, group=group)
    weights = (sim_coeff, std_coeff, cov_coeff, gamma, eps)
    if path == "eager":
        keywords = ("sim_coeff", "std_coeff", "cov_coeff", "gamma", "eps")
        loss = vicreg_loss_reference(
            all_gather_with_grad(z, ranks), **dict(zip(keywords, weights, strict=True))
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
            return fused_loss(z, weights, gamma, eps, way, gradient)
        return _lean_loss(z, rows, weights, gamma, eps, way, group, gradient)


def _weights(z: Tensor, total: int, sim: float, std: float, cov: float) -> Weights:
    views, _, width = z.shape
    apart = 2 * sim / (views * (views - 1) * total * width)
    energy = 2 * cov / (views * width)
    return Weights(
        apart=apart,
        hinge=std / (views * width),
        energy=energy,
        alpha=4 * energy / (total - 1),
        pull=2 * views * apart,
    )


def _lean_loss(
    z: Tensor,
    rows: list[int],
    weights: Weights,
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
    var = all_reduce_sum(column_dots(x, x), group) / (total - 1)  # (V, D)
    operand, scale = x.to(operand_dtype(z, standardized=False)), 1 / (total - 1)
    energy, product = energy_and_product(
        operand, rows, pairs=False, path=way, scale=scale, group=group, product=gradient
    )
    std = (var + eps).sqrt()
    apart = all_reduce_sum(cross_gaps(z).sum() / 2, group)
    off = energy - var.square().sum() if kept else energy
    loss = weights.apart * apart + weights.hinge * F.relu(gamma - std).sum() + weights.energy * off
    if not gradient:
        return no_gradient(loss)
    hinge = torch.where(std < gamma, weights.hinge / (total - 1) / std, 0)
    own = -world * (hinge + weights.alpha * kept * var)  # averaging divides by world again
    alpha, pull = (own.new_full((1,), world * w) for w in (weights.alpha, weights.pull))
    return loss, product, mean, own, torch.cat([alpha, pull])


def _from_first(z: Tensor) -> Tensor:
    """z_a - z_0 for a >= 1, (V, n, D) -> (V - 1, n, D): exact where views are close."""
    dtype = accumulation_dtype(z)
    return z[1:].to(dtype) - z[0].to(dtype)


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
        z.new_empty(z.shape, dtype=operand_dtype(z, standardized=False)),
        z.new_empty(columns, dtype=dtype),
        z.new_empty(columns, dtype=dtype),
        z.new_empty(2, dtype=dtype),
    )


@torch.library.custom_op("fastssl::vicreg_backward", mutates_args=())
def _gradient(
    grad: Tensor, z: Tensor, product: Tensor, mean: Tensor, own: Tensor, factors: Tensor
) -> Tensor:
    """grad * dL/dz, (V, n, D) in z's dtype."""
    if use_triton(z):
        return fused_gradient(grad, z, product, mean, own, factors)
    out = torch.empty_like(z)
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


@_gradient.register_fake
def _(
    grad: Tensor, z: Tensor, product: Tensor, mean: Tensor, own: Tensor, factors: Tensor
) -> Tensor:
    return torch.empty_like(z)


register_gradient(_loss, _gradient)
