"""Shards of a batch: ranks together compute what one process computes on the whole batch."""

from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fastssl_kernels import (
    BarlowTwinsLoss,
    VICRegLoss,
    barlow_twins_loss,
    coding_rate,
    dimension_contrastive_loss,
    sample_contrastive_loss,
    second_moment_energy,
    vicreg_ctr_loss,
    vicreg_exp_loss,
    vicreg_loss,
)
from tests.helpers.gloo import on_ranks
from tests.helpers.numerics import relative_error

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


SLOW = [pytest.param(counts, marks=pytest.mark.slow) for counts in [(7,), (3, 3, 1), (4, 4, 4, 3)]]


@pytest.mark.parametrize("counts", [(5, 2), *SLOW], ids=str)
def test_ranks_equal_one_process(counts: tuple[int, ...]) -> None:
    """1 to 4 ranks, even and uneven, some with a single row: value and gradient to 1e-10."""
    views = 3
    whole = {}
    for name, loss in losses().items():
        w = weight().requires_grad_()
        value = loss(batch(sum(counts), views) @ w)
        whole[name] = (value.detach(), *torch.autograd.grad(value, w))
    for found in on_ranks(len(counts), shared_step, counts, views):
        for name, (value, gradient) in whole.items():
            assert relative_error(found[name][0], value) < 1e-10, name
            assert relative_error(found[name][1], gradient) < 1e-10, name


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


def test_modules_gather_and_wrong_groups_are_named() -> None:
    whole = [module()(*batch(6, 2)) for module in (BarlowTwinsLoss, VICRegLoss)]
    for values, messages in on_ranks(2, other_steps):
        assert all(relative_error(v, w) < 1e-10 for v, w in zip(values, whole, strict=True))
        assert all("not a member" in message for message in messages[:-1])
        assert "[2, 4, 5]" in messages[-1] and "[2, 4, 6]" in messages[-1]
