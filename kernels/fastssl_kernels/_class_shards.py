"""Classes sharded over ranks: what travels is embeddings, labels and four numbers a row.

Every rank computes the loss of the whole batch. Gradients of a shard's weights are exact; the
gradient of a rank's own rows carries a factor of the world size, which data-parallel averaging
divides out again (distributed.py has the contract).

Shapes: n rows of this rank, N rows of all ranks, D embedding, K classes.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastssl_kernels._precision import log_sum

# torch 2.14 deprecates the old name; 2.11 has no other
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Shard(NamedTuple):
    """The classes [first, first + rows) of `classes`, held by one of `world` ranks."""

    group: Any
    world: int
    first: int | Tensor
    classes: int | Tensor

    @staticmethod
    def of(weight: Tensor, group: Any) -> "Shard":
        """Where this rank's rows lie. Counts stay on the device: nothing waits for the host."""
        if group is None:
            return Shard(None, 1, 0, len(weight))
        world, rank = dist.get_world_size(group), dist.get_rank(group)
        counts = torch.empty(world, dtype=torch.int64, device=weight.device)
        _all_gather(counts, torch.full_like(counts[:1], len(weight)), group=group)
        return Shard(group, world, counts[:rank].sum(), counts.sum())

    @staticmethod
    def batch(n: int, group: Any) -> "Shard":
        """The batch as classes: n rows of each rank."""
        if group is None:
            return Shard(None, 1, 0, n)
        world = dist.get_world_size(group)
        return Shard(group, world, dist.get_rank(group) * n, world * n)


def shard_sizes(classes: int, world: int) -> list[int]:
    """Rows of each rank."""
    return [classes // world + (rank < classes % world) for rank in range(world)]


def gather(x: Tensor, shard: Shard) -> Tensor:
    """Every rank's rows, in rank order. (n, ...) -> (N, ...)"""
    if shard.world == 1:
        return x
    out = x.new_empty(shard.world * len(x), *x.shape[1:])
    _all_gather(out, x.contiguous(), group=shard.group)
    return out


def gather_shards(rows: Tensor, shard: Shard) -> Tensor:
    """All classes' rows (K, D) from every rank's own, whose numbers may differ by one."""
    if shard.world == 1:
        return rows
    sizes = shard_sizes(int(shard.classes), shard.world)
    padded = torch.nn.functional.pad(rows, (0, 0, 0, max(sizes) - len(rows)))
    parts = gather(padded, shard).split(max(sizes))
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


class _GatherInputs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shard: Shard) -> Tensor:
        ctx.shard = shard
        return gather(x, shard)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Each rank holds the part of its classes in the gradient of every row."""
        shard, n = ctx.shard, len(grads[0]) // ctx.shard.world
        total = grads[0].float() if grads[0].dtype != torch.float64 else grads[0].clone()
        dist.all_reduce(total, group=shard.group)
        own = total[dist.get_rank(shard.group) * n :][:n]
        return (own * shard.world).to(grads[0].dtype), None


class _SumRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shard: Shard) -> Tensor:
        total = x.clone()
        dist.all_reduce(total, group=shard.group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None  # every rank computes the same loss from the sum: it counts once


def gather_inputs(x: Tensor, shard: Shard) -> Tensor:
    """Every rank's rows (n, D) -> (N, D), with the gradient of the contract above."""
    return x if shard.world == 1 else _GatherInputs.apply(x, shard)


def times_world(x: Tensor, shard: Shard) -> Tensor:
    """x, its gradient times the world size: for rows that meet only this rank's part of a loss."""
    if shard.world == 1:
        return x
    fixed = x.detach()
    return fixed + shard.world * (x - fixed)


def sum_ranks(x: Tensor, shard: Shard) -> Tensor:
    """x summed over ranks, on every rank; each rank's part counts once in the gradient."""
    return x if shard.world == 1 else _SumRanks.apply(x, shard)


def combine_lse(lse: Tensor, low: Tensor, sums: list[Tensor], shard: Shard) -> list[Tensor]:
    """lse + low (N,) over all ranks, as two parts again, and `sums` (N,) added up over ranks."""
    if shard.world == 1:
        return [lse, low, *sums]
    top = lse.detach().clone()
    dist.all_reduce(top, dist.ReduceOp.MAX, group=shard.group)
    exps, *sums = sum_ranks(torch.stack([((lse - top) + low).exp(), *sums]), shard)
    lse, low = log_sum(top[None], exps[None])
    return [lse, low.detach(), *sums]
