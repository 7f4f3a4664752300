"""VICReg: variance, invariance and covariance of embeddings. arXiv:2105.04906, eq. 1-6.

    L = sim_coeff * MSE(za, zb)
      + std_coeff * mean over views of mean_i relu(gamma - sqrt(var_i + eps))
      + cov_coeff * sum over the two views of sum_{i != j} cov_ij^2 / D

var and cov are unbiased. V > 2 views: mean over pairs, mean over views, 2 / V times the sum.

Shapes: N batch, D embedding, V views.
"""

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastssl_kernels._views import stack_views


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
    invariance = torch.stack([F.mse_loss(a, b) for a, b in combinations(views, 2)]).mean()
    std = [(z.var(0) + eps).sqrt() for z in views]
    variance = torch.stack([F.relu(gamma - s).mean() for s in std]).mean()
    covariance = 2 * torch.stack([_off_diagonal_energy(z) for z in views]).mean()
    return sim_coeff * invariance + std_coeff * variance + cov_coeff * covariance


def vicreg_loss(
    views: Tensor | Sequence[Tensor],
    *,
    sim_coeff: float = 25.0,
    std_coeff: float = 25.0,
    cov_coeff: float = 1.0,
    gamma: float = 1.0,
    eps: float = 1e-4,
    group: Any = None,
) -> Tensor:
    """VICReg loss of V views (V, N, D), or of a sequence of V tensors (N, D) -> () float32."""
    z = stack_views(views, "vicreg_loss")
    if group is not None:
        raise NotImplementedError("group= arrives with the fused path")
    loss = vicreg_loss_reference(
        z, sim_coeff=sim_coeff, std_coeff=std_coeff, cov_coeff=cov_coeff, gamma=gamma, eps=eps
    )
    return loss if z.dtype == torch.float64 else loss.float()


def _off_diagonal_energy(z: Tensor) -> Tensor:
    """sum_{i != j} cov_ij^2 / D of one view (N, D)."""
    x = z - z.mean(0)
    cov = x.T @ x / (len(x) - 1)  # (D, D)
    return (cov - torch.diag(cov.diagonal())).square().sum() / len(cov)
