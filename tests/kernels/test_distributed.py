"""Shards of a batch: ranks together compute what one process computes on the whole batch."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import forward_ad

from fastssl_kernels import (
    BarlowTwinsLoss,
    DIETHead,
    NTXentLoss,
    VICRegLoss,
    barlow_twins_loss,
    coding_rate,
    dimension_contrastive_loss,
    info_nce_loss,
    linear_cross_entropy,
    nt_xent_loss,
    sample_contrastive_loss,
    second_moment_energy,
    vicreg_ctr_loss,
    vicreg_exp_loss,
    vicreg_loss,
)
from tests.helpers.gloo import on_ranks
from tests.helpers.numerics import relative_error, value_and_grads

Loss = Callable[..., Tensor]


def losses() -> dict[str, Loss]:
    """Every loss, and for those with paths each of them."""
    found: dict[str, Loss] = {
        "exp": partial(vicreg_exp_loss, temperature=0.5),
        "ctr": partial(vicreg_ctr_loss, temperature=0.5),
        "dimension": dimension_contrastive_loss,
        "sample": sample_contrastive_loss,
    }
    for path in ("gram", "direct", "eager"):
        found |= {
            f"barlow {path}": partial(barlow_twins_loss, path=path),
            f"barlow mean {path}": partial(barlow_twins_loss, path=path, pairing="mean"),
            f"vicreg {path}": partial(vicreg_loss, path=path),
            f"coding rate {path}": partial(coding_rate, path=path),
            f"pairs {path}": partial(second_moment_energy, path=path, diagonal=False),
            f"self {path}": partial(second_moment_energy, path=path, pairs=False),
        }
    return found


def batch(rows: int, views: int, width: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    common = torch.randn(1, rows, width, generator=generator, dtype=torch.float64)
    own = torch.randn(views, rows, width, generator=generator, dtype=torch.float64)
    return common + 0.5 * own + 0.2


def weight() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 9, generator=generator, dtype=torch.float64)


def shared_steps(
    rank: int, world: int, shards: Sequence[Sequence[int]], views: int
) -> list[dict[str, tuple[Tensor, Tensor]]]:
    """`shared_step` for each way to shard a batch."""
    return [shared_step(rank, world, counts, views) for counts in shards]


def shared_step(
    rank: int, world: int, counts: Sequence[int], views: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """Of each loss, the value and a shared weight's gradient, averaged as data parallelism does."""
    start = sum(counts[:rank])
    mine = batch(sum(counts), views)[:, start : start + counts[rank]]
    result = {}
    for name, loss in losses().items():
        w = weight().requires_grad_()
        value = loss(mine @ w, group=dist.group.WORLD)
        value.backward()
        dist.all_reduce(w.grad)
        result[name] = (value.detach(), w.grad / world)
    return result


SHARDS = [[(7,)], [(3, 3, 1), (5, 0, 2)], [(4, 4, 4, 3)]]
SLOW = [pytest.param(shards, marks=pytest.mark.slow) for shards in SHARDS]


@pytest.mark.parametrize("shards", [[(5, 2), (0, 7)], *SLOW], ids=str)
def test_ranks_equal_one_process(shards: list[tuple[int, ...]]) -> None:
    """1 to 4 ranks, even and uneven, some with a single row or none: to 1e-10."""
    views = 3
    steps = on_ranks(len(shards[0]), shared_steps, shards, views)
    for i, counts in enumerate(shards):
        for name, loss in losses().items():
            w = weight().requires_grad_()
            value = loss(batch(sum(counts), views) @ w)
            (gradient,) = torch.autograd.grad(value, w)
            for found in (step[i][name] for step in steps):
                assert relative_error(found[0], value.detach()) < 1e-10, (name, counts)
                assert relative_error(found[1], gradient) < 1e-10, (name, counts)


def other_steps(rank: int, world: int) -> tuple[list[Tensor], list[str]]:
    """Values of the gathering modules; messages of a foreign group and of views unlike in width."""
    mine = batch(6, 2)[:, 3 * rank : 3 * rank + 3]
    values = [module(gather_distributed=True)(*mine) for module in (BarlowTwinsLoss, VICRegLoss)]
    foreign = [dist.new_group([0]), dist.new_group([1])][1 - rank]
    messages = []
    for name in ("barlow gram", "vicreg direct", "coding rate gram", "exp", "pairs direct"):
        with pytest.raises(ValueError) as error:
            losses()[name](mine, group=foreign)
        messages.append(str(error.value))
    with pytest.raises(ValueError) as error:
        barlow_twins_loss(batch(4, 2, width=5 + rank), group=dist.group.WORLD)
    return values, [*messages, str(error.value)]


