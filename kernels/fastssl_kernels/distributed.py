"""A batch, or the classes of a softmax, sharded over the ranks of a process group.

The contract of every `group=` argument: the loss is that of the global batch on every rank, and a
rank's gradient is the global one with respect to its own rows, times the world size. Data-parallel
training averages gradients over ranks, which divides by the world size again, so the update equals
that of one process on the concatenated batch, also when ranks hold different numbers of rows.
Gradients of a class shard's weights are exact: no averaging follows.

A custom op takes strings, not process groups, so inside an op a group is its name, and "" is none.
`Shard` describes classes that are sharded instead: ranks exchange embeddings, labels and four
numbers per row, never weights or logits.

Shapes: V views, n rows of this rank, N rows of all ranks, D embedding, K classes.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from fastssl_kernels._precision import log_sum

SECOND_ACROSS_RANKS = (
    "second derivatives of a loss over a process group are not implemented, since they need terms "
    "of other ranks' rows; compute them without group="
)

# torch 2.14 deprecates the old name; 2.11 has no other
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def group_name(group: Any, op: str) -> str:
    """The name by which an op looks `group` up again; "" for None."""
    if group is None:
        return ""
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError(f"{op}: got group={group}, but torch.distributed is not initialised")
    if dist.get_rank(group) < 0:
        raise ValueError(
            f"{op}: this process (global rank {dist.get_rank()}) is not a member of the group; "
            "pass a group that it belongs to, or None"
        )
    return group.group_name


def _resolve(name: str) -> Any:
    resolve: Any = dist.distributed_c10d._resolve_process_group
    return resolve(name)


def row_counts(z: Tensor, name: str) -> list[int]:
    """The number of rows that each rank holds of the batch; z (V, n, D) is this rank's part.

    ValueError if V or D differ. In a group this reads the counts on the host, a synchronisation.
    """
    if not name:
        return [z.shape[1]]
    group = _resolve(name)
    local = torch.tensor(z.shape, dtype=torch.int64, device=z.device)
    gathered = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, local, group=group)
    shapes = torch.stack(gathered).tolist()
    if len({(views, width) for views, _, width in shapes}) > 1:
        raise ValueError(
            f"ranks hold views of shapes {shapes}; only the batch (V, n, D)[1] may differ"
        )
    return [rows for _, rows, _ in shapes]


def require_rows(rows: list[int], least: int, op: str) -> None:
    """ValueError, the same on every rank, unless the ranks hold at least `least` rows together."""
    if sum(rows) < least:
        raise ValueError(f"{op}: ranks hold {rows} rows; wanted a batch of N >= {least}")


def require_equal_rows(x: Tensor, group: Any, op: str) -> None:
    """Raise on every rank unless x has one shape on all of them.

    ValueError on a CPU; on CUDA a device assert, so that no step waits for the host.
    """
    if group is None:
        return
    local = torch.stack([torch.full((), n, device=x.device) for n in x.shape])  # no copy from host
    gathered = local.new_empty(dist.get_world_size(group) * len(local))
    _all_gather_single(gathered, local, group=group)
    shapes = gathered.view(-1, len(local))
    equal = (shapes == local).all()
    wanted = "every rank must hold as many; drop the last batch, or cut it to the smallest"
    if x.is_cuda:
        torch._assert_async(equal, f"{op}: ranks hold different numbers of rows; {wanted}")
    elif not bool(equal):
        raise ValueError(f"{op}: ranks hold rows of shapes {shapes.tolist()}; {wanted}")


def all_reduce_sum(x: Tensor, name: str) -> Tensor:
    """x summed over the group, in place; without a gradient."""
    if name:
        dist.all_reduce(x, group=_resolve(name))
    return x


def all_gather_padded(x: Tensor, rows: list[int], name: str) -> Tensor:
    """x (V, n, D) of every rank side by side, each padded with zero rows to the longest."""
    if not name:
        return x
    padded = F.pad(x, (0, 0, 0, max(rows) - x.shape[1]))
    parts = [torch.empty_like(padded) for _ in rows]
    dist.all_gather(parts, padded.contiguous(), group=_resolve(name))
    return torch.cat(parts, dim=1)


def padded_offset(rows: list[int], name: str) -> int:
    """Where this rank's rows begin in `all_gather_padded`."""
    return dist.get_rank(_resolve(name)) * max(rows) if name else 0


def all_gather_with_grad(z: Tensor, name: str) -> Tensor:
    """The global batch (V, N, D) on every rank, differentiable in this rank's rows.

    A loss that every rank computes from it has the gradient of the contract above.
    """
    if not name:
        return z
    rows = row_counts(z, name)
    longest = max(rows)
    with torch.no_grad():
        padded = all_gather_padded(z, rows, name)
    parts = [padded[:, r * longest : r * longest + n] for r, n in enumerate(rows)]
    parts[dist.get_rank(_resolve(name))] = _OwnRows.apply(z, len(rows))
    return torch.cat(parts, dim=1)


class _RefuseBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, derivative: Tensor, x: Tensor, message: str) -> Tensor:
        ctx.message = message
        return derivative.view_as(derivative)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise NotImplementedError(ctx.message)


