"""RankMe against its formula written out, and on matrices whose rank is known."""

import pytest
import torch

from fastssl.spectrum import rankme


@pytest.mark.parametrize("shape", [(50, 7), (7, 50), (31, 31)])
def test_formula(shape: tuple[int, int]) -> None:
    z = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    sigma = torch.linalg.svdvals(z.double())
    p = sigma / sigma.sum() + 1e-7
    assert rankme(z) == pytest.approx(float(torch.exp(-(p * p.log()).sum())), rel=1e-6)


def test_known_ranks() -> None:
    orthogonal = torch.linalg.qr(torch.randn(64, 8))[0]
    assert rankme(orthogonal) == pytest.approx(8, rel=1e-4)
    assert rankme(torch.ones(64, 8)) == pytest.approx(1, rel=1e-4)


def test_shape_is_checked() -> None:
    with pytest.raises(ValueError, match=r"wanted \(M, D\)"):
        rankme(torch.ones(3))
