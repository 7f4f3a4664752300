"""The duality family against its definitions, and against each other."""

import math

import pytest
import torch
from torch import Tensor

from fastssl_kernels import (
    dimension_contrastive_loss,
    sample_contrastive_loss,
    vicreg_ctr_loss,
    vicreg_exp_loss,
    vicreg_loss,
)


def views(v: int = 2, n: int = 7, d: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(v, n, d, generator=generator, dtype=torch.float64)


def test_contrastive_losses_by_hand() -> None:
    z = torch.tensor([[1.0, 2.0], [3.0, -1.0]], dtype=torch.float64)
    # z z^T = [[5, 1], [1, 10]], z^T z = [[10, -1], [-1, 5]]
    assert sample_contrastive_loss([z]).item() == 2 and dimension_contrastive_loss([z]).item() == 2


def test_the_two_differ_by_their_diagonals() -> None:
    """Eq. 10: L_nc + sum_j ||column j||^4 = L_c + sum_i ||row i||^4, whatever the path."""
    z = views(v=3)
    rows = z.square().sum(2).square().sum(1).mean()
    columns = z.square().sum(1).square().sum(1).mean()
    for path in ("auto", "gram", "direct", "eager"):
        left = dimension_contrastive_loss(z, path=path) + columns
        right = sample_contrastive_loss(z, path=path) + rows
        assert left.item() == pytest.approx(right.item(), rel=1e-13)


def log_exp(cov: Tensor, temperature: float) -> float:
    """mean_i log sum_{j != i} exp(cov_ij / t), spelled out."""
    total = 0.0
    for i in range(len(cov)):
        terms = [math.exp(cov[i, j] / temperature) for j in range(len(cov)) if j != i]
        total += math.log(sum(terms)) / len(cov)
    return total


def test_vicreg_exp_and_ctr_by_their_formulas() -> None:
    z = views()
    without = {"cov_coeff": 0.0, "sim_coeff": 3.0, "std_coeff": 2.0, "gamma": 1.2}
    expected = sum(log_exp(torch.cov(view.T), 0.5) for view in z)
    with_covariance = vicreg_exp_loss(z, temperature=0.5, **(without | {"cov_coeff": 7.0}))
    assert with_covariance.item() == pytest.approx(
        vicreg_loss(z, **without).item() + 7 * expected, rel=1e-12
    )
    expected = sum(log_exp(torch.cov(view), 0.5) for view in z)
    hinge = torch.relu(1.2 - (z.var(2) + 1e-4).sqrt()).mean()
    invariance = (z[0] - z[1]).square().mean()
    found = vicreg_ctr_loss(z, temperature=0.5, **(without | {"cov_coeff": 7.0}))
    assert found.item() == pytest.approx(
        (3 * invariance + 2 * hinge).item() + 7 * expected, rel=1e-12
    )


def test_samples_need_two_dimensions() -> None:
    with pytest.raises(ValueError, match="D >= 2"):
        vicreg_ctr_loss(views(d=1), temperature=1.0)
    assert sample_contrastive_loss(views(d=1)).isfinite()
