"""lightly's losses beside ours, over the sizes that lightly's public tests use.

Its releases ship no tests, so the oracle is the installed library, and the closed forms that those
tests state. lightly's test asks VICReg to equal the official code to the bit; here the tolerance is
that of rounding.

Shapes: N batch, D embedding.
"""

import math
from typing import Any

import lightly.loss
import pytest
import torch
from lightly.loss.emp_ssl_loss import tcr_loss
from torch import Tensor
from torch import distributed as dist
from torch.testing import assert_close

import fastssl_kernels

MODULES = ("NTXentLoss", "BarlowTwinsLoss", "VICRegLoss")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def both(name: str, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """Our module of this name, and lightly's."""
    modules = (getattr(fastssl_kernels, name), getattr(lightly.loss, name))
    return tuple(module(*args, **kwargs) for module in modules)


def views(*shape: int) -> list[Tensor]:
    return [torch.randn(shape, requires_grad=True) for _ in range(2)]


def check(ours: Any, theirs: Any, inputs: list[Tensor], **tolerance: float) -> None:
    """Value and gradients, theirs computed in float64."""
    loss, expected = ours(*inputs), theirs(*(z.double() for z in inputs)).float()
    assert_close(loss, expected, **tolerance)
    inputs = [z for z in inputs if z.requires_grad]
    grads = torch.autograd.grad(loss, inputs)
    for grad, want in zip(grads, torch.autograd.grad(expected, inputs), strict=True):
        assert_close(grad, want, **tolerance)


def check_symmetry(module: Any, inputs: list[Tensor]) -> None:
    assert module(*inputs).item() == pytest.approx(module(*inputs[::-1]).item(), abs=1e-5)


@pytest.mark.parametrize("name", MODULES)
def test_gathering_without_distributed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_available", lambda: False)
    with pytest.raises(ValueError):
        getattr(fastssl_kernels, name)(gather_distributed=True)


@pytest.mark.parametrize("gather_distributed", [False, True])
@pytest.mark.parametrize("temperature", [0.1, 1, 10])
@pytest.mark.parametrize("d", [1, 2, 16, 64])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_nt_xent_values(n: int, d: int, temperature: float, gather_distributed: bool) -> None:
    settings = {"temperature": temperature, "gather_distributed": gather_distributed}
    ours, theirs = both("NTXentLoss", **settings)
    inputs = views(n, d)
    check(ours, theirs, inputs, atol=1e-5, rtol=1e-5)
    check_symmetry(ours, inputs)


@pytest.mark.parametrize("gather_distributed", [False, True])
@pytest.mark.parametrize("temperature", [0.1, 1, 7])
@pytest.mark.parametrize("memory_bank_size", [0, 1, 2, 8, 15, 16, 17])
@pytest.mark.parametrize("n", [1, 2, 8, 16])
def test_nt_xent_of_equal_directions(
    n: int, memory_bank_size: int, temperature: float, gather_distributed: bool
) -> None:
    """Every similarity is 1, so the loss is the logarithm of the number of candidates."""
    x, y = (torch.rand(n, 1) * torch.tensor([1.0, 2.0]) for _ in range(2))
    x.requires_grad_()
    bank = (memory_bank_size, 2) if memory_bank_size else 0
    ours = fastssl_kernels.NTXentLoss(temperature, bank, gather_distributed)
    candidates = memory_bank_size + 1 if memory_bank_size else 2 * n - 1
    for _ in range(memory_bank_size // n + 2):  # until the bank holds such rows only
        loss = ours(x, y)
    assert loss.item() == pytest.approx(math.log(candidates), abs=1e-5)


@pytest.mark.parametrize("memory_bank_size", [1, 8, 64])
@pytest.mark.parametrize("n", [1, 4, 19])
def test_nt_xent_with_a_bank(n: int, memory_bank_size: int) -> None:
    """From equal banks on, steps give equal losses and gradients."""
    ours, theirs = both("NTXentLoss", memory_bank_size=(memory_bank_size, 32))
    ours.bank.copy_(theirs.memory_bank.bank)
    theirs.double()
    for _ in range(3):
        check(ours, theirs, [*views(n, 32)[:1], torch.randn(n, 32)], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("d", [32, 1])
def test_nt_xent_symmetry(d: int) -> None:
    ours = fastssl_kernels.NTXentLoss(memory_bank_size=0)
    for n in range(1, 20):
        check_symmetry(ours, views(n, d))


def test_nt_xent_negative_temperature() -> None:
    ours, theirs = both("NTXentLoss", temperature=-1.0)
    for n in range(1, 20):
        check(ours, theirs, views(n, 32), atol=1e-5, rtol=1e-5)


def test_barlow_twins_values() -> None:
    check(*both("BarlowTwinsLoss"), views(32, 8196), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("lambda_param", [5e-3, 1.0])
@pytest.mark.parametrize("n", [2, 3, 32, 257])
def test_barlow_twins_sizes(n: int, lambda_param: float) -> None:
    check(*both("BarlowTwinsLoss", lambda_param=lambda_param), views(n, 48), atol=1e-4, rtol=1e-4)


def test_barlow_twins_is_affine_invariant() -> None:
    ours = fastssl_kernels.BarlowTwinsLoss()
    x = torch.randn(32, 1024)
    assert_close(ours(x, x), ours(x, 2 * x + 4), rtol=1e-5, atol=1e-8)  # torch.allclose's


@pytest.mark.parametrize("shape", [(2, 32), (3, 32), (128, 64), (2, 10, 32), (5, 3, 3, 16)])
def test_vicreg_values(shape: tuple[int, ...]) -> None:
    ours, theirs = both("VICRegLoss")
    inputs = views(*shape)
    check(ours, theirs, inputs)
    check_symmetry(ours, inputs)


@pytest.mark.parametrize("shapes", [((1, 32), (1, 32)), ((2, 32), (2, 16))])
def test_vicreg_errors(shapes: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(AssertionError):
        fastssl_kernels.VICRegLoss()(*(torch.randn(shape) for shape in shapes))


@pytest.mark.parametrize("shape", [(100, 512, 128), (4, 16, 32)])
def test_coding_rate(shape: tuple[int, ...]) -> None:
    z = torch.randn(shape, requires_grad=True)
    ours, theirs = fastssl_kernels.coding_rate(list(z), eps_sq=0.2), tcr_loss(z, eps=0.2)
    assert_close(ours, theirs)
    assert_close(*(torch.autograd.grad(loss, z)[0] for loss in (ours, theirs)))
