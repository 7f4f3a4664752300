"""The coding rate of embeddings, on the smaller of the two sides. arXiv:2304.03977, eq. 1 (TCR).

    R(Z) = 1/2 logdet(I + a Z^T Z) = 1/2 logdet(I + a Z Z^T),   a = D / (N eps_sq)

Sylvester's identity makes the D x D and the N x N determinant equal; one batched Cholesky of the
smaller serves all views, and the gradient a (I + a Z Z^T)^-1 Z solves with the same factor.

Shapes: V views, N batch, n rows of this rank, D embedding.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastssl_kernels._autograd import (
    eager_loss,
    register_scaled_gradient,
    wants_gradient,
)
from fastssl_kernels._precision import accumulation_dtype, without_autocast
from fastssl_kernels._validation import Path, check_views
from fastssl_kernels.distributed import (
    all_gather_padded,
    all_reduce_sum,
    padded_offset,
    row_counts,
)


def coding_rate_reference(views: Tensor | Sequence[Tensor], *, eps_sq: float = 0.2) -> Tensor:
    """(V, N, D) -> (): the formula above in eager PyTorch, on D x D. Not float16 or bfloat16."""
    rates = []
    for z in views:
        n, width = z.shape
        eye = torch.eye(width, dtype=z.dtype, device=z.device)
        rates.append(torch.logdet(eye + _weight(n, width, eps_sq) * z.T @ z) / 2)
    return torch.stack(rates).mean()


def _weight(rows: int, width: int, eps_sq: float) -> float:
    """a of the formula; any number without rows, whose Z Z^T is empty."""
    return width / (max(rows, 1) * eps_sq)


def coding_rate(
    views: Tensor | Sequence[Tensor],
    *,
    eps_sq: float = 0.2,
    path: Path = "auto",
    group: Any = None,
) -> Tensor:
    """R(Z) averaged over views (V, N, D), or over a sequence of V >= 1 tensors (N, D) -> ().

    EMP-SSL's loss is its negative. Rows are taken as they are; the paper makes them unit length.
    eps_sq: the paper's distortion epsilon^2.
    path: "gram" for N x N, "direct" for D x D, "auto" for the smaller, or "eager", the reference.
    group: ranks whose rows form one batch (distributed.py has the contract for value and gradient).

    Takes float64, 32, 16 or bfloat16, computes in float32 or float64 and returns that. NaN where
    I + a Z^T Z is not positive definite in that precision, 0 of no rows. ValueError on other
    shapes or dtypes, mixed devices, eps_sq <= 0, an unknown path, a group without this rank.
    """
    z, ranks = check_views(views, "coding_rate", path=path, group=group, min_views=1, min_rows=0)
    if not eps_sq > 0:
        raise ValueError(f"coding_rate: eps_sq is {eps_sq}; it must be positive")
    if path == "eager":
        return eager_loss(coding_rate_reference, z, ranks, eps_sq=eps_sq)
    return _rate(z.contiguous(), eps_sq, path, ranks, wants_gradient(z))[0]


@torch.library.custom_op("fastssl::coding_rate", mutates_args=())
def _rate(z: Tensor, eps_sq: float, path: str, group: str, gradient: bool) -> tuple[Tensor, Tensor]:
    """(R, dR/dz), the gradient in fp32 or fp64, and empty where not requested."""
    rows = row_counts(z, group)
    total, width = sum(rows), z.shape[2]
    weight = _weight(total, width, eps_sq)
    by_rows = path == "gram" or (path == "auto" and total < width)
    with without_autocast(z):
        x = z.to(accumulation_dtype(z))
        if by_rows:
            x = all_gather_padded(x, rows, group)  # padding rows add ones to the diagonal: logdet 0
            small = x @ x.mT
        else:
            small = all_reduce_sum(x.mT @ x, group)
        small *= weight
        small.diagonal(dim1=1, dim2=2).add_(1)
        factor, failed = torch.linalg.cholesky_ex(small)
        rate = factor.diagonal(dim1=1, dim2=2).log().sum() / len(z)
        rate = torch.where(failed.any(), torch.nan, rate)
        if not gradient:
            return rate, rate.new_empty(0)
        if by_rows:
            start = padded_offset(rows, group)
            solved = torch.cholesky_solve(x, factor)[:, start : start + z.shape[1]].contiguous()
        else:
            solved = torch.cholesky_solve(x.mT, factor).mT.contiguous()
    return rate, solved.mul_(weight * len(rows) / len(z))


@_rate.register_fake
def _(z: Tensor, eps_sq: float, path: str, group: str, gradient: bool) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(z)
    return z.new_empty((), dtype=dtype), z.new_empty(z.shape if gradient else (0,), dtype=dtype)


register_scaled_gradient(_rate, lambda z, eps_sq, _: coding_rate_reference(z, eps_sq=eps_sq))
