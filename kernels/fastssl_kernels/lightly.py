"""The losses as modules with the names, arguments, values and errors of lightly's.

`from lightly.loss import BarlowTwinsLoss` becomes `from fastssl_kernels import BarlowTwinsLoss`.
Across ranks (`gather_distributed=True`) statistics are those of the global batch, as in the
official code; lightly's Barlow Twins standardises each rank by itself.

Shapes: N batch, D embedding, M rows of a memory bank.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from fastssl_kernels._validation import stack_views
from fastssl_kernels.barlow_twins import barlow_twins_loss
from fastssl_kernels.contrastive import bank_loss, signed_nt_xent
from fastssl_kernels.distributed import Shard, all_gather_rows, require_equal_rows
from fastssl_kernels.vicreg import vicreg_loss


class ShapeError(ValueError, AssertionError):
    """Views of wrong shapes: our ValueError, and the AssertionError that lightly raises."""


class BarlowTwinsLoss(nn.Module):
    """`barlow_twins_loss` of two views (N, D) -> () float32, with lightly's arguments."""

    def __init__(self, lambda_param: float = 5e-3, gather_distributed: bool = False) -> None:
        super().__init__()
        _check_gather(gather_distributed, "BarlowTwinsLoss")
        self.lambda_param = lambda_param
        self.gather_distributed = gather_distributed

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        return barlow_twins_loss(
            (z_a, z_b), lambd=self.lambda_param, group=_default_group(self.gather_distributed)
        )


class NTXentLoss(nn.Module):
    """`nt_xent_loss` of two views (N, D) -> () float32, with lightly's arguments and values.

    temperature: a number whose magnitude is at least 1e-8; a negative one repels views.
    memory_bank_size: 0, or (M, D) for MoCo's loss (arXiv:1911.05722): each row of the first view
        against its counterpart and M earlier rows of the second, which replace the batch as
        negatives. A call whose first view requires a gradient stores its second one.
    gather_distributed: contrast the batches of all ranks, if there are any. The value is then the
        mean over all ranks' rows, on every rank. With a bank, store the rows of all ranks; the
        value is then of this rank's rows.

    ValueError for any other temperature or bank size, and for gather_distributed where torch has
    no distributed package.
    """

    bank: Tensor
    bank_ptr: Tensor

    def __init__(
        self,
        temperature: float = 0.5,
        memory_bank_size: int | Sequence[int] = 0,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__()
        _check_gather(gather_distributed, "NTXentLoss")
        if not abs(temperature) >= 1e-8:
            raise ValueError(f"NTXentLoss: temperature is {temperature}; wanted 1e-8 or more")
        self.temperature = temperature
        self.memory_bank_size = _bank_size(memory_bank_size)
        self.gather_distributed = gather_distributed
        rows = torch.randn(self.memory_bank_size) if self.memory_bank_size else torch.empty(0, 0)
        # not in the state dict, as lightly's are not
        self.register_buffer("bank", F.normalize(rows, dim=1), persistent=False)
        start = torch.zeros(1, dtype=torch.int64)
        self.register_buffer("bank_ptr", start, persistent=False)  # the oldest row

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        group = _default_group(self.gather_distributed)
        if not self.memory_bank_size:
            views = stack_views((out0, out1), "NTXentLoss")
            return signed_nt_xent(views, self.temperature, "cosine", group, "NTXentLoss")
        if out0.shape != out1.shape or out0.shape[1:] != self.bank.shape[1:]:
            shapes = f"views {tuple(out0.shape)} and {tuple(out1.shape)}"
            raise ValueError(
                f"NTXentLoss: got {shapes}; wanted (N, {self.bank.shape[1]}), the width of "
                f"memory_bank_size={self.memory_bank_size}"
            )
        # of a copy, since the backward pass reads it after the update
        loss = bank_loss(out0, out1, self.bank.clone(), self.temperature)
        if out0.requires_grad:
            self._store(F.normalize(out1.detach().to(self.bank.dtype), dim=1), group)
        return loss

    @torch.no_grad()
    def _store(self, rows: Tensor, group: Any) -> None:
        """Overwrite the oldest rows; those past the end of the bank are dropped."""
        if group is not None:
            require_equal_rows(rows, group, "NTXentLoss")
            rows = all_gather_rows(rows, Shard.of_batch(len(rows), group))
        start, size = int(self.bank_ptr), len(self.bank)
        end = min(start + len(rows), size)
        self.bank[start:end] = rows[: end - start]
        self.bank_ptr.fill_(end % size)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, memory_bank_size={self.memory_bank_size or 0}"


class VICRegLoss(nn.Module):
    """`vicreg_loss` of two views (N, ..., D) -> () float32, with lightly's arguments.

    Dimensions between the first and the last are spatial: the mean over positions of their losses.
    Views of unequal shapes or of fewer than two rows raise an error that is a ValueError and, as
    lightly's, an AssertionError.
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
        _check_gather(gather_distributed, "VICRegLoss")
        self.lambda_param = lambda_param
        self.mu_param = mu_param
        self.nu_param = nu_param
        self.gather_distributed = gather_distributed
        self.eps = eps

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        if z_a.shape != z_b.shape or z_a.ndim < 2:
            shapes = [tuple(z_a.shape), tuple(z_b.shape)]
            raise ShapeError(
                f"VICRegLoss: views have shapes {shapes}; both must be one (N, ..., D)"
            )
        if len(z_a) < 2 and _default_group(self.gather_distributed) is None:
            raise ShapeError(f"VICRegLoss: views are {tuple(z_a.shape)}; wanted N >= 2 rows")
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


def _check_gather(gather_distributed: bool, name: str) -> None:
    """ValueError where torch cannot gather, or for a value that is no bool, such as a bank size."""
    if not isinstance(gather_distributed, bool):
        raise ValueError(
            f"{name}: gather_distributed is {gather_distributed!r}; pass True or False"
        )
    if gather_distributed and not dist.is_available():
        raise ValueError(
            f"{name}: gather_distributed is True, but this torch has no distributed package; pass "
            "False, or install a torch that has it"
        )


def _bank_size(size: int | Sequence[int]) -> tuple[int, int] | None:
    """(M, D), or None without a bank."""
    sizes = [size] if isinstance(size, int) else list(size)
    if sizes == [0] or (len(sizes) == 2 and sizes[0] == 0 <= sizes[1]):
        return None
    if len(sizes) != 2 or min(sizes) < 1:
        raise ValueError(
            f"NTXentLoss: memory_bank_size is {size}; wanted 0, or (M, D), the number of rows and "
            "their width"
        )
    return sizes[0], sizes[1]


def _spatial_positions(z: Tensor) -> tuple[Tensor, ...]:
    """(N, ..., D) -> one (N, D) for each position."""
    return z.flatten(1, -2).unbind(1) if z.ndim > 2 else (z,)


def _default_group(gather_distributed: bool) -> Any:
    """The default group where lightly would gather over it, else None."""
    gathers = gather_distributed and dist.is_available() and dist.is_initialized()
    return dist.group.WORLD if gathers else None
