"""Each criterion against its formula written out with an SVD, on spectra that are known, and the
queue against the rows it should contain."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from fastssl.evaluation.collapse import SpectrumQueue
from fastssl.evaluation.spectrum import (
    SpectrumWarning,
    alpha_req,
    effective_rank,
    feature_std,
    lidar,
    rankme,
    singular_values,
)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def entropy_rank(p: Tensor) -> float:
    p = p[p > 0]
    return float(torch.exp(-(p * p.log()).sum()))


def with_spectrum(sigma: Tensor, rows: int = 500) -> Tensor:
    """A matrix (rows, len(sigma)) of mean 0 with these singular values."""
    u = noise(rows, len(sigma)).double()
    u = torch.linalg.qr(u - u.mean(0))[0]
    v = torch.linalg.qr(noise(len(sigma), len(sigma), seed=1).double())[0]
    return u * sigma.double() @ v.T


@pytest.mark.parametrize("shape", [(50, 7), (7, 50), (31, 31)])
@pytest.mark.filterwarnings("ignore::fastssl.evaluation.spectrum.SpectrumWarning")
def test_rankme_is_its_formula(shape: tuple[int, int]) -> None:
    z = noise(*shape)
    sigma = torch.linalg.svdvals(z.double())
    torch.testing.assert_close(singular_values(z), sigma)
    assert rankme(z) == pytest.approx(entropy_rank(sigma / sigma.sum() + 1e-7), rel=1e-6)


@pytest.mark.parametrize("shape", [(50, 7), (7, 50)])
def test_effective_rank_is_its_formula(shape: tuple[int, int]) -> None:
    z = noise(*shape) + 3
    sigma = torch.linalg.svdvals(z.double() - z.double().mean(0))
    sigma = sigma[sigma > 1e-7 * sigma[0]]  # centred, 7 rows span 6 directions
    assert effective_rank(z) == pytest.approx(entropy_rank(sigma / sigma.sum()), rel=1e-6)


def test_known_ranks() -> None:
    for rank in (1, 8, 32):
        z = with_spectrum(torch.cat([torch.ones(rank), torch.zeros(32 - rank)]))
        assert rankme(z) == pytest.approx(rank, rel=1e-4)
        assert effective_rank(z + 5) == pytest.approx(rank, rel=1e-4)
    white = noise(20_000, 64)
    assert rankme(white) == pytest.approx(64, rel=0.01)
    assert 0 <= alpha_req(white) < 0.1  # 0, but for what 20,000 samples spread it


def test_features_that_do_not_differ_have_no_rank() -> None:
    one_point = torch.full((64, 8), 0.1) * torch.linspace(1, 2, 8)
    assert rankme(one_point) == pytest.approx(1, abs=1e-4)
    assert effective_rank(one_point) == 0 == lidar(one_point.view(16, 4, 8))
    assert rankme(torch.zeros(64, 8)) == 0
    assert alpha_req(one_point) == math.inf
    assert feature_std(one_point) < 1e-6


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.5])
@pytest.mark.parametrize("dimensions", [20, 150])
def test_alpha_of_a_power_law_is_its_exponent(alpha: float, dimensions: int) -> None:
    j = torch.arange(1, dimensions + 1).double()
    assert alpha_req(with_spectrum(j ** (-alpha / 2)) + 4) == pytest.approx(alpha, rel=1e-6)


def test_alpha_is_the_weighted_fit_of_ranks_4_to_100() -> None:
    z = noise(400, 130) * torch.linspace(1, 3, 130)
    eigenvalues = torch.linalg.svdvals(z.double() - z.double().mean(0)) ** 2
    j = torch.arange(4, 101).double()
    x = torch.stack([-j.log(), torch.ones(97)], dim=1)
    root = j.rsqrt()[:, None]
    fit = torch.linalg.lstsq(root * x, root * eigenvalues[3:100, None].log()).solution
    assert alpha_req(z) == pytest.approx(float(fit[0]), rel=1e-6)


def test_alpha_of_a_spectrum_that_ends_is_infinite() -> None:
    assert alpha_req(with_spectrum(torch.cat([torch.ones(5), torch.zeros(40)]))) == math.inf


@pytest.mark.parametrize(("m", "q", "d"), [(40, 5, 12), (9, 3, 30)])
def test_lidar_is_its_formula(m: int, q: int, d: int) -> None:
    z = (noise(m, 1, d) + 0.5 * noise(m, q, d, seed=1)).double()
    means = z.mean(1)
    between = torch.cov(means.T)
    within = sum(torch.cov(views.T) for views in z) / m + 1e-4 * torch.eye(d)
    values, vectors = torch.linalg.eigh(within)
    root = vectors @ torch.diag(values.rsqrt()) @ vectors.T
    lam = torch.linalg.eigvalsh(root @ between @ root).clamp_min(0)
    expected = -sum(p * math.log(p) for p in (lam / lam.sum() + 1e-7).tolist())
    # between has rank 8 in 30 dimensions: the other 22 are rounding, in the fused form dropped
    assert lidar(z) == pytest.approx(math.exp(expected), rel=2e-4)


def test_lidar_counts_the_directions_that_tell_images_apart() -> None:
    """16 of 32 directions tell images apart, the others only their views: RankMe cannot see it."""
    images, views = noise(2000, 1, 32), noise(2000, 10, 32, seed=1)
    informative = torch.arange(32) < 16
    z = torch.where(informative, images + 0.1 * views, views)
    assert rankme(z.flatten(0, 1)) > 31
    assert lidar(z) == pytest.approx(16, rel=0.05)


@pytest.mark.parametrize("scale", [1e-3, 1e4])
def test_scale_does_not_matter(scale: float) -> None:
    z = noise(300, 20) * torch.linspace(0.2, 1, 20) + 0.5
    for criterion in (rankme, effective_rank, alpha_req, lambda z: float(feature_std(z))):
        assert criterion(z * scale) == pytest.approx(criterion(z), rel=1e-4)
    views = z.view(60, 5, 20)
    assert lidar(views * scale, delta=0) == pytest.approx(lidar(views, delta=0), rel=1e-4)


def test_too_few_samples_are_named() -> None:
    with pytest.warns(SpectrumWarning, match="10 samples in 64 dimensions: the samples bound it"):
        assert rankme(noise(10, 64)) <= 10


def test_bad_input_is_named() -> None:
    for criterion in (rankme, effective_rank, alpha_req):
        with pytest.raises(ValueError, match=r"wanted \(M, D\)"):
            criterion(torch.ones(3))
        with pytest.raises(ValueError, match="NaN or infinite"):
            criterion(torch.full((3, 2), math.nan))
    with pytest.raises(ValueError, match="Q >= 2 views"):
        lidar(torch.ones(5, 1, 3))


def test_isotropic_rows_have_spread_one() -> None:
    assert feature_std(noise(20_000, 16)) == pytest.approx(1, rel=0.02)
    assert feature_std(noise(20_000, 16).relu()) < 0.9  # a common direction


@pytest.mark.parametrize("batch", [3, 10, 25])
@pytest.mark.filterwarnings("ignore::fastssl.evaluation.spectrum.SpectrumWarning")
def test_the_queue_holds_the_last_rows(batch: int) -> None:
    queue = SpectrumQueue(4, "cpu", capacity=10)
    assert queue.report() == {}
    batches = [noise(batch, 4, seed=i) for i in range(7)]
    for z in batches:
        queue.update([z, torch.full_like(z, math.nan)])  # only the first view is stored
    last = torch.cat(batches)[-10:]
    stored = {tuple(row.tolist()) for row in queue.rows}
    assert stored == {tuple(row.tolist()) for row in last}
    report = queue.report()
    assert report["rankme"] == pytest.approx(rankme(last), rel=1e-9)
    assert report["feature_std"] == pytest.approx(float(feature_std(last)), rel=1e-6)


def test_a_restored_queue_continues_identically() -> None:
    through, stopped = SpectrumQueue(4, "cpu", capacity=10), SpectrumQueue(4, "cpu", capacity=10)
    for i in range(5):
        through.update([noise(7, 4, seed=i)])
        stopped.update([noise(7, 4, seed=i)])
        if i == 2:
            state = {k: v.clone() if isinstance(v, Tensor) else v
                     for k, v in stopped.state_dict().items()}  # fmt: skip
            stopped = SpectrumQueue(4, "cpu", capacity=10)
            stopped.load_state_dict(state)
    assert torch.equal(through.rows, stopped.rows)
    assert through.report() == stopped.report()
    with pytest.raises(ValueError, match="another backbone"):
        SpectrumQueue(5, "cpu", capacity=10).load_state_dict(state)


def test_reports_take_a_bounded_share_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a mock clock: a report that costs 1 s is followed by 99 s and more without one."""
    now = [100.0]

    def read() -> float:
        now[0] += 0.5  # a report reads it twice after its start: 1 s
        return now[0]

    monkeypatch.setattr("time.perf_counter", read)
    queue = SpectrumQueue(4, "cpu", capacity=10)
    queue.update([noise(10, 4)])
    reported_at = []
    while now[0] < 500:
        if queue.report():
            reported_at.append(now[0])
    assert len(reported_at) > 3
    assert all(b - a >= 50 for a, b in pairwise(reported_at))
    assert queue.report(at_once=True)


def test_features_that_are_not_finite_give_no_report() -> None:
    queue = SpectrumQueue(4, "cpu", capacity=10)
    queue.update([torch.full((10, 4), math.nan)])
    assert queue.report() == {}
