"""The ranks of a torchrun launch and their collectives, which are no-ops for a single process.

The losses' `group=` makes statistics global (fastssl_kernels/distributed.py has the contract), so
that W ranks with batches of N / W take the step that one process takes with a batch of N.

Shapes: N batch, F features.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastssl.config import Config
from fastssl_kernels import distributed as by_name  # its groups are names

Net = TypeVar("Net", bound=nn.Module)
TIMEOUT = timedelta(minutes=10)  # of a collective of the losses that a rank never joins
# Of the collectives on `host`, in which ranks wait for work that takes as long as it takes: rank 0
# converts data or saves, another fits a probe. A rank that dies ends them at once all the same.
HOST_TIMEOUT = timedelta(days=7)
FIRST_FAILURE = "fastssl/first_failure"  # a key of the launch's store


@dataclass(frozen=True)
class Ranks:
    """This process among `world`. `group` is the losses' process group, None for one process;
    `host` is a group on the CPU, for values exchanged without a sync of the devices."""

    rank: int = 0
    world: int = 1
    group: Any = None
    host: Any = None

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which saves, logs and evaluates."""
        return self.rank == 0

    def all_reduce_max(self, *numbers: int) -> list[int]:
        """The maximum of each number over all ranks; of a flag, whether any rank sets it."""
        if self.world == 1:
            return list(numbers)
        found = torch.tensor(numbers, dtype=torch.int64)
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self.host)
        return found.tolist()

    def broadcast(self, number: float) -> float:
        """Rank 0's number."""
        return self.mean(number * self.world if self.is_main else 0.0)

    def mean(self, number: float) -> float:
        """The mean of a number over ranks."""
        if self.world == 1:
            return number
        found = torch.tensor(number, dtype=torch.float64)
        dist.all_reduce(found, group=self.host)
        return float(found) / self.world

    def barrier(self) -> None:
        """Wait for all ranks, however long one of them takes."""
        self.all_reduce_max(0)

    @contextmanager
    def main_first(self, needed: bool = True) -> Iterator[None]:
        """Run the body on rank 0, then on the others, where `needed`; else on all at once."""
        if needed and not self.is_main:
            self.barrier()
        yield
        if needed and self.is_main:
            self.barrier()

    def gather(self, value: Any) -> list[Any]:
        """The value of every rank, in rank order."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self.host)
        return values

    def gather_to_main(self, value: Any) -> list[Any]:
        """On rank 0 the value of every rank, in rank order; nothing on the others."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world if self.is_main else []
        dist.gather_object(value, values or None, dst=0, group=self.host)
        return values

    def broadcast_buffers(self, module: nn.Module) -> None:
        """Overwrite a module's buffers, the running statistics of its batch norms among them, by
        those of rank 0."""
        if self.world > 1:
            for buffer in module.buffers():
                dist.broadcast(buffer, src=0, group=self.group)


SINGLE_PROCESS = Ranks()


