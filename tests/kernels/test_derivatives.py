"""Derivatives beyond the first backward pass: right, or an error that names what to use instead."""

from collections.abc import Callable
from functools import partial
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastssl_kernels import (
    DIETHead,
    NTXentLoss,
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
from tests.helpers.numerics import relative_error

# torch's own forward-mode formulas are scripted, which torch 2.14 deprecates
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")

Loss = Callable[[Tensor], Tensor]
OVER_VIEWS: dict[str, Callable[..., Tensor]] = {
    "barlow": barlow_twins_loss,
    "barlow mean": partial(barlow_twins_loss, pairing="mean"),
    "vicreg": vicreg_loss,
    "coding rate": coding_rate,
    "energy": second_moment_energy,
    "energy self": partial(second_moment_energy, pairs=False, diagonal=False),
    "dimension": dimension_contrastive_loss,
    "sample": sample_contrastive_loss,
}
WITH_PATHS: dict[str, Loss] = {
    f"{name} {path}": partial(loss, path=path)
    for (name, loss), path in product(OVER_VIEWS.items(), ("gram", "direct", "auto", "eager"))
}
EAGER: dict[str, Loss] = {
    **{name: loss for name, loss in WITH_PATHS.items() if name.endswith("eager")},
    "exp": partial(vicreg_exp_loss, temperature=0.5),
    "ctr": partial(vicreg_ctr_loss, temperature=0.5),
}
BANK = NTXentLoss(0.4, (6, 3)).double()
HEADS = {rule: DIETHead(4, 3, optimizer=rule).double() for rule in (None, "adamw")}


def with_bank(z: Tensor) -> Tensor:
    BANK.bank = torch.eye(6, 3, dtype=torch.float64) + 0.1  # each call stores its keys
    return BANK(z[0], z[1])


CONTRASTIVE: dict[str, Loss] = {
    "nt-xent": lambda z: nt_xent_loss(z, temperature=0.4),
    "nt-xent squared": lambda z: nt_xent_loss(z, temperature=0.4, similarity="squared"),
    "info-nce": lambda z: info_nce_loss(z[0], z[1], temperature=0.4),
    "info-nce queue": lambda z: info_nce_loss(
        z[0], z[1:].flatten(0, 1), temperature=0.4, symmetric=False
    ),
    "repelling": lambda z: NTXentLoss(-0.4)(z[0], z[1]),
    "bank": with_bank,
}
LABELS = torch.tensor([0, 2, 1, 3])


FIRST_ORDER: dict[str, Loss] = {
    "linear cross-entropy": lambda z: linear_cross_entropy(z[0], z[1], LABELS),
    "linear cross-entropy weight": lambda z: linear_cross_entropy(z[0].detach(), z[1], LABELS),
    "diet": lambda z: HEADS[None](z[0], LABELS),
    "fused diet": lambda z: HEADS["adamw"](z[0], LABELS),
}
FUSED = {k: v for k, v in WITH_PATHS.items() if k not in EAGER} | CONTRASTIVE | FIRST_ORDER


def views(v: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(v, 4, 3, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", [*WITH_PATHS, *CONTRASTIVE, "exp", "ctr"])
def test_second_derivatives_are_those_of_finite_differences(name: str) -> None:
    loss = (WITH_PATHS | CONTRASTIVE | EAGER)[name]
    z = views().requires_grad_()
    assert torch.autograd.gradgradcheck(loss, [z], fast_mode=True)


def test_a_learned_temperature_has_second_derivatives() -> None:
    t = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    z = views().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda z, t: nt_xent_loss(z, temperature=t), [z, t])


@pytest.mark.parametrize("name", ["barlow gram", "energy direct", "nt-xent"])
def test_third_derivatives_are_the_eager_ones(name: str) -> None:
    """Of the eager formula, or of the loss where it is eager itself."""

    def third(loss: Loss) -> Tensor:
        z = views().requires_grad_()
        (first,) = torch.autograd.grad(loss(z), z, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), z, create_graph=True)
        return torch.autograd.grad(second.sin().sum(), z)[0]

    from fastssl_kernels import nt_xent_loss_reference

    eager = {
        "barlow gram": partial(barlow_twins_loss, path="eager"),
        "energy direct": partial(second_moment_energy, path="eager"),
        "nt-xent": partial(nt_xent_loss_reference, temperature=0.4),
    }[name]
    assert relative_error(third((WITH_PATHS | CONTRASTIVE)[name]), third(eager)) < 1e-8


def test_a_gradient_penalty_in_low_precision_is_near_that_in_float64() -> None:
    """Backward of a gradient's norm, from bfloat16 embeddings."""

    def penalty(z: Tensor) -> Tensor:
        (first,) = torch.autograd.grad(vicreg_loss(z), z, create_graph=True)
        return torch.autograd.grad(first.float().square().sum(), z)[0]

    z = views().bfloat16()
    found, truth = penalty(z.clone().requires_grad_()), penalty(z.double().requires_grad_())
    assert found.dtype == torch.bfloat16 and relative_error(found, truth) < 0.02


def test_a_graph_of_the_gradient_costs_nothing_unless_it_is_used() -> None:
    """The same bits as without create_graph: the formula runs in the second backward pass only."""
    for loss in (WITH_PATHS | CONTRASTIVE).values():
        z = views().float().requires_grad_()
        (plain,) = torch.autograd.grad(loss(z), z)
        (graph,) = torch.autograd.grad(loss(z), z, create_graph=True)
        assert torch.equal(plain, graph.detach()) and graph.requires_grad


@pytest.mark.parametrize("name", FIRST_ORDER)
def test_second_derivatives_that_are_missing_raise(name: str) -> None:
    z = views().requires_grad_()
    (first,) = torch.autograd.grad(FIRST_ORDER[name](z), z, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"second derivatives.*use .*reference"):
        torch.autograd.grad(first.square().sum(), z)


@pytest.mark.parametrize("name", FUSED)
def test_forward_mode_raises_with_what_to_use(name: str) -> None:
    loss = FUSED[name]
    z = views()
    direction = torch.ones_like(z)
    wanted = "not implemented; use .*(path='eager'|reference)"
    with pytest.raises(NotImplementedError, match=wanted):
        torch.func.jvp(loss, (z,), (direction,))
    for primal in (z, z.clone().requires_grad_()):
        with pytest.raises(NotImplementedError, match=wanted), forward_ad.dual_level():
            loss(forward_ad.make_dual(primal, direction))


@pytest.mark.parametrize("name", EAGER)
def test_forward_mode_of_the_eager_path(name: str) -> None:
    loss, z = EAGER[name], views()
    direction = torch.cos(torch.arange(z.numel(), dtype=z.dtype)).view_as(z)
    _, tangent = torch.func.jvp(loss, (z,), (direction,))
    assert relative_error(tangent, (torch.func.grad(loss)(z) * direction).sum()) < 1e-12
    with forward_ad.dual_level():
        dual = loss(forward_ad.make_dual(z, direction))
        assert relative_error(forward_ad.unpack_dual(dual).tangent, tangent) < 1e-12


@pytest.mark.parametrize("name", ["barlow gram", "coding rate direct", "nt-xent", "info-nce"])
def test_a_tangent_of_the_incoming_gradient_raises(name: str) -> None:
    z = views().requires_grad_()
    loss = FUSED[name](z)
    with pytest.raises(NotImplementedError, match="forward-mode"), forward_ad.dual_level():
        upstream = forward_ad.make_dual(torch.ones_like(loss), torch.ones_like(loss))
        torch.autograd.grad(loss, z, upstream)