def refuse_backward(derivative: Tensor, x: Tensor, message: str) -> Tensor:
    """`derivative`, of a loss with respect to x; under create_graph its backward raises."""
    if not torch.is_grad_enabled():
        return derivative
    return _RefuseBackward.apply(derivative.detach(), x, message)


class _OwnRows(torch.autograd.Function):
    """This rank's rows among those of all ranks; see all_gather_with_grad."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, world: int) -> Tensor:
        ctx.world = world
        ctx.save_for_backward(z)
        return z.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (z,) = ctx.saved_tensors
        return refuse_backward(grads[0] * ctx.world, z, SECOND_ACROSS_RANKS), None


def scale_grad_by_world_size(x: Tensor, world: int) -> Tensor:
    """x, its gradient times `world`: for rows whose gradient no other rank contributes to."""
    constant = x.detach()
    return constant + world * (x - constant)


class Shard(NamedTuple):
    """The classes [first, first + rows) of `classes`, held by one of `world` ranks."""

    group: Any
    world: int
    first: int | Tensor
    classes: int | Tensor

    @staticmethod
    def of_weight(weight: Tensor, group: Any) -> "Shard":
        """Where this rank's rows lie. Counts stay on the device: nothing waits for the host."""
        if group is None:
            return Shard(None, 1, 0, len(weight))
        world, rank = dist.get_world_size(group), dist.get_rank(group)
        counts = torch.empty(world, dtype=torch.int64, device=weight.device)
        _all_gather_single(counts, torch.full_like(counts[:1], len(weight)), group=group)
        return Shard(group, world, counts[:rank].sum(), counts.sum())

    @staticmethod
    def of_batch(n: int, group: Any) -> "Shard":
        """The global batch as classes: n rows of each rank."""
        if group is None:
            return Shard(None, 1, 0, n)
        world = dist.get_world_size(group)
        return Shard(group, world, dist.get_rank(group) * n, world * n)


def shard_sizes(classes: int, world: int) -> list[int]:
    """The number of classes on each rank."""
    return [classes // world + (rank < classes % world) for rank in range(world)]


def all_gather_rows(x: Tensor, shard: Shard) -> Tensor:
    """Every rank's rows, in rank order, without a gradient. (n, ...) -> (N, ...)"""
    if shard.world == 1:
        return x
    out = x.new_empty(shard.world * len(x), *x.shape[1:])
    _all_gather_single(out, x.contiguous(), group=shard.group)
    return out


def all_gather_shards(rows: Tensor, shard: Shard) -> Tensor:
    """All classes' rows (K, D) from each rank's shard; sizes may differ by one."""
    if shard.world == 1:
        return rows
    sizes = shard_sizes(int(shard.classes), shard.world)
    padded = F.pad(rows, (0, 0, 0, max(sizes) - len(rows)))
    parts = all_gather_rows(padded, shard).split(max(sizes))
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


class _AllGatherInputs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shard: Shard) -> Tensor:
        ctx.shard = shard
        ctx.save_for_backward(x)
        return all_gather_rows(x, shard)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Each rank holds its classes' part of the gradient of every row; the sum is the whole."""
        shard, n = ctx.shard, len(grads[0]) // ctx.shard.world
        dtype = torch.float64 if grads[0].dtype == torch.float64 else torch.float32
        total = grads[0].detach().to(dtype, copy=True)
        dist.all_reduce(total, group=shard.group)
        local = total[dist.get_rank(shard.group) * n :][:n]
        dx = (local * shard.world).to(grads[0].dtype)
        (x,) = ctx.saved_tensors
        return refuse_backward(dx, x, SECOND_ACROSS_RANKS), None


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shard: Shard) -> Tensor:
        total = x.clone()
        dist.all_reduce(total, group=shard.group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None  # every rank computes the same loss from the sum: it counts once


def all_gather_inputs(x: Tensor, shard: Shard) -> Tensor:
    """Every rank's rows (n, D) -> (N, D), each rank using them with its own classes only.

    The gradient sums what ranks found, and is that of the contract above.
    """
    return x if shard.world == 1 else _AllGatherInputs.apply(x, shard)


def all_reduce_with_grad(x: Tensor, shard: Shard) -> Tensor:
    """x summed over ranks, on every rank; each rank's part counts once in the gradient."""
    return x if shard.world == 1 else _AllReduceSum.apply(x, shard)


def all_reduce_lse(lse: Tensor, lse_lo: Tensor, sums: list[Tensor], shard: Shard) -> list[Tensor]:
    """[lse, lse_lo, *sums], each (N,), of all ranks' classes: `sums` are added over ranks."""
    if shard.world == 1:
        return [lse, lse_lo, *sums]
    top = lse.detach().clone()
    dist.all_reduce(top, dist.ReduceOp.MAX, group=shard.group)
    stacked = torch.stack([((lse - top) + lse_lo).exp(), *sums])
    exps, *sums = all_reduce_with_grad(stacked, shard)
    lse, lse_lo = log_sum(top[None], exps[None])
    return [lse, lse_lo.detach(), *sums]
