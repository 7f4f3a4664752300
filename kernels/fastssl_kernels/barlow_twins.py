"""Barlow Twins: the cross-correlation of two views should be the identity. arXiv:2103.03230, eq. 1.

    L = sum_i (C_ii - 1)^2 + lambd * sum_{i != j} C_ij^2,   C = ha^T hb / N

`h` is a view with its columns standardised: mean 0, and divided by sqrt(biased variance + eps).

Shapes: N batch, D embedding, V views.
"""

from collections.abc import Sequence
from itertools import combinations
from typing import Any, Literal

import torch
from torch import Tensor

from fastssl_kernels._views import stack_views

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


def barlow_twins_loss(
    views: Tensor | Sequence[Tensor],
    *,
    lambd: float = 0.0051,
    eps: float = 1e-5,
    pairing: Pairing = "pairs",
    group: Any = None,
) -> Tensor:
    """Barlow Twins loss of views (V, N, D), or of a sequence of V tensors (N, D) -> () float32."""
    z = stack_views(views, "barlow_twins_loss")
    if group is not None:
        raise NotImplementedError("group= arrives with the fused path")
    loss = barlow_twins_loss_reference(z, lambd=lambd, eps=eps, pairing=pairing)
    return loss if z.dtype == torch.float64 else loss.float()


def _standardized(z: Tensor, eps: float) -> Tensor:
    return (z - z.mean(0)) / (z.var(0, unbiased=False) + eps).sqrt()


def _off_diagonal(c: Tensor) -> Tensor:
    return c - torch.diag(c.diagonal())


def _penalty(c: Tensor, lambd: float) -> Tensor:
    return (c.diagonal() - 1).square().sum() + lambd * _off_diagonal(c).square().sum()
