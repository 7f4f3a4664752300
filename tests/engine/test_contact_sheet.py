"""The contact sheet shows the views and their parameters."""

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from fastssl.data.contact_sheet import (
    _describe,
    contact_sheet,
    plot_contact_sheet,
    view_names,
)
from fastssl_pipelines import View, policies
from fastssl_pipelines.augment import Params
from fastssl_pipelines.augment.sample_params import COLUMNS


def test_contact_sheet_shows_sources_and_views(tmp_path):
    red, blue = np.zeros((2, 20, 30, 3), np.uint8)
    red[..., 0], blue[..., 2] = 255, 255
    path = tmp_path / "views.png"
    plot_contact_sheet([red, blue[:, :20]], (View(size=16),) * 2, 0, path)
    picture = np.array(Image.open(path).convert("RGB")).astype(int)
    rows = [
        np.flatnonzero((picture == color).all(2).any(1)) for color in ((255, 0, 0), (0, 0, 255))
    ]
    assert rows[0].max() < rows[1].min()
    for color, row in zip(((255, 0, 0), (0, 0, 255)), rows, strict=True):
        shown = (picture[row.min() : row.max() + 1] == color).all(2)
        assert len(shown) > 100 and shown.mean() > 0.5


def test_the_sheet_names_policy_views_and_what_they_do():
    images = np.zeros((2, 24, 24, 3), np.uint8)
    views = policies.dino(local=2, size=24)
    figure = contact_sheet(images, views, 3, "dino")
    assert figure.get_suptitle() == "dino: 4 views of each image, seed 3"
    assert [axis.get_title() for axis in figure.axes[:5]] == [
        "source", "global 1\n24 x 24 px", "global 2\n24 x 24 px", "local 1\n10 x 10 px",
        "local 2\n10 x 10 px",
    ]  # fmt: skip
    legend = figure.get_supxlabel().splitlines()
    assert legend[0].startswith("Under each view: its crop")
    assert legend[-3].startswith(
        "global 1: 24 x 24 px, crop 40% to 100% of the area, bicubic, flip"
    )
    assert "blur p 0.1 (sigma 0.1 to 2 px), solarize p 0.2" in legend[-2]
    assert legend[-1].startswith("local 1 to 2: 10 x 10 px, crop 5% to 40%")
    assert view_names(policies.simclr(2)) == ["view 1", "view 2"]


def test_no_text_of_a_sheet_covers_another():
    images = np.zeros((2, 24, 24, 3), np.uint8)
    for views in (policies.digits(1), policies.dino(local=4, size=24)):
        figure = contact_sheet(images, views, 0, "policy")
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        texts = [figure._suptitle, figure._supxlabel, *(axis.title for axis in figure.axes)]
        texts += [text for axis in figure.axes for text in axis.texts]
        boxes = [text.get_window_extent(canvas.renderer) for text in texts if text.get_text()]
        for i, box in enumerate(boxes):
            assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1
            assert not any(box.overlaps(other) for other in boxes[:i])


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
    row |= {"solarize": 2.0, "sigma": 1.04, "angle": -12.3, "equalize": 1}
    caption = _describe(Params(torch.tensor([[row[c] for c in COLUMNS]])), 0)
    assert caption == "5 x 6 @ 3, 4\nh -0.10  b 1.25\nequalize  flip  rotate -12  blur 1.0"
