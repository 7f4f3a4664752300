"""Barlow Twins: the cross-correlation of two views should be the identity. arXiv:2103.03230, eq. 1.

    L = sum_i (C_ii - 1)^2 + lambd * sum_{i != j} C_ij^2,   C = ha^T hb / N

`h` is a view with its columns standardised: mean 0, divided by sqrt(biased variance + eps). For
more than two views, "pairs" takes the mean over all pairs and "mean" compares each with the mean of
all (arXiv:2312.10725): with m = mean_v h_v,

    L = mean_v sum_i ((h_v^T m / N)_ii - 1)^2 + lambd * sum_{i != j} (m^T m / N)_ij^2

The gradient. With second_moment.py's P_a for the sum over C_ij^2, dL/dh_a = alpha P_a + sum_b w_ab
h_b in each column. The standardisation's backward subtracts h_a times the column mean of dL/dh_a *
h_a (the mean of dL/dh_a itself is 0, as the columns of every h are centred) and divides by the
standard deviation. So everything but P_a is in one table:

    dL/dz_a = scale_a P_a + sum_b coef_ab (z_b - mean_b)

On the diagonal, r_ab = C_ii - 1 comes from the distance of two columns, so that nothing cancels as
they become equal: r_ab = -1/2 (mean of (h_a - h_b)^2 + eps / (var_a + eps) + eps / (var_b + eps)).

Shapes: V views, N batch, n rows of this rank, D embedding.
"""

from collections.abc import Sequence
from itertools import combinations
from typing import Any, Literal

import torch
from torch import Tensor

from fastssl_kernels._autograd import (
    eager_loss,
    no_gradient,
    register_gradient,
    wants_gradient,
)
from fastssl_kernels._columns import centred, column_dots, cross_gaps, row_chunks
from fastssl_kernels._dispatch import use_triton
from fastssl_kernels._precision import accumulation_dtype, operand_dtype, without_autocast
from fastssl_kernels._triton.barlow_twins import fused_gradient, fused_loss
from fastssl_kernels._validation import Path, check_views
from fastssl_kernels.distributed import all_reduce_sum, require_rows, row_counts
from fastssl_kernels.second_moment import choose_path, energy_and_product

Pairing = Literal["pairs", "mean"]


def barlow_twins_loss_reference(
    views: Tensor | Sequence[Tensor],
    *,
    lambd: float = 0.0051,
    eps: float = 1e-5,
    pairing: Pairing = "pairs",
) -> Tensor:
    """(V, N, D) -> (): the formula above in eager PyTorch. Any device, any dtype."""
    h = [_standardized(z, eps) for z in views]  # V x (N, D)
    if pairing == "pairs" or len(h) == 2:
        pairs = [_penalty(a.T @ b / len(a), lambd) for a, b in combinations(h, 2)]
        return torch.stack(pairs).mean()
    mean = torch.stack(h).mean(0)  # (N, D)
    on = torch.stack([((a * mean).mean(0) - 1).square().sum() for a in h]).mean()
    return on + lambd * _off_diagonal(mean.T @ mean / len(mean)).square().sum()


def _standardized(z: Tensor, eps: float) -> Tensor:
    return (z - z.mean(0)) / (z.var(0, unbiased=False) + eps).sqrt()


def _off_diagonal(c: Tensor) -> Tensor:
    return c - torch.diag(c.diagonal())


def _penalty(c: Tensor, lambd: float) -> Tensor:
    return (c.diagonal() - 1).square().sum() + lambd * _off_diagonal(c).square().sum()


def barlow_twins_loss(
    views: Tensor | Sequence[Tensor],
    *,
    lambd: float = 0.0051,
    eps: float = 1e-5,
    pairing: Pairing = "pairs",
    path: Path = "auto",
    group: Any = None,
) -> Tensor:
    """Barlow Twins loss of views (V, N, D), or of a sequence of V tensors (N, D) -> ().

    lambd: weight of the off-diagonal terms. eps: added to the biased variance of each column.
    pairing: for V > 2 views, the mean over "pairs", or each against the "mean" of all.
    path: "gram" | "direct", "auto" for the one that multiplies less, or "eager", the reference.
    group: ranks whose rows form one batch. Statistics and loss are those of the global batch, and
        so is the gradient after data-parallel averaging (distributed.py has the contract).

    Takes float64, 32, 16 or bfloat16, V >= 2, N >= 2; returns float32 (float64 for float64).
    ValueError on other shapes, dtypes, mixed devices, an unknown path or pairing, a group without
    this rank.
    Source: arXiv:2103.03230, eq. 1; "mean": arXiv:2312.10725.
    """
    z, ranks = check_views(views, "barlow_twins_loss", path=path, group=group)
    if pairing not in ("pairs", "mean"):
        raise ValueError(f"barlow_twins_loss: pairing is {pairing!r}; choose 'pairs' or 'mean'")
    if path == "eager":
        settings = {"lambd": lambd, "eps": eps, "pairing": pairing}
        return eager_loss(barlow_twins_loss_reference, z, ranks, **settings)
    by_mean = pairing == "mean" and len(z) > 2
    if z.shape[1] == 2 and not ranks:  # columns are +-1 and the gradient nearly cancels
        loss = _loss(z.double(), lambd, eps, by_mean, path, "", wants_gradient(z))[0]
        return loss.to(accumulation_dtype(z))
    return _loss(z.contiguous(), lambd, eps, by_mean, path, ranks, wants_gradient(z))[0]


