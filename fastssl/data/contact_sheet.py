"""Contact sheet of a policy: source images and their views with the sampled parameters."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastssl_pipelines import View
from fastssl_pipelines.augment import Params, as_images, draw, render

COLUMN = 1.9  # inches of a picture
JITTER_INITIALS = "bcsh"  # brightness, contrast, saturation, hue
KEY = (
    "Under each view: its crop, height x width @ top, left, in px of the source; the jitter factors"
    " in the order they are applied\n(b brightness, c contrast, s saturation, h hue as part of the"
    " colour circle); the other operations that apply to it."
)


def plot_contact_sheet(
    images: Any, views: Sequence[View], seed: int, path: str | Path, policy: str = "views"
) -> None:
    """Write a PNG to `path`: a row for each of `images`, its source and then its views.

    images: a few uint8 RGB images, (M, H, W, 3) or a sequence of (H, W, 3). policy: its name, for
    the title. Each column is headed by the view's name and size; under each view are its
    parameters, and below all rows what each view may do and how to read a caption.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(contact_sheet(images, views, seed, policy)).print_png(str(path))


def contact_sheet(images: Any, views: Sequence[View], seed: int, policy: str) -> Any:
    """The figure of `plot_contact_sheet`."""
    from matplotlib.figure import Figure

    pool, names = as_images(images), view_names(views)
    index = torch.arange(pool.count)
    legend = [KEY, *_legend(views, names)]
    shapes = [view.shape for view in views] + pool.layout[:, 1:].tolist()
    tallest = max(height / width for height, width in shapes)
    column = max(COLUMN, 9.0 / (1 + len(views)))  # so that the legend has room
    row, notes = column * tallest + 0.55, 0.17 * (1 + len(legend))  # inches, captions included
    inches = (column * (1 + len(views)), row * pool.count + 0.8 + notes)
    figure = Figure(figsize=inches, layout="constrained")
    figure.suptitle(f"{policy}: {len(views)} views of each image, seed {seed}", fontsize=11)
    figure.supxlabel("\n".join(legend), x=0.01, ha="left", fontsize=7.5, linespacing=1.35)
    axes = figure.subplots(pool.count, 1 + len(views), squeeze=False)
    for axis, name, view in zip(axes[0], ("source", *names), (None, *views), strict=True):
        size = "" if view is None else f"\n{_size(view)}"
        axis.set_title(name + size, fontsize=9, verticalalignment="bottom")
    for i in range(pool.count):
        source = pool.pixels(i)
        _show(axes[i][0], source, f"{source.shape[0]} x {source.shape[1]} px")
    for v, view in enumerate(views):
        plain = replace(view, mean=(0, 0, 0), std=(1, 1, 1), dtype=torch.float32)
        params = draw(plain, seed, 0, index, v, pool.layout[:, 1], pool.layout[:, 2])
        pictures = render(pool, params, plain).permute(0, 2, 3, 1).clamp(0, 1)
        for i in range(pool.count):
            _show(axes[i][1 + v], pictures[i], _describe(params, i))
    return figure


def view_names(views: Sequence[View]) -> list[str]:
    """ "view 1", ...; where sizes differ "global 1" for the largest views and "local 1" for the
    others, as multi-crop papers name them."""
    areas = [prod(view.shape) for view in views]
    if len(set(areas)) == 1:
        return [f"view {v + 1}" for v in range(len(views))]
    kinds = ["global" if area == max(areas) else "local" for area in areas]
    return [f"{kind} {kinds[: v + 1].count(kind)}" for v, kind in enumerate(kinds)]


def _legend(views: Sequence[View], names: Sequence[str]) -> list[str]:
    """What each view may do, a line for each run of equal ones."""
    lines = []
    for view, run in groupby(zip(views, names, strict=True), key=lambda pair: pair[0]):
        _, (first, *rest) = zip(*run, strict=True)
        span = f"{first} to {rest[-1].rpartition(' ')[2]}" if rest else first
        lines.append(f"{span}: {_summary(view)}")
    return lines


def _summary(view: View) -> str:
    """The settings of a view, without what it never does; p is a probability."""
    low, high = view.scale
    area = f"crop {low:.0%} to {high:.0%} of the area"
    strengths = ", ".join(
        f"{initial} {strength:g}"
        for initial, strength in zip(JITTER_INITIALS, view.jitter, strict=True)
        if strength
    )
    parts = [
        _size(view),
        area if view.patch is None else f"patch of {view.patch} x {view.patch} px",
        view.interpolation,
    ]
    steps = [
        ("flip", view.flip, ""),
        ("vertical flip", view.vertical_flip, ""),
        ("rotate", view.rotate, "{:g} to {:g} degrees".format(*view.rotate_degrees)),
        ("equalize", view.equalize, ""),
        ("jitter", view.jitter_p if strengths else 0.0, strengths),
        ("gray", view.gray, ""),
        ("blur", view.blur, "sigma {:g} to {:g} px".format(*view.blur_sigma)),
        ("solarize", view.solarize, ""),
        ("erase", view.erase, ""),
    ]
    for name, p, settings in steps:
        if p > 0:
            parts.append(f"{name} p {p:g}" + (f" ({settings})" if settings else ""))
    return ", ".join(parts)


def _size(view: View) -> str:
    return "{} x {} px".format(*view.shape)


def _show(axis: Any, picture: Tensor, caption: str) -> None:
    axis.imshow(picture.numpy(), interpolation="nearest")
    axis.text(0.5, -0.03, caption, ha="center", va="top", fontsize=7, transform=axis.transAxes)
    axis.set_axis_off()


def _describe(params: Params, i: int) -> str:
    """The sampled parameters of view i, in at most three lines."""
    names = ("top", "left", "height", "width", "sigma", "angle")
    p = {name: float(params[name][i]) for name in names}
    lines = [f"{p['height']:.0f} x {p['width']:.0f} @ {p['top']:.0f}, {p['left']:.0f}"]
    steps = [int(params[f"step{slot}"][i]) for slot in range(4)]
    factors = ("brightness", "contrast", "saturation", "hue")
    jitter = [f"{JITTER_INITIALS[s]} {float(params[factors[s]][i]):.2f}" for s in steps if s >= 0]
    flags = [
        ("equalize", params["equalize"][i] > 0),
        ("flip", params["flip"][i] > 0),
        ("vertical flip", params["vertical_flip"][i] > 0),
        (f"rotate {p['angle']:.0f}", p["angle"] != 0),
        ("gray", params["gray"][i] > 0),
        (f"blur {p['sigma']:.1f}", p["sigma"] > 0),
        ("solarize", params["solarize"][i] <= 1),
        ("erase", params["erase_height"][i] > 0),
    ]
    lines += ["  ".join(jitter), "  ".join(name for name, is_set in flags if is_set)]
    return "\n".join(filter(None, lines))
