"""VICReg: by hand, by the official formula, by lightly; and its kernels as compiled."""

from itertools import product

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastssl_kernels import VICRegLoss, vicreg_loss
from tests.helpers.numerics import relative_error
from tests.helpers.offline_compile import Kernel, assert_ships, compile_offline


def official(x: Tensor, y: Tensor) -> Tensor:
    """The official code's three terms at its default coefficients 25, 25, 1."""
    invariance = F.mse_loss(x, y)
    x, y = x - x.mean(0), y - y.mean(0)
    std_x, std_y = torch.sqrt(x.var(0) + 0.0001), torch.sqrt(y.var(0) + 0.0001)
    std = torch.mean(F.relu(1 - std_x)) / 2 + torch.mean(F.relu(1 - std_y)) / 2
    off = 0.0
    for z in (x, y):
        cov = z.T @ z / (len(z) - 1)
        off = off + cov.flatten()[:-1].view(len(cov) - 1, -1)[:, 1:].square().sum() / len(cov)
    return 25 * invariance + 25 * std + off


def fixed(views: int = 2, n: int = 11, d: int = 6) -> Tensor:
    """A fixed tensor without a random generator: columns on both sides of the hinge."""
    index = torch.arange(views * n * d, dtype=torch.float64)
    x = (torch.sin(index * 1.7) + 0.5 * torch.cos(index**1.1)).view(views, n, d)
    return x * torch.linspace(0.3, 3, d, dtype=torch.float64)


def test_by_hand() -> None:
    # a: columns of variance 2 and covariance 2; b: a column of variance 0, and one of 0.5.
    a = torch.tensor([[1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)
    b = torch.tensor([[2.0, 0.5], [2.0, -0.5]], dtype=torch.float64)
    for path in ("gram", "direct", "eager", "auto"):
        terms = [
            vicreg_loss(
                [a, b], sim_coeff=s, std_coeff=v, cov_coeff=c, gamma=1.5, eps=0.0, path=path
            ).item()
            for s, v, c in torch.eye(3).tolist()
        ]
        assert terms[0] == pytest.approx((1 + 9 + 0.25 + 0.25) / 4)
        hinge = (2 * (1.5 - 2**0.5) + 1.5 + (1.5 - 0.5**0.5)) / 4
        assert terms[1] == pytest.approx(hinge)
        assert terms[2] == pytest.approx(2 * 4 / 2)


@pytest.mark.parametrize("path", ["gram", "direct", "eager", "auto"])
def test_equals_the_official_formula(path: str) -> None:
    x = fixed().requires_grad_()
    expected, found = official(x[0], x[1]), vicreg_loss(x, path=path)
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    gradients = [torch.autograd.grad(loss, x)[0] for loss in (found, expected)]
    assert relative_error(*gradients) < 1e-12


def test_more_views() -> None:
    """Mean over pairs, mean over views, 2 / V times the sum over views."""
    x = fixed(views=3)
    pairs = [(x[0], x[1]), (x[0], x[2]), (x[1], x[2])]
    mean = sum(vicreg_loss(pair) for pair in pairs) / 3  # each view is in two of three pairs
    for path in ("gram", "direct", "eager", "auto"):
        assert vicreg_loss(x, path=path).item() == pytest.approx(mean.item(), rel=1e-12)


@pytest.mark.parametrize("shape", [(33, 17), (9, 3, 2, 5)])
def test_module_equals_lightly(shape: tuple[int, ...]) -> None:
    lightly = pytest.importorskip("lightly.loss")
    for keywords in ({}, {"lambda_param": 3.0, "mu_param": 2.0, "nu_param": 5.0, "eps": 0.01}):
        x = fixed(n=shape[0], d=torch.Size(shape[1:]).numel()).view(2, *shape).requires_grad_()
        expected = lightly.VICRegLoss(**keywords)(x[0], x[1])
        found = VICRegLoss(**keywords)(x[0], x[1])
        assert found.item() == pytest.approx(expected.item(), rel=1e-12)
        gradients = [torch.autograd.grad(loss, x)[0] for loss in (found, expected)]
        assert relative_error(*gradients) < 1e-12


def test_module_names_bad_shapes() -> None:
    with pytest.raises(ValueError, match=r"\(4, 3\), \(4, 2\)"):
        VICRegLoss()(torch.zeros(4, 3), torch.zeros(4, 2))


@pytest.mark.slow
def test_kernels_ship() -> None:
    """bf16 with D a multiple of 16 and not, fp32 where it is not: that takes more registers."""
    from fastssl_kernels._triton.columns import BLOCK_D, BLOCK_N

    vectors = ("mean_ptr", "diag_coef_ptr", "factors_ptr", "partial_ptr", "grad_ptr")
    weights = ("gamma", "eps", "invariance_weight", "hinge_weight", "diagonal_weight", "alpha")
    weights += ("diagonal_alpha", "invariance_grad")
    arguments = {
        "_columns_kernel": "z_ptr x_ptr mean_ptr diag_coef_ptr factors_ptr partial_ptr V N D gamma "
        "eps invariance_weight hinge_weight diagonal_weight alpha diagonal_alpha invariance_grad",
        "_gradient_kernel": "grad_ptr z_ptr p_ptr mean_ptr diag_coef_ptr factors_ptr out_ptr V N D",
    }
    types = {**dict.fromkeys(vectors, "*fp32"), **dict.fromkeys(weights, "fp32"), "V": "i32"}
    kernels = []
    inputs = (("bf16", "i32:16"), ("bf16", "i32"), ("fp32", "i32"))
    for name, cc, (element, size) in product(arguments, (80, 90, 100), inputs):
        own = dict.fromkeys(("z_ptr", "x_ptr", "p_ptr", "out_ptr"), f"*{element}")
        sizes = dict.fromkeys(("N", "D"), size)
        signature = {a: (types | own | sizes)[a] for a in arguments[name].split()}
        blocks = {"BLOCK_N": BLOCK_N, "BLOCK_D": BLOCK_D}
        kernels.append(Kernel(f"fastssl_kernels._triton.vicreg:{name}", signature, blocks, cc))
    for resources in compile_offline(kernels):
        assert_ships(resources, dot=False)