def is_launched() -> bool:
    """Whether torchrun (or SLURM through it) started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


class RankFailedError(RuntimeError):
    """Another rank failed first, and reports why; this one ends with `exit_code`."""

    is_reported = True

    def __init__(self, failure: str, exit_code: int):
        super().__init__(failure)
        self.exit_code = exit_code


@contextmanager
def init_distributed(device: str) -> Iterator[Ranks]:
    """This process's Ranks: those of an initialised torch.distributed, those of torchrun's
    variables, or a single process. A GPU rank takes the GPU of its LOCAL_RANK.

    Of the errors that leave the block on torchrun's ranks, the first stays as it is; those of the
    other ranks, which mostly follow from it, become a RankFailedError.
    """
    if dist.is_initialized():
        yield _ranks()
    elif is_launched():
        cuda = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
        if cuda:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        store, rank, world = next(dist.rendezvous("env://"))
        dist.init_process_group(
            "nccl" if cuda else "gloo", store=store, rank=rank, world_size=world, timeout=TIMEOUT
        )
        try:
            with _first_failure_only(store, rank):
                yield _ranks()
        finally:
            dist.destroy_process_group()
    else:
        yield SINGLE_PROCESS


def _ranks() -> Ranks:
    host = dist.new_group(backend="gloo", timeout=HOST_TIMEOUT)
    return Ranks(dist.get_rank(), dist.get_world_size(), dist.group.WORLD, host)


@contextmanager
def _first_failure_only(store: dist.Store, rank: int) -> Iterator[None]:
    """RankFailedError in place of an error of the body where another rank has failed before.

    Of ranks that fail together, as on a mistake in the config, rank 0 counts as the first: the
    others wait a second for it. They close their connections afterwards, so no rank fails because
    of an error that is not in the store yet.
    """
    try:
        yield
    except BaseException as error:  # an interruption is one
        mine = first = f"rank {rank}: {type(error).__name__}: {error}"
        with suppress(Exception):  # a store that is gone: its rank has ended
            if rank:
                with suppress(dist.DistStoreError):
                    store.wait([FIRST_FAILURE], timedelta(seconds=1))
            first = store.compare_set(FIRST_FAILURE, "", mine).decode()
        if first != mine:
            raise RankFailedError(first, getattr(error, "exit_code", 2)) from error
        raise


def rank_batch(config: Config, world: int) -> int:
    """Batch size of one rank; ValueError where the global batch is not divisible by the ranks."""
    if config.global_batch % world:
        raise ValueError(
            f"--global-batch {config.global_batch} is not divisible by {world} ranks; "
            f"pass a multiple of {world}"
        )
    return config.global_batch // world or config.batch_size


def all_gather_with_grad(z: Tensor, group: Any) -> Tensor:
    """The views of all ranks (V, N, D) from this rank's; the mean of its gradients over ranks is
    the gradient of the global batch."""
    name = by_name.group_name(group, "all_gather_with_grad")
    return by_name.all_gather_with_grad(z, name)


def all_gather_index(index: Tensor, group: Any) -> Tensor:
    """The image indices of all ranks (N,) from this rank's; every rank has as many."""
    if group is None:
        return index
    parts = [torch.empty_like(index) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, index.contiguous(), group=group)
    return torch.cat(parts)


class _SumRanks(torch.autograd.Function):
    """Sum over ranks; so is its gradient, since every rank uses the sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


class _RankBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm over all ranks' rows, on CPUs, which torch's SyncBatchNorm does not support."""

    group: Any = None

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(
                f"batch norm: input has shape {tuple(input.shape)}; wanted (N, F, ...)"
            )

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        dtype = input.dtype  # bfloat16 cannot hold a number of rows, nor the sums
        input = input.to(torch.promote_types(dtype, torch.float32))
        axes = [0, *range(2, input.ndim)]
        rows = input.new_tensor([input.numel() / input.shape[1]])
        sums = _SumRanks.apply(torch.cat([input.sum(axes), rows]), self.group)
        count = sums[-1].detach()
        shape = (1, -1, *[1] * (input.ndim - 2))
        centred = input - (sums[:-1] / count).view(shape)
        var = _SumRanks.apply(centred.square().sum(axes), self.group) / count  # (F,)
        if self.running_mean is not None and self.running_var is not None:
            rate = self.momentum or 0.0
            with torch.no_grad():
                self.running_mean.lerp_((sums[:-1] / count).to(self.running_mean), rate)
                self.running_var.lerp_((var * count / (count - 1)).to(self.running_var), rate)
                if self.num_batches_tracked is not None:
                    self.num_batches_tracked.add_(1)
        out = centred * (var + self.eps).rsqrt().view(shape)
        if self.affine:
            out = out * self.weight.view(shape) + self.bias.view(shape)
        return out.to(dtype)


def global_batch_norm(module: Net, ranks: Ranks) -> Net:
    """`module` with every batch norm's statistics taken over all ranks' rows; unchanged for one
    process."""
    if ranks.world == 1:
        return module
    if any(p.is_cuda for p in module.parameters()):
        return nn.SyncBatchNorm.convert_sync_batchnorm(module, ranks.group)
    for child in module.modules():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            child.__class__ = _RankBatchNorm
            child.group = ranks.group
    return module