def refused(rank: int, world: int) -> list[str]:
    """Messages of the losses that want equal batches, of ranks with unequal ones; of batches that
    are too small together; of second derivatives and tangents across ranks."""
    group = dist.group.WORLD
    z = batch(5, 2)[:, : 3 - rank].clone().requires_grad_()  # 3 rows and 2
    head = DIETHead(6, 6, group=group).double()
    index, weight = torch.arange(3 - rank), torch.ones(3, 6, dtype=torch.float64)
    calls: list[Callable[[], object]] = [
        lambda: nt_xent_loss(z, group=group),
        lambda: info_nce_loss(z[0], z[1], temperature=0.5, group=group),
        lambda: NTXentLoss(gather_distributed=True)(*z),
        lambda: NTXentLoss(memory_bank_size=(9, 6), gather_distributed=True)(*z),
        lambda: linear_cross_entropy(z[0], weight, index, group=group),
        lambda: head(z[0], index),
    ]
    one = z[:, : 1 - rank]  # one row, and none
    for loss in (barlow_twins_loss, vicreg_loss, partial(vicreg_exp_loss, temperature=0.5)):
        calls.append(partial(loss, one, group=group))
    messages = []
    for call in calls:
        with pytest.raises(ValueError) as error:
            call()
        messages.append(str(error.value))
    equal = batch(4, 2)[:, 2 * rank : 2 * rank + 2].clone().requires_grad_()
    for loss in (*second_order_losses(), nt_xent_loss):
        (first,) = torch.autograd.grad(loss(equal, group=group), equal, create_graph=True)
        with pytest.raises(NotImplementedError) as unsupported:
            torch.autograd.grad(first.square().sum(), equal)
        messages.append(str(unsupported.value))
        with pytest.raises(NotImplementedError), forward_ad.dual_level():
            loss(forward_ad.make_dual(equal.detach(), torch.ones_like(equal)), group=group)
    return messages


def second_order_losses() -> list[Loss]:
    """One of each way that gradients cross ranks."""
    names = ("barlow gram", "vicreg direct", "coding rate gram", "barlow eager", "exp", "sample")
    return [losses()[name] for name in names]


def gathering_bank(rank: int, world: int) -> tuple[Tensor, int, list[Tensor]]:
    """A memory bank after a step of 6 images over the ranks, its pointer, value and gradients."""
    torch.manual_seed(0)
    module = NTXentLoss(0.2, (8, 6), gather_distributed=world > 1)
    views = batch(6, 2).chunk(world, 1)[rank]
    results = value_and_grads(module, list(views), torch.float32)
    return module.bank, int(module.bank_ptr), results


def steps(rank: int, world: int) -> tuple[Any, Any, Any]:
    return other_steps(rank, world), refused(rank, world), gathering_bank(rank, world)


@pytest.fixture(scope="module")
def two_ranks() -> list[tuple[Any, Any, Any]]:
    """What `steps` returns on each of two ranks."""
    return on_ranks(2, steps)


def test_a_bank_stores_the_rows_of_all_ranks(two_ranks: list[Any]) -> None:
    """The loss is that of the rank's own rows, as lightly's."""
    bank, _, _ = gathering_bank(0, 1)
    for rank, (_, _, (found, pointer, results)) in enumerate(two_ranks):
        assert torch.allclose(found, bank) and pointer == 6
        torch.manual_seed(0)
        views = list(batch(6, 2)[:, 3 * rank : 3 * rank + 3])
        wanted = value_and_grads(NTXentLoss(0.2, (8, 6)), views, torch.float32)
        assert all(relative_error(x, y) < 1e-6 for x, y in zip(results, wanted, strict=True))


def test_what_ranks_cannot_do_is_refused_on_each(two_ranks: list[Any]) -> None:
    """With one message, where a mismatched collective would end the processes."""
    first, second = (messages for _, messages, _ in two_ranks)
    assert first == second
    rows, derivatives = first[:9], first[9:]
    assert all("ranks hold rows of shapes" in m and "drop the last batch" in m for m in rows[:6])
    assert all("[[2, 3, 6], [2, 2, 6]]" in rows[i] for i in (0, 2))
    assert all("N >= 2" in message for message in rows[6:])
    assert all("without group=" in message for message in derivatives) and len(derivatives) == 7


def test_modules_gather_and_wrong_groups_are_named(two_ranks: list[Any]) -> None:
    whole = [module()(*batch(6, 2)) for module in (BarlowTwinsLoss, VICRegLoss)]
    for (values, messages), _, _ in two_ranks:
        assert all(relative_error(v, w) < 1e-10 for v, w in zip(values, whole, strict=True))
        assert all("not a member" in message for message in messages[:-1])
        assert "[2, 4, 5]" in messages[-1] and "[2, 4, 6]" in messages[-1]
