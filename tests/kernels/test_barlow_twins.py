"""Barlow Twins: by hand, by the official formula, by lightly; and its kernels as compiled."""

from itertools import combinations, product

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastssl_kernels import BarlowTwinsLoss, barlow_twins_loss
from tests.helpers.numerics import relative_error
from tests.helpers.offline_compile import Kernel, assert_ships, compile_offline


def official(za: Tensor, zb: Tensor, lambd: float = 0.0051) -> Tensor:
    """The paper's Algorithm 1, with the official code's BatchNorm and off-diagonal."""
    ha, hb = (F.batch_norm(z, None, None, training=True) for z in (za, zb))
    c = ha.T @ hb / len(ha)
    off = c.flatten()[:-1].view(len(c) - 1, len(c) + 1)[:, 1:]
    return (c.diagonal() - 1).square().sum() + lambd * off.square().sum()


def fixed(views: int = 2, n: int = 11, d: int = 6) -> Tensor:
    """A fixed tensor without a random generator: sines at incommensurate frequencies."""
    index = torch.arange(views * n * d, dtype=torch.float64)
    return (torch.sin(index * 1.7) + 0.5 * torch.cos(index**1.1)).view(views, n, d)


def test_by_hand() -> None:
    # Columns +-1: standardised they stay, up to eps. C = [[1, 0], [0, -1]] for these views.
    a = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)
    b = a * torch.tensor([1.0, -1.0], dtype=torch.float64)
    assert barlow_twins_loss([a, b], lambd=0.5, eps=0.0).item() == pytest.approx(4.0, abs=1e-12)
    # Swapped columns: C = [[0, 1], [1, 0]], so 1 + 1 on the diagonal and 2 lambd off it.
    for path in ("gram", "direct", "eager", "auto"):
        swapped = barlow_twins_loss([a, a.flip(1)], lambd=0.5, eps=0.0, path=path)
        assert swapped.item() == pytest.approx(3.0, abs=1e-12)


@pytest.mark.parametrize("path", ["gram", "direct", "eager", "auto"])
def test_equals_the_official_formula(path: str) -> None:
    x = fixed().requires_grad_()
    expected = official(x[0], x[1])
    found = barlow_twins_loss(x, path=path)
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    gradients = [torch.autograd.grad(loss, x)[0] for loss in (found, expected)]
    assert relative_error(*gradients) < 1e-12


def test_pairs_are_averaged_and_two_views_have_no_mean() -> None:
    x = fixed(views=4)
    each = [official(a, b, 0.1) for a, b in combinations(x, 2)]
    assert barlow_twins_loss(x, lambd=0.1).item() == pytest.approx(sum(each).item() / 6, rel=1e-12)
    both = [barlow_twins_loss(x[:2], pairing=pairing) for pairing in ("pairs", "mean")]
    assert torch.equal(*both)


def test_mean_pairing_by_the_formula() -> None:
    x = fixed(views=3)
    h = [(z - z.mean(0)) / (z.var(0, unbiased=False) + 1e-5).sqrt() for z in x]
    m = (h[0] + h[1] + h[2]) / 3
    on = sum(((a * m).mean(0) - 1).square().sum() for a in h) / 3
    c = m.T @ m / len(m)
    off = c.square().sum() - c.diagonal().square().sum()
    for path in ("gram", "direct", "eager", "auto"):
        found = barlow_twins_loss(x, lambd=0.1, pairing="mean", path=path)
        assert found.item() == pytest.approx((on + 0.1 * off).item(), rel=1e-12)


def test_module_equals_lightly() -> None:
    lightly = pytest.importorskip("lightly.loss")
    for keywords in ({}, {"lambda_param": 0.02}):
        x = fixed(n=33, d=17).requires_grad_()
        expected = lightly.BarlowTwinsLoss(**keywords)(x[0], x[1])
        found = BarlowTwinsLoss(**keywords)(x[0], x[1])
        assert found.item() == pytest.approx(expected.item(), rel=1e-12)
        gradients = [torch.autograd.grad(loss, x)[0] for loss in (found, expected)]
        assert relative_error(*gradients) < 1e-12


@pytest.mark.slow
def test_kernels_ship() -> None:
    """bf16 with D a multiple of 16 and not, fp32 where it is not: that takes more registers."""
    from fastssl_kernels._triton.barlow_twins import WARPS
    from fastssl_kernels._triton.columns import BLOCK_D, BLOCK_N, SLOTS

    vectors = ("mean_ptr", "rstd_ptr", "r_ptr", "scale_ptr", "coef_ptr", "grad_ptr", "loss_ptr")
    vectors += ("partial_ptr", "on_ptr", "energy_ptr")
    weights = ("eps", "diagonal", "weight", "alpha", "energy_weight")
    counts = ("V", "shared", "on_slots", "energy_slots")
    blocks = {"BLOCK_N": BLOCK_N, "BLOCK_D": BLOCK_D}
    arguments = {
        "_columns_kernel": "z_ptr h_ptr mean_ptr rstd_ptr r_ptr partial_ptr V N D eps diagonal "
        "weight",
        "_terms_kernel": "p_ptr h_ptr rstd_ptr r_ptr scale_ptr coef_ptr on_ptr on_slots energy_ptr "
        "energy_slots loss_ptr V N D alpha diagonal weight energy_weight",
        "_gradient_kernel": "grad_ptr z_ptr p_ptr mean_ptr scale_ptr coef_ptr out_ptr V N D shared",
    }
    constexprs = {
        "_columns_kernel": blocks,
        "_terms_kernel": {"SLOTS": SLOTS, **blocks},
        "_gradient_kernel": blocks,
    }
    types = {
        **dict.fromkeys(vectors, "*fp32"),
        **dict.fromkeys(weights, "fp32"),
        **dict.fromkeys(counts, "i32"),
    }
    kernels = []
    inputs = (("bf16", "i32:16"), ("bf16", "i32"), ("fp32", "i32"))
    for name, cc, (element, size) in product(arguments, (80, 90, 100), inputs):
        own = dict.fromkeys(("z_ptr", "h_ptr", "p_ptr", "out_ptr"), f"*{element}")
        sizes = dict.fromkeys(("N", "D"), size)
        signature = {a: (types | own | sizes)[a] for a in arguments[name].split()}
        warps = WARPS if name == "_columns_kernel" else 4
        kernel = f"fastssl_kernels._triton.barlow_twins:{name}"
        kernels.append(Kernel(kernel, signature, constexprs[name], cc, warps))
    for resources in compile_offline(kernels):
        assert_ships(resources, dot=False)
