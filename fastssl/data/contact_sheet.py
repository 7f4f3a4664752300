"""Contact sheet of a policy: source images and their views with the sampled parameters."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastssl_pipelines import View
from fastssl_pipelines.augment import Params, as_images, draw, render

JITTER_INITIALS = "bcsh"  # brightness, contrast, saturation, hue


def plot_contact_sheet(images: Any, views: Sequence[View], seed: int, path: str | Path) -> None:
    """Write a PNG to `path`: a row for each of `images`, its source and then its views.

    images: a few uint8 RGB images, (M, H, W, 3) or a sequence of (H, W, 3). Under each view
    are its parameters: crop (height x width @ top, left), jitter factors in their order, flags.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    pool = as_images(images)
    index = torch.arange(pool.count)
    figure = Figure(figsize=(1.9 * (1 + len(views)), 2.45 * pool.count), layout="constrained")
    axes = figure.subplots(pool.count, 1 + len(views), squeeze=False)
    for i in range(pool.count):
        source = pool.pixels(i)
        _show(axes[i][0], source, f"{source.shape[0]} x {source.shape[1]} px")
    for v, view in enumerate(views):
        plain = replace(view, mean=(0, 0, 0), std=(1, 1, 1), dtype=torch.float32)
        params = draw(plain, seed, 0, index, v, pool.layout[:, 1], pool.layout[:, 2])
        pictures = render(pool, params, plain).permute(0, 2, 3, 1).clamp(0, 1)
        for i in range(pool.count):
            _show(axes[i][1 + v], pictures[i], _describe(params, i))
    FigureCanvasAgg(figure).print_png(str(path))


def _show(axis: Any, picture: Tensor, caption: str) -> None:
    axis.imshow(picture.numpy(), interpolation="nearest")
    axis.text(0.5, -0.03, caption, ha="center", va="top", fontsize=6, transform=axis.transAxes)
    axis.set_axis_off()


def _describe(params: Params, i: int) -> str:
    """The sampled parameters of view i, in at most three lines."""
    p = {name: float(params[name][i]) for name in ("top", "left", "height", "width", "sigma")}
    lines = [f"{p['height']:.0f} x {p['width']:.0f} @ {p['top']:.0f}, {p['left']:.0f}"]
    steps = [int(params[f"step{slot}"][i]) for slot in range(4)]
    factors = ("brightness", "contrast", "saturation", "hue")
    jitter = [f"{JITTER_INITIALS[s]} {float(params[factors[s]][i]):.2f}" for s in steps if s >= 0]
    flags = [
        ("flip", params["flip"][i] > 0),
        ("gray", params["gray"][i] > 0),
        (f"blur {p['sigma']:.1f}", p["sigma"] > 0),
        ("solarize", params["solarize"][i] <= 1),
        ("erase", params["erase_height"][i] > 0),
    ]
    lines += ["  ".join(jitter), "  ".join(name for name, is_set in flags if is_set)]
    return "\n".join(filter(None, lines))
