"""Drop-in modules beside lightly's: arguments, values, gradients, errors, memory bank."""

import inspect

import pytest
import torch
from torch import Tensor

import fastssl_kernels
from fastssl_kernels import BarlowTwinsLoss, NTXentLoss, VICRegLoss, info_nce_loss
from tests.helpers.numerics import relative_error, value_and_grads

MODULES = ("BarlowTwinsLoss", "NTXentLoss", "VICRegLoss")


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("name", MODULES)
def test_arguments_are_lightly_s(name: str) -> None:
    """Names, order and defaults, of the constructor and of the call."""
    theirs = getattr(pytest.importorskip("lightly.loss"), name)
    ours = getattr(fastssl_kernels, name)
    for function in ("__init__", "forward"):
        pair = [inspect.signature(getattr(m, function)).parameters for m in (ours, theirs)]
        found, wanted = ([(p.name, p.default) for p in one.values()] for one in pair)
        assert found == wanted
    assert ours().state_dict().keys() == theirs().state_dict().keys()


def test_arguments_in_lightly_s_positions() -> None:
    """Without lightly: a bank's size comes second, and was once taken for gather_distributed."""
    loss = NTXentLoss(0.2, 0, True)
    assert (loss.temperature, loss.memory_bank_size, loss.gather_distributed) == (0.2, None, True)
    assert NTXentLoss(0.2, (4, 3)).bank.shape == (4, 3)
    barlow, vicreg = BarlowTwinsLoss(0.1, True), VICRegLoss(1.0, 2.0, 3.0, True, 0.1)
    assert (barlow.lambda_param, barlow.gather_distributed) == (0.1, True)
    assert (vicreg.lambda_param, vicreg.mu_param, vicreg.nu_param) == (1.0, 2.0, 3.0)
    assert (vicreg.gather_distributed, vicreg.eps) == (True, 0.1)


@pytest.mark.parametrize("name", MODULES)
def test_unknown_arguments_are_named(name: str) -> None:
    with pytest.raises(TypeError, match="abs"):
        getattr(fastssl_kernels, name)(abs=True)
    with pytest.raises(ValueError, match="gather_distributed is 4096; pass True or False"):
        getattr(fastssl_kernels, name)(gather_distributed=4096)


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (64, r"memory_bank_size is 64; wanted 0, or \(M, D\)"),
        ((64,), r"wanted 0, or \(M, D\)"),
        ((64, 0), r"wanted 0, or \(M, D\)"),
        ((4, 4, 4), r"wanted 0, or \(M, D\)"),
        ((-1, 4), r"wanted 0, or \(M, D\)"),
    ],
)
def test_other_bank_sizes_are_refused(size: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        NTXentLoss(memory_bank_size=size)  # type: ignore[arg-type]


@pytest.mark.parametrize("temperature", [0.0, 1e-9, -1e-9, float("nan")])
def test_temperatures_near_zero_are_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature"):
        NTXentLoss(temperature)


@pytest.mark.parametrize("name", MODULES)
def test_gathering_needs_torch_s_distributed_package(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no distributed package"):
        getattr(fastssl_kernels, name)(gather_distributed=True)
    getattr(fastssl_kernels, name)()


@pytest.mark.parametrize("temperature", [0.1, 1.0, 10.0, -0.5])
@pytest.mark.parametrize("shape", [(1, 1), (1, 16), (2, 1), (5, 16)])
def test_nt_xent_has_lightly_s_values(shape: tuple[int, int], temperature: float) -> None:
    """One image and one dimension too, and temperatures below 0, which repel views."""
    lightly = pytest.importorskip("lightly.loss")
    inputs = [draw(*shape), draw(*shape).flip(0) + 0.5]
    ours, theirs = NTXentLoss(temperature), lightly.NTXentLoss(temperature)
    found, wanted = (value_and_grads(loss, inputs, torch.float64) for loss in (ours, theirs))
    for x, y in zip(found, wanted, strict=True):
        assert (x - y).norm() <= 1e-12 * (1 + y.norm())


@pytest.mark.parametrize("size", [1, 4, 7, 8])
def test_a_memory_bank_is_lightly_s(size: int) -> None:
    """Batches of 3 into banks that they divide or not; the last call stores nothing."""
    lightly = pytest.importorskip("lightly.loss")
    ours, theirs = NTXentLoss(0.2, (size, 5)), lightly.NTXentLoss(0.2, (size, 5))
    assert torch.allclose(ours.bank.norm(dim=1), torch.ones(size))
    theirs.memory_bank.bank.copy_(ours.bank)
    for step in range(5):
        views = [draw(3 + step, 5)[:3], draw(9 + step, 5)[:3]]
        found, wanted = (value_and_grads(loss, views, torch.float32) for loss in (ours, theirs))
        assert all(relative_error(x, y) < 1e-5 for x, y in zip(found, wanted, strict=True)), step
        assert torch.allclose(ours.bank, theirs.memory_bank.bank)
        assert int(ours.bank_ptr) == int(theirs.memory_bank.bank_ptr)
    before = ours.bank.clone()
    ours(draw(3, 5), draw(5, 3).T)
    assert torch.equal(before, ours.bank)


def test_a_bank_s_loss_by_the_formula() -> None:
    """-log exp(q.k / t) / (exp(q.k / t) + sum_b exp(q.b / t)), MoCo's eq. 1."""
    loss = NTXentLoss(0.3, (6, 4)).double()
    q, k = draw(3, 4).double(), draw(4, 3).T.double()
    q, k = q / q.norm(dim=1, keepdim=True), k / k.norm(dim=1, keepdim=True)
    positive, negative = ((q * k).sum(1) / 0.3).exp(), (q @ loss.bank.T / 0.3).exp().sum(1)
    expected = -(positive / (positive + negative)).log().mean()
    assert relative_error(loss(7 * q, 2 * k), expected) < 1e-12
    assert loss(q, -k) > loss(q, k)
    # a queue of further negatives, beside the batch's other keys, is info_nce_loss's
    queue = info_nce_loss(q, torch.cat([k, loss.bank]), temperature=0.3, symmetric=False)
    assert queue > loss(q, k)


def test_a_bank_names_views_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"wanted \(N, 4\)"):
        NTXentLoss(0.3, (6, 4))(draw(3, 5), draw(3, 5))


def test_a_bank_moves_with_its_module() -> None:
    loss = NTXentLoss(0.3, (6, 4))
    assert loss.to(torch.float64).bank.dtype == torch.float64
    assert loss.to("meta").bank.device.type == "meta"


def test_vicreg_raises_what_lightly_raises() -> None:
    """An AssertionError there, a ValueError here: the error is both."""
    for views in ((draw(1, 4), draw(1, 4)), (draw(2, 4), draw(2, 3))):
        for kind in (AssertionError, ValueError):
            with pytest.raises(kind, match="VICRegLoss: views"):
                VICRegLoss()(*views)
