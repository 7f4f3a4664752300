"""Each sampled parameter has torchvision's distribution, and depends on its key alone."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.random import default_rng
from torchvision.transforms import v2

from fastssl_pipelines.augment import Params, draw
from fastssl_pipelines.augment.sample_params import COLUMNS
from fastssl_pipelines.spec import View

stats = pytest.importorskip("scipy.stats")

MANY = 1_000_000
ALL = View(
    size=32,
    jitter=(0.4, 0.5, 0.6, 0.1),
    jitter_p=0.8,
    gray=0.2,
    blur=0.5,
    solarize=0.3,
    erase=0.25,
)


def drawn(view: View, height: int, width: int, count: int = MANY, seed: int = 1) -> Params:
    return draw(view, seed, 3, torch.arange(count), 1, height, width)


@pytest.fixture(scope="module")
def params() -> Params:
    return drawn(ALL, 48, 64)


def assert_same_distribution(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Chi-square on two samples of boxes (top, left, height, width), and on their sides alone."""
    for columns in (slice(0, 4), slice(2, 4)):
        both = [sample[:, columns].astype(np.int64) for sample in (ours, theirs)]
        code = np.concatenate(both) @ (64 ** np.arange(both[0].shape[1]))
        rows, which = np.unique(code, return_inverse=True)
        samples = np.split(which, [len(ours)])
        table = np.stack([np.bincount(sample, minlength=len(rows)) for sample in samples])
        rare = table.sum(0) * min(len(ours), len(theirs)) / table.sum() < 10  # pooled
        pooled = np.concatenate([table[:, ~rare], table[:, rare].sum(1, keepdims=True)], axis=1)
        pooled = pooled[:, pooled.sum(0) > 0]
        assert pooled.shape[1] > 2
        assert stats.chi2_contingency(pooled).pvalue > 1e-4