@torch.library.custom_op("fastssl::barlow_twins", mutates_args=())
def _loss(
    z: Tensor, lambd: float, eps: float, by_mean: bool, path: str, group: str, gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, P (V or 1, n, D), mean (V, D), scale (V, D), coef (V, V, D)), see above.

    All but the loss are for the backward pass; without `gradient` they are empty.
    """
    rows = row_counts(z, group)
    require_rows(rows, 2, "barlow_twins_loss")
    resolved_path = choose_path(path, z, sum(rows), pairs=not by_mean)
    with without_autocast(z):
        if use_triton(z) and not by_mean and not group:
            return fused_loss(z, lambd, eps, resolved_path, gradient)
        return _lean_loss(z, rows, lambd, eps, by_mean, resolved_path, group, gradient)


def _lean_loss(
    z: Tensor,
    rows: list[int],
    lambd: float,
    eps: float,
    by_mean: bool,
    resolved_path: str,
    group: str,
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`_loss` in torch operations: any device, any group."""
    total = sum(rows)
    mean, h = centred(z, total, group)
    rstd = (all_reduce_sum(column_dots(h, h), group) / total + eps).rsqrt()  # (V, D)
    h *= rstd[:, None]
    gaps = all_reduce_sum(cross_gaps(h), group) / total + eps * (rstd[:, None] ** 2 + rstd**2)
    r = gaps / -2  # (V, V, D)
    x = (h.mean(0, keepdim=True) if by_mean else h).to(operand_dtype(z, standardized=True))
    energy, product = energy_and_product(
        x,
        rows,
        pairs=not by_mean,
        path=resolved_path,
        scale=1 / total,
        group=group,
        product=gradient,
    )
    terms = _mean_terms if by_mean else _pair_terms
    loss, alpha, w = terms(r, energy, lambd, total, includes_diagonal=resolved_path == "gram")
    if not gradient:
        return no_gradient(loss)
    product_dots = all_reduce_sum(column_dots(product, h), group)  # (V, D)
    t = alpha / total * product_dots + (w + w * r).sum(1)  # (V, D) column means of dL/dh_a * h_a
    for a in range(len(z)):
        w[a, a] -= t[a]
    world = len(rows)  # data-parallel averaging divides by it again
    coef = w * (rstd[:, None] * rstd[None] * world)
    return loss, product, mean, rstd * (alpha * world), coef


def _pair_terms(
    r: Tensor, energy: Tensor, lambd: float, total: int, includes_diagonal: bool
) -> tuple[Tensor, float, Tensor]:
    """(loss, alpha, w (V, V, D)) for all pairs. `includes_diagonal` is about the energy."""
    views = len(r)
    pairs = views * (views - 1) / 2
    distinct = ~torch.eye(views, dtype=torch.bool, device=r.device)[..., None]  # a != b
    included = lambd * includes_diagonal
    on = torch.where(distinct, r.square() - included * (1 + r).square(), 0).sum() / 2
    w = torch.where(distinct, r - included * (1 + r), 0) * (2 / (total * pairs))
    return (on + lambd * energy) / pairs, 2 * lambd / (total * pairs), w


def _mean_terms(
    r: Tensor, energy: Tensor, lambd: float, total: int, includes_diagonal: bool
) -> tuple[Tensor, float, Tensor]:
    """(loss, alpha, w (V, V, D)) for each view against the mean of all, as `_pair_terms`."""
    views = len(r)
    to_mean = r.mean(1)  # (V, D): (h_v^T m / N)_ii - 1
    diagonal = 1 + to_mean.mean(0)  # (D,): (m^T m / N)_ii
    off = energy - diagonal.square().sum() if includes_diagonal else energy
    loss = to_mean.square().sum() / views + lambd * off
    w = to_mean[:, None] + to_mean[None] - 2 * lambd * includes_diagonal * diagonal
    return loss, 4 * lambd / (total * views), w * (2 / (views**2 * total))


@_loss.register_fake
def _(
    z: Tensor, lambd: float, eps: float, by_mean: bool, path: str, group: str, gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    views, n, width = z.shape
    dtype = accumulation_dtype(z)
    loss = z.new_empty((), dtype=dtype)
    if not gradient:
        return no_gradient(loss)
    return (
        loss,
        z.new_empty((1 if by_mean else views, n, width), dtype=operand_dtype(z, standardized=True)),
        z.new_empty((views, width), dtype=dtype),
        z.new_empty((views, width), dtype=dtype),
        z.new_empty((views, views, width), dtype=dtype),
    )


@torch.library.custom_op("fastssl::barlow_twins_backward", mutates_args=())
def _gradient(
    grad: Tensor, z: Tensor, product: Tensor, mean: Tensor, scale: Tensor, coef: Tensor
) -> Tensor:
    """grad * dL/dz, (V, n, D) in z's dtype."""
    if use_triton(z):
        return fused_gradient(grad, z, product, mean, scale, coef)
    out = torch.empty_like(z)
    with without_autocast(z):
        scale, coef = scale * grad, coef * grad
        product = product.expand(z.shape)
        for r in row_chunks(z):
            x = z[:, r] - mean[:, None]
            rows = product[:, r] * scale[:, None]
            for b in range(len(z)):
                rows.addcmul_(x[b], coef[:, b, None])
            out[:, r] = rows
    return out


def _formula(z: Tensor, lambd: float, eps: float, by_mean: bool, _: str) -> Tensor:
    pairing: Pairing = "mean" if by_mean else "pairs"
    return barlow_twins_loss_reference(z, lambd=lambd, eps=eps, pairing=pairing)


register_gradient(_loss, _gradient, _formula)
