"""VICReg: variance, invariance and covariance of embeddings. arXiv:2105.04906, eq. 1-6.

    L = sim_coeff * MSE(za, zb)
      + std_coeff * mean over views of mean_i relu(gamma - sqrt(var_i + eps))
      + cov_coeff * sum over the two views of sum_{i != j} cov_ij^2 / D

var and cov are unbiased. V > 2 views: mean over pairs, mean over views, 2 / V times the sum.

The gradient. With second_moment.py's P_a = x_a x_a^T x_a / (N - 1) of the centred view x_a, per
column:

    dL/dz_a = alpha P_a + diag_coef_a (z_a - mean_a) + invariance_grad (z_a - mean_v z_v)

`diag_coef` holds the hinge and, on the Gram path, minus the covariance's diagonal. The centring
needs no backward pass: the columns of P_a and of z_a - mean_a sum to 0 already.

Shapes: V views, N batch, n rows of this rank, D embedding.
"""

from collections.abc import Sequence
from itertools import combinations
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastssl_kernels._autograd import (
    eager_loss,
    no_gradient,
    register_gradient,
    wants_gradient,
)
from fastssl_kernels._columns import centred, column_dots, cross_gaps, row_chunks
from fastssl_kernels._dispatch import use_triton
from fastssl_kernels._precision import accumulation_dtype, operand_dtype, without_autocast
from fastssl_kernels._triton.vicreg import fused_gradient, fused_loss
from fastssl_kernels._validation import Path, check_views
from fastssl_kernels.distributed import all_reduce_sum, require_rows, row_counts
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
    gamma: the hinge's target standard deviation. eps: added to the unbiased variance.
    path: "gram" | "direct", "auto" for the one that multiplies less, or "eager", the reference.
    group: ranks whose rows form one batch. Statistics and loss are those of the global batch, and
        so is the gradient after data-parallel averaging (distributed.py has the contract).

    Takes float64, 32, 16 or bfloat16, V >= 2, N >= 2; returns float32 (float64 for float64).
    ValueError on other shapes, dtypes, mixed devices, an unknown path, a group without this rank.
    Source: arXiv:2105.04906, eq. 1-6, with the official code's halved variance term.
    """
    z, ranks = check_views(views, "vicreg_loss", path=path, group=group)
    if path == "eager":
        return eager_loss(
            vicreg_loss_reference,
            z,
            ranks,
            sim_coeff=sim_coeff,
            std_coeff=std_coeff,
            cov_coeff=cov_coeff,
            gamma=gamma,
            eps=eps,
        )
    return _loss(
        z.contiguous(),
        sim_coeff,
        std_coeff,
        cov_coeff,
        gamma,
        eps,
        path,
        ranks,
        wants_gradient(z),
    )[0]


class Weights(NamedTuple):
    """Factors of the sums in the loss and in the gradient, and the hinge's constants."""

    invariance: float  # of sum_{a < b} ||z_a - z_b||^2
    hinge: float  # of sum over views and columns of relu(gamma - std)
    energy: float  # of sum over views of sum_{i != j} cov_ij^2
    alpha: float  # of P_a
    invariance_grad: float  # of z_a - mean_v z_v
    gamma: float
    eps: float


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
    """(loss, P (V, n, D), mean (V, D), diag_coef (V, D), [alpha, invariance_grad] (2,)): see above.

    All but the loss are for the backward pass; without `gradient` they are empty.
    """
    rows = row_counts(z, group)
    require_rows(rows, 2, "vicreg_loss")
    resolved_path = choose_path(path, z, sum(rows), pairs=False)
    views, _, width = z.shape
    invariance_weight = 2 * sim_coeff / (views * (views - 1) * sum(rows) * width)
    energy_weight = 2 * cov_coeff / (views * width)
    weights = Weights(
        invariance=invariance_weight,
        hinge=std_coeff / (views * width),
        energy=energy_weight,
        alpha=4 * energy_weight / (sum(rows) - 1),
        invariance_grad=2 * views * invariance_weight,
        gamma=gamma,
        eps=eps,
    )
    with without_autocast(z):
        if use_triton(z) and not group:
            return fused_loss(z, weights, resolved_path, gradient)
        return _lean_loss(z, rows, weights, resolved_path, group, gradient)


def _lean_loss(
    z: Tensor,
    rows: list[int],
    weights: Weights,
    resolved_path: str,
    group: str,
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`_loss` in torch operations: any device, any group."""
    total, world = sum(rows), len(rows)
    includes_diagonal = resolved_path == "gram"  # the energy includes sum_i var_i^2
    mean, x = centred(z, total, group)
    var = all_reduce_sum(column_dots(x, x), group) / (total - 1)  # (V, D)
    energy, product = energy_and_product(
        x.to(operand_dtype(z, standardized=False)),
        rows,
        pairs=False,
        path=resolved_path,
        scale=1 / (total - 1),
        group=group,
        product=gradient,
    )
    std = (var + weights.eps).sqrt()
    distances = all_reduce_sum(cross_gaps(z).sum() / 2, group)
    hinge = F.relu(weights.gamma - std).sum()
    off = energy - var.square().sum() if includes_diagonal else energy
    loss = weights.invariance * distances + weights.hinge * hinge + weights.energy * off
    if not gradient:
        return no_gradient(loss)
    hinge_grad = torch.where(std < weights.gamma, weights.hinge / (total - 1) / std, 0)
    # data-parallel averaging divides by world again
    diag_coef = -world * (hinge_grad + weights.alpha * includes_diagonal * var)
    factors = [mean.new_full((1,), world * w) for w in (weights.alpha, weights.invariance_grad)]
    return loss, product, mean, diag_coef, torch.cat(factors)


def _from_first(z: Tensor) -> Tensor:
    """z_a - z_0 for a >= 1, (V, n, D) -> (V - 1, n, D): exact where views are close."""
    dtype = accumulation_dtype(z)
    return z[1:].to(dtype) - z[0].to(dtype)


@_loss.register_fake
def _(z: Tensor, *settings: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    gradient = settings[-1]
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
    grad: Tensor, z: Tensor, product: Tensor, mean: Tensor, diag_coef: Tensor, factors: Tensor
) -> Tensor:
    """grad * dL/dz, (V, n, D) in z's dtype."""
    if use_triton(z):
        return fused_gradient(grad, z, product, mean, diag_coef, factors)
    out = torch.empty_like(z)
    with without_autocast(z):
        diag_coef = diag_coef * grad
        alpha, invariance_grad = factors * grad
        for r in row_chunks(z):
            differences = _from_first(z[:, r])
            rows = product[:, r] * alpha
            rows.addcmul_(z[:, r] - mean[:, None], diag_coef[:, None])
            rows -= differences.sum(0) * (invariance_grad / len(z))  # mean_v z_v - z_0
            rows[1:] += differences * invariance_grad
            out[:, r] = rows
    return out


def _formula(
    z: Tensor,
    sim_coeff: float,
    std_coeff: float,
    cov_coeff: float,
    gamma: float,
    eps: float,
    path: str,
) -> Tensor:
    return vicreg_loss_reference(
        z, sim_coeff=sim_coeff, std_coeff=std_coeff, cov_coeff=cov_coeff, gamma=gamma, eps=eps
    )


register_gradient(_loss, _gradient, _formula)
