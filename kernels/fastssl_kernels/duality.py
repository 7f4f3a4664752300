"""Contrastive and non-contrastive losses that mirror each other. arXiv:2206.02574.

For embeddings Z (N, D), eq. 8 and 9 (K there is Z^T):

    sample-contrastive     ||Z Z^T - diag||_F^2      dimension-contrastive     ||Z^T Z - diag||_F^2

VICReg-exp has c_exp(Z) = mean_i log sum_{j != i} exp(cov_ij / t) for VICReg's squared covariances
(eq. 11); VICReg-ctr takes that and the variance term of Z^T (eq. 12, 13), so it contrasts samples.

Shapes: V views, N batch, D embedding.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastssl_kernels._precision import accumulation_dtype, without_autocast
from fastssl_kernels._validation import Path, check_views
from fastssl_kernels.distributed import all_gather_with_grad, require_rows
from fastssl_kernels.second_moment import second_moment_energy
from fastssl_kernels.vicreg import invariance, variance


def dimension_contrastive_loss(
    views: Tensor | Sequence[Tensor], *, path: Path = "auto", group: Any = None
) -> Tensor:
    """||Z^T Z - diag||_F^2, averaged over views (V, N, D), or V >= 1 tensors (N, D) -> ().

    Arguments, dtypes and errors as in `second_moment_energy`; arXiv:2206.02574, eq. 9.
    """
    name = "dimension_contrastive_loss"
    z, _ = check_views(views, name, path=path, group=group, min_views=1, min_rows=0)
    return second_moment_energy(z, pairs=False, diagonal=False, path=path, group=group) / len(z)


def sample_contrastive_loss(
    views: Tensor | Sequence[Tensor], *, path: Path = "auto", group: Any = None
) -> Tensor:
    """||Z Z^T - diag||_F^2, averaged over views (V, N, D), or V >= 1 tensors (N, D) -> ().

    The dimension-contrastive loss of Z^T, so "gram" multiplies D x D and "direct" N x N matrices.
    Arguments, dtypes and errors as in `second_moment_energy`; arXiv:2206.02574, eq. 8.
    """
    name = "sample_contrastive_loss"
    z, ranks = check_views(views, name, path=path, group=group, min_views=1, min_rows=0)
    batch = all_gather_with_grad(z, ranks)
    if batch.shape[1] == 0:  # second_moment_energy wants a column; a zero row changes no product
        batch = torch.nn.functional.pad(batch, (0, 0, 0, 1))
    transposed = batch.transpose(1, 2)
    return second_moment_energy(transposed, pairs=False, diagonal=False, path=path) / len(z)


def vicreg_exp_loss(
    views: Tensor | Sequence[Tensor],
    *,
    temperature: float,
    sim_coeff: float = 25.0,
    std_coeff: float = 25.0,
    cov_coeff: float = 1.0,
    gamma: float = 1.0,
    eps: float = 1e-4,
    group: Any = None,
) -> Tensor:
    """VICReg with c_exp for its covariance term, of V >= 2 views (V, N, D) -> (); writes (D, D).

    Other arguments as in `vicreg_loss`; arXiv:2206.02574, eq. 11.
    """
    z = _global_batch(views, temperature, group, "vicreg_exp_loss")
    with without_autocast(z[0]):
        covariance = _log_exp_covariance(z, temperature)
        spread = std_coeff * variance(z, gamma, eps) + cov_coeff * covariance
        return sim_coeff * invariance(z) + spread


def vicreg_ctr_loss(
    views: Tensor | Sequence[Tensor],
    *,
    temperature: float,
    sim_coeff: float = 25.0,
    std_coeff: float = 25.0,
    cov_coeff: float = 1.0,
    gamma: float = 1.0,
    eps: float = 1e-4,
    group: Any = None,
) -> Tensor:
    """VICReg-exp with samples and dimensions swapped, of V >= 2 views (V, N, D), D >= 2 -> ().

    The variance of each sample over dimensions, and c_exp of the (N, N) covariance of samples.
    Other arguments as in `vicreg_loss`; arXiv:2206.02574, eq. 12 and 13.
    """
    z = _global_batch(views, temperature, group, "vicreg_ctr_loss")
    if z[0].shape[1] < 2:
        raise ValueError(f"vicreg_ctr_loss: views are {tuple(z[0].shape)}; wanted (N, D), D >= 2")
    swapped = [view.T for view in z]
    with without_autocast(z[0]):
        covariance = _log_exp_covariance(swapped, temperature)
        spread = std_coeff * variance(swapped, gamma, eps)
        return sim_coeff * invariance(z) + spread + cov_coeff * covariance


def _global_batch(
    views: Tensor | Sequence[Tensor], temperature: float, group: Any, name: str
) -> list[Tensor]:
    """The checked views of all ranks, V x (N, D), float32 or float64."""
    z, ranks = check_views(views, name, path="eager", group=group)
    if not temperature > 0:
        raise ValueError(f"{name}: temperature is {temperature}; it must be positive")
    batch = all_gather_with_grad(z.to(accumulation_dtype(z)), ranks)
    require_rows([batch.shape[1]], 2, name)
    return list(batch)


def _log_exp_covariance(views: Sequence[Tensor], temperature: float) -> Tensor:
    """2 / V times the sum over views of c_exp, V x (N, D) -> ()."""
    terms = []
    for z in views:
        x = z - z.mean(0)
        cov = x.T @ x / ((len(x) - 1) * temperature)  # (D, D)
        diagonal = torch.eye(len(cov), dtype=torch.bool, device=cov.device)
        terms.append(cov.masked_fill(diagonal, -torch.inf).logsumexp(1).mean())
    return 2 * torch.stack(terms).mean()
