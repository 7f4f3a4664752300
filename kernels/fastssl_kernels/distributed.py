"""A batch sharded over the ranks of a process group, seen as one batch.

The contract of every `group=` argument: the loss is that of the whole batch, and a rank's gradient
is the whole batch's with respect to its own rows, times the world size. Data-parallel training
averages gradients over ranks, which divides by the world size again, so the update equals that of
one process on the concatenated batch, also when ranks hold different numbers of rows.

A custom op takes strings, not process groups, so inside an op a group is its name, and "" is none.

Shapes: V views, n rows of this rank, N rows of all ranks, D embedding.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def group_name(group: Any, op: str) -> str:
    """The name under which an op finds `group` again; "" for None."""
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


def local_rows(group: Any) -> int:
    """The fewest rows that one process may pass: a whole batch has 2, a shard 1."""
    return 2 if group is None else 1


def _resolve(name: str) -> Any:
    resolve: Any = dist.distributed_c10d._resolve_process_group
    return resolve(name)


def row_counts(z: Tensor, name: str) -> list[int]:
    """Rows that each rank holds of the batch, z (V, n, D) being this rank's.

    ValueError if V or D differ. In a group this reads the counts on the host, a synchronisation.
    """
    if not name:
        return [z.shape[1]]
    group = _resolve(name)
    mine = torch.tensor(z.shape, dtype=torch.int64, device=z.device)
    shapes = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(shapes, mine, group=group)
    found = torch.stack(shapes).tolist()
    if len({(views, width) for views, _, width in found}) > 1:
        raise ValueError(
            f"ranks hold views of shapes {found}; only the batch (V, n, D)[1] may differ"
        )
    if sum(rows for _, rows, _ in found) < 2:
        raise ValueError(f"ranks hold views of shapes {found}; wanted a batch of N >= 2 rows")
    return [rows for _, rows, _ in found]


def sum_ranks(x: Tensor, name: str) -> Tensor:
    """x summed over the group, in place."""
    if name:
        dist.all_reduce(x, group=_resolve(name))
    return x


def gather_rows(x: Tensor, rows: list[int], name: str) -> Tensor:
    """(V, n, D) of every rank side by side, each padded with zero rows to the longest."""
    if not name:
        return x
    padded = torch.nn.functional.pad(x, (0, 0, 0, max(rows) - x.shape[1]))
    parts = [torch.empty_like(padded) for _ in rows]
    dist.all_gather(parts, padded.contiguous(), group=_resolve(name))
    return torch.cat(parts, dim=1)


def gather_batch(z: Tensor, name: str) -> Tensor:
    """The whole batch (V, N, D) on every rank, differentiable in this rank's rows.

    A loss that every rank computes from it has the gradient of the contract above.
    """
    if not name:
        return z
    group = _resolve(name)
    rows = row_counts(z, name)
    longest = max(rows)
    with torch.no_grad():
        everything = gather_rows(z, rows, name)
    kept = [everything[:, r * longest : r * longest + n] for r, n in enumerate(rows)]
    fixed = z.detach()
    kept[dist.get_rank(group)] = fixed + len(rows) * (
        z - fixed
    )  # value z, gradient times the world
    return torch.cat(kept, dim=1)


def own_start(rows: list[int], name: str) -> int:
    """Where this rank's rows begin in `gather_rows`."""
    return dist.get_rank(_resolve(name)) * max(rows) if name else 0
