"""The conventions table of kernels/README.md: its cells, as formulas, are the losses that it says.

Each column's cells are read from the table and put into a plain formula, which must equal our
function where it has an argument for them, and lightly itself.
"""

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastssl_kernels import barlow_twins_loss, vicreg_loss

README = Path(__file__).parents[2] / "kernels" / "README.md"
COLUMNS = ("fastssl_kernels", "official code", "lightly", "solo-learn", "stable-pretraining")


def table() -> dict[str, dict[str, str]]:
    """Column -> row -> cell."""
    section = README.read_text().split("### Conventions")[1].split("###")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert tuple(header[1:]) == COLUMNS
    return {name: {row[0]: row[i] for row in rows} for i, name in enumerate(header) if i}


def number(cell: str) -> float:
    return float(re.search(r"[\d.]+(e-\d+)?", cell)[0])  # type: ignore[index]


def standardized(z: Tensor, cell: str) -> Tensor:
    """Columns by a cell such as "biased, eps 1e-5"."""
    eps, biased = number(cell), cell.startswith("biased")
    variance = z.var(0, unbiased=not biased)
    scale = variance.sqrt() + eps if "deviation" in cell else (variance + eps).sqrt()
    return (z - z.mean(0)) / scale


def barlow(cells: dict[str, str], a: Tensor, b: Tensor) -> Tensor:
    """The formula with one column's conventions."""
    c = standardized(a, cells["Barlow: variance"]).T @ standardized(b, cells["Barlow: variance"])
    c = c / len(a)
    on, diagonal = (c.diagonal() - 1).square().sum(), c.diagonal().square().sum()
    off = number(cells["Barlow: weight off the diagonal"]) * (c.square().sum() - diagonal)
    return number(cells["Barlow: factor of the loss"]) * (on + off)


def vicreg(cells: dict[str, str], a: Tensor, b: Tensor) -> Tensor:
    """With weights 25, 25, 1, the defaults of all."""
    variance, eps = cells["VICReg: variance"], number(cells["VICReg: variance"])
    views = []
    for z in (a, b):
        std = (z.var(0, unbiased=variance.startswith("unbiased")) + eps).sqrt()
        cov = (z - z.mean(0)).T @ (z - z.mean(0)) / (len(z) - 1)
        off = (cov.square().sum() - cov.diagonal().square().sum()) / len(cov)
        views.append((F.relu(1 - std).mean(), off))
    (hinge_a, off_a), (hinge_b, off_b) = views
    hinge = hinge_a + hinge_b
    if cells["VICReg: variance term"].startswith("mean"):
        hinge = hinge / 2
    assert cells["VICReg: covariance term"] == "sum of the two views, / D"
    return 25 * F.mse_loss(a, b) + 25 * hinge + off_a + off_b


def views() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, 12, 5, generator=generator, dtype=torch.float64)
    return z * torch.tensor([0.02, 0.3, 0.7, 1.0, 2.0], dtype=torch.float64)  # eps and hinge count


@pytest.mark.parametrize("column", COLUMNS[:4])
def test_barlow_by_the_cells_of_a_column(column: str) -> None:
    """Of ours with that column's weight and eps, times its factor."""
    cells, z = table()[column], views()
    found = number(cells["Barlow: factor of the loss"]) * barlow_twins_loss(
        z,
        lambd=number(cells["Barlow: weight off the diagonal"]),
        eps=number(cells["Barlow: variance"]),
    )
    assert found.item() == pytest.approx(barlow(cells, *z).item(), rel=1e-12)


def test_barlow_of_an_unbiased_deviation_is_not_offered() -> None:
    """stable-pretraining's C is (N - 1) / N of ours, up to eps, so equal views cost D / N^2."""
    cells, z = table()["stable-pretraining"], views()
    assert cells["Barlow: variance"] == "unbiased, eps 1e-5 on the deviation; not offered"
    on_diagonal = barlow({**cells, "Barlow: weight off the diagonal": "0"}, z[0], z[0])
    assert on_diagonal.item() == pytest.approx(5 / 12**2, rel=0.02)
    assert barlow(cells, *z).item() != pytest.approx(barlow_twins_loss(z, lambd=5e-3).item())


@pytest.mark.parametrize("column", COLUMNS)
def test_vicreg_by_the_cells_of_a_column(column: str) -> None:
    """Of ours with that column's eps; a sum over views is twice the weight."""
    cells, z = table()[column], views()
    twice = 2 if cells["VICReg: variance term"].startswith("sum") else 1
    found = vicreg_loss(z, std_coeff=25.0 * twice, eps=number(cells["VICReg: variance"]))
    assert found.item() == pytest.approx(vicreg(cells, *z).item(), rel=1e-12)


def test_our_column_is_our_defaults() -> None:
    cells, z = table()["fastssl_kernels"], views()
    assert barlow_twins_loss(z).item() == pytest.approx(barlow(cells, *z).item(), rel=1e-12)
    assert vicreg_loss(z).item() == pytest.approx(vicreg(cells, *z).item(), rel=1e-12)


def test_lightly_s_column_is_lightly() -> None:
    lightly = pytest.importorskip("lightly.loss")
    cells, z = table()["lightly"], views()
    assert lightly.BarlowTwinsLoss()(*z).item() == pytest.approx(barlow(cells, *z).item())
    assert lightly.VICRegLoss()(*z).item() == pytest.approx(vicreg(cells, *z).item())


def test_every_cell_is_filled() -> None:
    for column, cells in table().items():
        assert all(cells.values()) and "not checked" not in cells.values(), column
        assert {"Barlow: statistics over ranks", "Barlow: gradient over ranks"} <= cells.keys()
