"""The contact sheet shows the views and their parameters."""

import numpy as np
import torch
from PIL import Image

from fastssl.data.contact_sheet import _describe, plot_contact_sheet
from fastssl_pipelines import View, policies
from fastssl_pipelines.augment import Params
from fastssl_pipelines.augment.sample_params import COLUMNS


def test_contact_sheet_shows_sources_and_views(tmp_path):
    red, blue = np.zeros((2, 20, 30, 3), np.uint8)
    red[..., 0], blue[..., 2] = 255, 255
    path = tmp_path / "views.png"
    plot_contact_sheet([red, blue[:, :20]], (View(size=16),) * 2, 0, path)
    picture = np.array(Image.open(path).convert("RGB")).astype(int)
    height = len(picture) // 2
    is_red = (picture == (255, 0, 0)).all(2)
    is_blue = (picture == (0, 0, 255)).all(2)
    assert is_red[:height].mean() > 0.2 and not is_red[height:].any()
    assert is_blue[height:].mean() > 0.2 and not is_blue[:height].any()


def test_the_same_seed_gives_the_same_sheet(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (2, 24, 24, 3), dtype=np.uint8)
    sheets = []
    for seed in (0, 0, 1):
        plot_contact_sheet(images, policies.simclr_cifar(2), seed, tmp_path / "views.png")
        sheets.append((tmp_path / "views.png").read_bytes())
    assert sheets[0] == sheets[1] != sheets[2]


def test_captions_are_the_sampled_parameters():
    row = dict.fromkeys(COLUMNS, 0.0) | {"top": 3, "left": 4, "height": 5, "width": 6, "flip": 1}
    row |= {"step0": 3, "step1": 0, "step2": -1, "step3": -1, "hue": -0.1, "brightness": 1.25}
    row |= {"solarize": 2.0, "sigma": 1.04}
    caption = _describe(Params(torch.tensor([[row[c] for c in COLUMNS]])), 0)
    assert caption == "5 x 6 @ 3, 4\nh -0.10  b 1.25\nflip  blur 1.0"
