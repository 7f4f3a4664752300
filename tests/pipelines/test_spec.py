"""A View rejects what no engine could render."""

import pytest
import torch

from fastssl_pipelines.spec import View

BAD = [
    {"size": 0},
    {"size": -3},
    {"size": (8, 0)},
    {"size": (8,)},
    {"size": 8.5},
    {"vertical_flip": 1.5},
    {"rotate": -0.1},
    {"rotate_degrees": (10.0, -10.0)},
    {"rotate_degrees": (0.0, 400.0)},
    {"equalize": float("nan")},
    {"ratio": (0.01, 1.0)},
    {"erase_ratio": (1.0, float("inf"))},
    {"blur_sigma": (0.1, float("inf"))},
    {"blur_sigma": (0.1, 1e7)},
    {"jitter": (float("inf"), 0.0, 0.0, 0.0)},
    {"jitter": (0.1, 0.1, 0.1)},
    {"solarize_threshold": float("nan")},
    {"mean": (0.5, float("nan"), 0.5)},
    {"std": (1.0, float("inf"), 1.0)},
    {"patch": 0},
    {"flip": 1.1},
    {"jitter_p": -0.1},
    {"gray": 2},
    {"blur": float("nan")},
    {"solarize": -1},
    {"erase": 1.5},
    {"scale": (0.0, 1.0)},
    {"scale": (0.5, 0.2)},
    {"scale": (0.5, 1.2)},
    {"ratio": (0.0, 1.0)},
    {"blur_sigma": (-1.0, 2.0)},
    {"erase_scale": (0.1, 1.1)},
    {"erase_ratio": (2.0, 1.0)},
    {"jitter": (-0.1, 0.0, 0.0, 0.0)},
    {"jitter": (0.1, 0.0, 0.0, 0.6)},
    {"interpolation": "nearest"},
    {"std": (1.0, 0.0, 1.0)},
    {"mean": (0.5,)},
    {"dtype": torch.uint8},
]


@pytest.mark.parametrize("change", BAD, ids=str)
def test_impossible_views_name_the_field(change):
    (name,) = change
    with pytest.raises(ValueError, match=rf"View\.{name}"):
        View(**({"size": 32} | change))


def test_views_are_values():
    assert View(size=32, blur=0.5) == View(size=32, blur=0.5)
    assert len({View(size=32), View(size=32), View(size=33)}) == 2
    assert View(size=(32, 32)) == View(size=32) and View(size=32).shape == (32, 32)
    oblong = View(size=[20, 30])  # type: ignore[arg-type]
    assert oblong.shape == oblong.size == (20, 30) and hash(oblong)
