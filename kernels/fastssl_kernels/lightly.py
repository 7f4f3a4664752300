"""The losses as modules with the names, arguments and values of lightly's.

`from lightly.loss import BarlowTwinsLoss` becomes `from fastssl_kernels import BarlowTwinsLoss`.
Across ranks (`gather_distributed=True`) statistics are those of the global batch, as in the
official code; lightly's Barlow Twins standardises each rank by itself.

Shapes: N batch, D embedding.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastssl_kernels.barlow_twins import barlow_twins_loss
from fastssl_kernels.contrastive import check_options, nt_xent_loss
from fastssl_kernels.vicreg import vicreg_loss


class BarlowTwinsLoss(nn.Module):
    """`barlow_twins_loss` of two views (N, D) -> () float32, with lightly's arguments."""

    def __init__(self, lambda_param: float = 5e-3, gather_distributed: bool = False) -> None:
        super().__init__()
        self.lambda_param = lambda_param
        self.gather_distributed = gather_distributed

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        return barlow_twins_loss(
            (z_a, z_b), lambd=self.lambda_param, group=_default_group(self.gather_distributed)
        )


class NTXentLoss(nn.Module):
    """`nt_xent_loss` of two views (N, D) -> () float32, with lightly's arguments and values.

    gather_distributed: contrast the batches of all ranks, if there are any. The value is then the
        mean over all ranks' rows, on every rank.
    """

    def __init__(self, temperature: float = 0.5, gather_distributed: bool = False) -> None:
        super().__init__()
        check_options(temperature, "cosine", "NTXentLoss")
        self.temperature = temperature
        self.gather_distributed = gather_distributed

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        group = _default_group(self.gather_distributed)
        return nt_xent_loss((out0, out1), temperature=self.temperature, group=group)


class VICRegLoss(nn.Module):
    """`vicreg_loss` of two views (N, ..., D) -> () float32, with lightly's arguments.

    Dimensions between the first and the last are spatial: the mean over positions of their losses.
    """

    def __init__(
        self,
        lambda_param: float = 25.0,
        mu_param: float = 25.0,
        nu_param: float = 1.0,
        gather_distributed: bool = False,
        eps: float = 0.0001,
    ) -> None:
        super().__init__()
        self.lambda_param = lambda_param
        self.mu_param = mu_param
        self.nu_param = nu_param
        self.gather_distributed = gather_distributed
        self.eps = eps

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        if z_a.shape != z_b.shape or z_a.ndim < 2:
            shapes = [tuple(z_a.shape), tuple(z_b.shape)]
            raise ValueError(
                f"VICRegLoss: views have shapes {shapes}; both must be one (N, ..., D)"
            )
        positions = zip(_spatial_positions(z_a), _spatial_positions(z_b), strict=True)
        return torch.stack([self._loss(a, b) for a, b in positions]).mean()

    def _loss(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        return vicreg_loss(
            (z_a, z_b),
            sim_coeff=self.lambda_param,
            std_coeff=self.mu_param,
            cov_coeff=self.nu_param,
            eps=self.eps,
            group=_default_group(self.gather_distributed),
        )


def _spatial_positions(z: Tensor) -> tuple[Tensor, ...]:
    """(N, ..., D) -> one (N, D) for each position."""
    return z.flatten(1, -2).unbind(1) if z.ndim > 2 else (z,)


def _default_group(gather_distributed: bool) -> Any:
    """The default group where lightly would gather over it, else None."""
    gathers = gather_distributed and dist.is_available() and dist.is_initialized()
    return dist.group.WORLD if gathers else None