def crops(count: int, height: int, width: int, view: View, seed: int = 0) -> np.ndarray:
    """Ten attempts and the fallback, vectorised with numpy's own generator. (count, 4)"""
    rng = default_rng(seed)
    box = np.zeros((count, 4))
    left_over = np.ones(count, bool)
    for _ in range(10):
        rest = np.flatnonzero(left_over)
        area = height * width * rng.uniform(*view.scale, len(rest))
        ratio = np.exp(rng.uniform(*np.log(view.ratio), len(rest)))
        w, h = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
        fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
        top = rng.integers(0, np.maximum(height - h, 0) + 1)
        left = rng.integers(0, np.maximum(width - w, 0) + 1)
        box[rest[fits]] = np.stack([top, left, h, w], 1)[fits]
        left_over[rest[fits]] = False
    w, h = width, height
    if width / height < view.ratio[0]:
        h = round(width / view.ratio[0])
    elif width / height > view.ratio[1]:
        w = round(height * view.ratio[1])
    box[left_over] = ((height - h) // 2, (width - w) // 2, h, w)
    return box


def boxes(p: Params) -> np.ndarray:
    return p.table[:, :4].numpy()


@pytest.mark.parametrize(
    ("height", "width", "view"),
    [
        (7, 9, View(size=8)),
        (32, 32, View(size=32, scale=(0.2, 1.0))),
        (40, 5, View(size=8, scale=(0.08, 1.0))),  # too tall: mostly the fallback
        (5, 31, View(size=8)),  # too wide
        (6, 6, View(size=8, scale=(0.9, 1.0), ratio=(0.5, 2.0))),  # a square fallback at times
    ],
)
def test_joint_crop_boxes(height, width, view):
    assert_same_distribution(boxes(drawn(view, height, width)), crops(MANY, height, width, view))


def test_joint_crop_boxes_against_torchvision_itself():
    crop = v2.RandomResizedCrop(8, scale=(0.2, 1.0))
    image = torch.zeros(3, 6, 8)
    torch.manual_seed(0)
    theirs = [crop.make_params([image]) for _ in range(20_000)]
    theirs = np.array([[p["top"], p["left"], p["height"], p["width"]] for p in theirs])
    assert_same_distribution(boxes(drawn(View(size=8, scale=(0.2, 1.0)), 6, 8)), theirs)


def test_the_distribution_test_can_fail():
    wrong = boxes(drawn(View(size=8, scale=(0.081, 1.0)), 32, 32))  # 0.08 is right
    with pytest.raises(AssertionError):
        assert_same_distribution(wrong, crops(MANY, 32, 32, View(size=8)))


def test_patches_are_of_fixed_size_and_uniform():
    p = drawn(View(size=32, patch=5), 8, 9)
    assert (p["height"] == 5).all() and (p["width"] == 5).all()
    places = (p["top"] * 10 + p["left"]).long().bincount()
    assert stats.chisquare(places[places > 0]).pvalue > 1e-4
    assert (places > 0).sum() == 4 * 5


@pytest.mark.parametrize(
    ("column", "low", "high"),
    [
        ("brightness", 0.6, 1.4),
        ("contrast", 0.5, 1.5),
        ("saturation", 0.4, 1.6),
        ("hue", -0.1, 0.1),
    ],
)
def test_factors_are_uniform(params, column, low, high):
    assert stats.kstest(params[column].numpy(), stats.uniform(low, high - low).cdf).pvalue > 1e-4


def test_strong_jitter_stops_at_zero():
    p = drawn(replace(ALL, jitter=(1.5, 0, 0, 0)), 32, 32, 10_000)
    assert 0 <= p["brightness"].min() < 0.01 and p["brightness"].max() > 2.49


def test_sigma_is_uniform_where_there_is_blur(params):
    sigma = params["sigma"][params["sigma"] > 0].numpy()
    assert stats.kstest(sigma, stats.uniform(0.1, 1.9).cdf).pvalue > 1e-4


@pytest.mark.parametrize(
    ("applies", "p"),
    [
        (lambda p: p["flip"] == 1, 0.5),
        (lambda p: p["step0"] >= 0, 0.8),
        (lambda p: p["gray"] == 1, 0.2),
        (lambda p: p["sigma"] > 0, 0.5),
        (lambda p: p["solarize"] == 0.5, 0.3),
    ],
)
def test_probabilities(params, applies, p):
    hits = int(applies(params).sum())
    assert stats.binomtest(hits, MANY, p).pvalue > 1e-4


def test_turns_and_equalization_are_drawn_apart(params):
    """With probabilities and angles of their own, and without moving what was drawn before."""
    view = replace(ALL, vertical_flip=0.3, rotate=0.6, rotate_degrees=(-20.0, 50.0), equalize=0.1)
    turned = drawn(view, 48, 64)
    for column, p in (("vertical_flip", 0.3), ("angle", 0.6), ("equalize", 0.1)):
        assert stats.binomtest(int((turned[column] != 0).sum()), MANY, p).pvalue > 1e-4
        assert not params[column].any()
    angles = turned["angle"][turned["angle"] != 0].numpy()
    assert stats.kstest(angles, stats.uniform(-20, 70).cdf).pvalue > 1e-4
    drawn_before = COLUMNS.index("vertical_flip")
    assert torch.equal(turned.table[:, :drawn_before], params.table[:, :drawn_before])
    r = np.corrcoef(
        np.stack(
            [turned[n].numpy() for n in ("flip", "vertical_flip", "angle", "equalize", "sigma")]
        )
    )
    assert np.abs(r - np.eye(5)).max() < 5 / math.sqrt(MANY)


EARLIER = [
    [1.0, 3.0, 23.0, 22.0, 0.0, 0.0, 3.0, 1.0, 2.0, 1.3351227045059204, 0.7654544711112976,
     0.8723701238632202, -0.06634536385536194, 1.0, 0.0, 2.0, 0.0, 0.0, 0.0, 0.0],
    [2.0, 3.0, 29.0, 26.0, 1.0, 0.0, 1.0, 2.0, 3.0, 1.2602146863937378, 0.8558237552642822,
     0.7192440629005432, 0.0942269042134285, 0.0, 1.1070555448532104, 0.5, 0.0, 0.0, 0.0, 0.0],
]  # fmt: skip


def test_views_of_earlier_versions_are_drawn_again():
    """Seeds mean what they meant before views had vertical flips, rotations and equalization."""
    table = draw(ALL, 1, 3, torch.tensor([12345, 12346]), 1, 32, 32).table
    expected = torch.tensor(EARLIER)
    assert torch.equal(table[:, : expected.shape[1]], expected)
    assert not table[:, expected.shape[1] :].any()


def test_all_24_orders_are_equally_likely(params):
    steps = torch.stack([params[f"step{i}"] for i in range(4)], 1).long()
    steps = steps[steps[:, 0] >= 0]
    assert torch.equal(steps.sort(1).values, torch.arange(4).expand(len(steps), 4))
    counts = (steps * torch.tensor([64, 16, 4, 1])).sum(1).bincount()
    counts = counts[counts > 0]
    assert len(counts) == 24
    assert stats.chisquare(counts).pvalue > 1e-4


def test_erased_boxes():
    p = drawn(replace(ALL, size=9, erase=0.25), 32, 32)
    ours = torch.stack([p[f"erase_{k}"] for k in ("top", "left", "height", "width")], 1).numpy()
    erased = ours[:, 2] > 0
    rng, side = default_rng(1), 9
    box, left_over = np.zeros((MANY, 4)), np.ones(MANY, bool)
    for _ in range(10):
        area = side * side * rng.uniform(0.02, 0.33, MANY)
        aspect = np.exp(rng.uniform(math.log(0.3), math.log(3.3), MANY))
        h, w = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
        fits = left_over & (h < side) & (w < side)
        places = (
            rng.integers(0, np.maximum(side - h, 0) + 1),
            rng.integers(0, np.maximum(side - w, 0) + 1),
        )
        box[fits] = np.stack([*places, h, w], 1)[fits]
        left_over &= ~fits
    assert_same_distribution(ours[erased], box[box[:, 2] > 0])
    expected = 0.25 * (box[:, 2] > 0).mean()
    assert abs(erased.mean() - expected) < 5 * math.sqrt(0.25 / MANY)


def test_parameters_are_independent(params):
    """No two columns correlate, but those that must: box sides with each other, steps, erasures."""
    names = ["top", "flip", "step0", "brightness", "contrast", "saturation", "hue", "gray", "sigma"]
    names += ["solarize", "erase_height"]
    r = np.corrcoef(np.stack([params[n].numpy() for n in names])) - np.eye(len(names))
    assert np.abs(r).max() < 5 / math.sqrt(MANY)


def test_a_view_depends_on_nothing_but_its_name():
    whole = drawn(ALL, 32, 32, 1000)
    index = torch.tensor([999, 3, 500])
    assert torch.equal(draw(ALL, 1, 3, index, 1, 32, 32).table, whole.table[index])
    others = [draw(ALL, s, e, index, v, 32, 32) for s, e, v in [(2, 3, 1), (1, 4, 1), (1, 3, 2)]]
    for other in others:
        assert not torch.equal(other["hue"], whole["hue"][index])


def test_per_sample_parameters_differ(params):
    assert params["hue"][:1000].unique().numel() > 990


def test_replace_changes_only_what_it_names(params):
    changed = params.replace(sigma=1.5)
    assert (changed["sigma"] == 1.5).all() and torch.equal(changed["hue"], params["hue"])
    assert not (params["sigma"] == 1.5).all()
