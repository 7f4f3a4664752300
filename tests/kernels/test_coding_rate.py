"""The coding rate: by hand, by both sides of Sylvester's identity, by the official loop."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from fastssl_kernels import coding_rate, coding_rate_reference
from tests.helpers.numerics import assert_within_budget


def unit_rows(v: int, n: int, d: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(v, n, d, generator=generator, dtype=torch.float64)
    return z / z.norm(dim=2, keepdim=True)


def official(views: Tensor, eps: float = 0.2) -> Tensor:
    """EMP-SSL's loop over views: logdet of a D x D matrix each."""
    rates = []
    for z in views:
        w = z.T
        p, m = w.shape
        rates.append(torch.logdet(torch.eye(p, dtype=z.dtype) + p / (m * eps) * w @ w.T) / 2)
    return sum(rates) / len(rates)


def test_by_hand() -> None:
    # Orthogonal rows of lengths 1 and 2 with N = D = 2, eps_sq = 0.5: a = 2, det = (1 + 2)(1 + 8).
    z = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    for path in ("gram", "direct", "eager", "auto"):
        rate = coding_rate([z, z], eps_sq=0.5, path=path)
        assert rate.item() == pytest.approx(0.5 * math.log(27), rel=1e-14)


@pytest.mark.parametrize("shape", [(3, 5, 11), (2, 11, 5), (1, 7, 7), (2, 2, 1)])
def test_equals_the_official_loop(shape: tuple[int, int, int]) -> None:
    x = unit_rows(*shape).requires_grad_()
    expected = official(x)
    (gradient,) = torch.autograd.grad(expected, x)
    for path in ("gram", "direct", "eager", "auto"):
        found = coding_rate(x, path=path)
        assert found.item() == pytest.approx(expected.item(), rel=1e-12)
        torch.testing.assert_close(*torch.autograd.grad(found, x), gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("path", ["gram", "direct", "auto"])
def test_within_budget(path: str) -> None:
    for shape in [(2, 33, 70), (3, 70, 33), (1, 5, 129)]:
        rate = partial(coding_rate, path=path)
        assert_within_budget(rate, coding_rate_reference, [unit_rows(*shape)], torch.float32)


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_scales_constant_columns_and_zero_rows(scale: float) -> None:
    for shape in [(2, 9, 70), (2, 70, 9)]:
        x = unit_rows(*shape)
        x[..., 4] = 1
        x[:, 7] = 0
        assert_within_budget(coding_rate, coding_rate_reference, [x * scale], torch.float32)


def test_one_cholesky_for_all_views(monkeypatch: pytest.MonkeyPatch) -> None:
    """The smaller side, once: (V, N, N) for N < D, (V, D, D) for D < N."""
    seen = []
    cholesky = torch.linalg.cholesky_ex

    def watched(matrix: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(tuple(matrix.shape))
        return cholesky(matrix)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", watched)
    coding_rate(unit_rows(6, 5, 11))
    coding_rate(unit_rows(6, 11, 5))
    assert seen == [(6, 5, 5), (6, 5, 5)]
