"""One row, no rows, one column: what the formula gives, or an error that says what is wanted."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastssl_kernels import (
    BarlowTwinsLoss,
    NTXentLoss,
    VICRegLoss,
    barlow_twins_loss,
    coding_rate,
    coding_rate_reference,
    dimension_contrastive_loss,
    info_nce_loss,
    info_nce_loss_reference,
    nt_xent_loss,
    nt_xent_loss_reference,
    sample_contrastive_loss,
    second_moment_energy,
    second_moment_energy_reference,
    vicreg_ctr_loss,
    vicreg_exp_loss,
    vicreg_loss,
)
from tests.helpers.numerics import relative_error, value_and_grads

PATHS = ("auto", "gram", "direct", "eager")
REFUSED: dict[str, Callable[..., Tensor]] = {
    "barlow": barlow_twins_loss,
    "vicreg": vicreg_loss,
    "exp": partial(vicreg_exp_loss, temperature=0.5),
    "ctr": partial(vicreg_ctr_loss, temperature=0.5),
    "module barlow": lambda z: BarlowTwinsLoss()(*z),
    "module vicreg": lambda z: VICRegLoss()(*z),
}


def views(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("width", [1, 5])
@pytest.mark.parametrize("path", PATHS)
def test_the_coding_rate_of_one_row(path: str, width: int) -> None:
    """1/2 log(1 + D |z|^2 / eps_sq), the determinant of a rank-one update."""
    z = views(2, 1, width)
    found = value_and_grads(partial(coding_rate, path=path), [z], torch.float64)
    wanted = value_and_grads(
        lambda z: (1 + width * z.square().sum((1, 2)) / 0.2).log().mean() / 2, [z], torch.float64
    )
    assert all(relative_error(x, y) < 1e-12 for x, y in zip(found, wanted, strict=True))


@pytest.mark.parametrize("rows", [0, 1])
@pytest.mark.parametrize("path", PATHS)
def test_sums_of_one_row_and_of_none(path: str, rows: int) -> None:
    """Sums over rows: without rows 0, and with one row the formula."""
    z = views(3, rows, 4)
    for pairs, diagonal in ((True, True), (True, False), (False, True), (False, False)):
        settings = {"pairs": pairs, "diagonal": diagonal}
        found, wanted = (
            value_and_grads(partial(op, **settings), [z], torch.float64)
            for op in (partial(second_moment_energy, path=path), second_moment_energy_reference)
        )
        assert all(relative_error(x, y) < 1e-12 for x, y in zip(found, wanted, strict=True))
        assert rows or found[0] == 0
    of_samples = value_and_grads(partial(sample_contrastive_loss, path=path), [z], torch.float64)
    assert all(x.abs().sum() < 1e-12 for x in of_samples)  # one sample has no other
    of_dimensions = dimension_contrastive_loss(z, path=path)
    c = z.mT @ z
    off = c - torch.diag_embed(c.diagonal(dim1=1, dim2=2))
    assert relative_error(of_dimensions, off.square().sum() / 3) < 1e-12


@pytest.mark.parametrize("path", PATHS)
def test_the_coding_rate_of_no_rows(path: str) -> None:
    """The determinant of an empty matrix is 1."""
    rate = partial(coding_rate, path=path)
    value, gradient = value_and_grads(rate, [views(2, 0, 3)], torch.float64)
    assert value == 0 and gradient.shape == (2, 0, 3)
    assert coding_rate_reference(views(2, 0, 3)) == 0


@pytest.mark.parametrize("count", [2, 3])
def test_nt_xent_of_one_image(count: int) -> None:
    """0 for two views, where the only other row is the positive; the formula for three."""
    z = views(count, 1, 4)
    found = value_and_grads(nt_xent_loss, [z], torch.float64)
    wanted = value_and_grads(nt_xent_loss_reference, [z], torch.float64)
    assert all((x - y).norm() < 1e-12 for x, y in zip(found, wanted, strict=True))
    assert count > 2 or float(found[0]) == pytest.approx(0, abs=1e-12)


def test_the_mean_over_no_rows_is_nan_as_torch_s() -> None:
    empty = views(2, 0, 4)
    losses: list[Callable[[Tensor], Tensor]] = [
        nt_xent_loss,
        nt_xent_loss_reference,
        lambda z: NTXentLoss()(*z),
        lambda z: NTXentLoss(memory_bank_size=(5, 4))(*z),
        lambda z: info_nce_loss(z[0], z[1], temperature=0.5),
        lambda z: info_nce_loss(z[0], views(3, 4), temperature=0.5, symmetric=False),
        lambda z: info_nce_loss_reference(z[0], z[1], temperature=0.5),
    ]
    assert F.cross_entropy(empty[0], torch.empty(0, dtype=torch.int64)).isnan()
    for loss in losses:
        value, gradient = value_and_grads(loss, [empty], torch.float64)
        assert value.isnan() and gradient.shape == empty.shape


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("rows", [0, 1])
def test_statistics_of_a_batch_need_two_rows(name: str, rows: int) -> None:
    """The official Barlow Twins raises a ValueError in BatchNorm; VICReg's variance is 0 / 0."""
    with pytest.raises(ValueError, match=f"{rows}, 4.*N >= 2"):
        REFUSED[name](views(2, rows, 4))


@pytest.mark.parametrize("value", [0.0, -0.5, math.nan])
def test_a_temperature_that_is_not_positive_is_named(value: float) -> None:
    z, t = views(2, 3, 4), torch.tensor(value, requires_grad=True)
    for call in (
        lambda: nt_xent_loss(z, temperature=t),
        lambda: info_nce_loss(z[0], z[1], temperature=t),
    ):
        with pytest.raises(ValueError, match="temperature is a tensor that is not positive"):
            call()
