"""The pixel operations and the resampling weights: each formula once, for all back ends.

As written this file is torch: `row` is a (N, columns) table and r, g, b are (N, h, w), fp32 in
[0, 1]. `retarget.py` compiles the same functions for numba (one pixel) and Triton (a tile), as it
does `sample_params.py`. Numbers are named, because each compiler keeps only named ones in fp32.

The colour formulas are torchvision's for float tensors (`transforms/v2/functional/_color.py`); its
HSV round trip is written without branches.
"""

# mypy: disable-error-code="no-untyped-def"

import torch

from fastssl_pipelines.augment.sample_params import (
    BRIGHTNESS,
    CONTRAST,
    GRAY,
    HUE,
    SATURATION,
    SOLARIZE,
)

RED, GREEN, BLUE = 0.2989, 0.587, 0.114  # luma, torchvision's
ZERO, HALF, ONE, TWO, THREE, FOUR, SIX = 0.0, 0.5, 1.0, 2.0, 3.0, 4.0, 6.0
ONE_AND_HALF, TWO_AND_HALF = 1.5, 2.5
DEGREE = 0.017453292519943295  # in radians
TINY = 1e-12  # below any difference of two pixels

where = torch.where


def get(row, column):
    return row[:, column, None, None]


def larger(x, y):
    return where(x > y, x, y)


def smaller(x, y):
    return where(x < y, x, y)


def magnitude(x):
    return where(x < ZERO, -x, x)


def clamp(x):
    return smaller(larger(x, ZERO), ONE)


def luma(r, g, b):
    return RED * r + GREEN * g + BLUE * b


def blend(x, y, factor):
    return clamp(factor * x + (ONE - factor) * y)


def shift_hue(r, g, b, shift):
    """Convert to HSV and back, with `shift` (parts of the full circle) added to the hue."""
    top = larger(larger(r, g), b)
    low = smaller(smaller(r, g), b)
    chroma = top - low
    step = ONE / where(chroma > TINY, chroma, ONE)
    hue = where(
        top == r, (g - b) * step, where(top == g, TWO + (b - r) * step, FOUR + (r - g) * step)
    )  # in sixths of the circle, [-1, 5]
    hue = hue + SIX * shift
    hue = where(hue < ZERO, hue + SIX, hue)
    hue = where(hue >= SIX, hue - SIX, hue)
    return (
        top - chroma * (ONE - clamp(magnitude(hue - THREE) - ONE)),
        top - chroma * (ONE - clamp(TWO - magnitude(hue - TWO))),
        top - chroma * (ONE - clamp(TWO - magnitude(hue - FOUR))),
    )


def adjust(step, r, g, b, mean, row):
    """One jitter step: 0 brightness, 1 contrast, 2 saturation, 3 hue. `mean` is the current
    mean luma of the view."""
    if step == 0:
        factor = get(row, BRIGHTNESS)
        r = clamp(factor * r)
        g = clamp(factor * g)
        b = clamp(factor * b)
    elif step == 1:
        factor = get(row, CONTRAST)
        r = blend(r, mean, factor)
        g = blend(g, mean, factor)
        b = blend(b, mean, factor)
    elif step == 2:
        factor = get(row, SATURATION)
        y = luma(r, g, b)
        r = blend(r, y, factor)
        g = blend(g, y, factor)
        b = blend(b, y, factor)
    elif step == 3:
        r, g, b = shift_hue(r, g, b, get(row, HUE))
    return r, g, b


def recolor(r, g, b, color):
    """All jitter steps as one affine map, `color` (12): see `color_matrix.py`."""
    return (
        clamp(get(color, 0) * r + get(color, 1) * g + get(color, 2) * b + get(color, 3)),
        clamp(get(color, 4) * r + get(color, 5) * g + get(color, 6) * b + get(color, 7)),
        clamp(get(color, 8) * r + get(color, 9) * g + get(color, 10) * b + get(color, 11)),
    )


def tone(r, g, b, row):
    """The operations between jitter and blur: grayscale."""
    gray = get(row, GRAY) > ZERO
    y = luma(r, g, b)
    return where(gray, y, r), where(gray, y, g), where(gray, y, b)


def finish(x, row):
    """The operations after the blur, on any channel: solarize."""
    return where(x >= get(row, SOLARIZE), ONE - x, x)


def triangle(distance):
    """Weight of a pixel at `distance` (in px of the coarser grid) in bilinear resampling."""
    return larger(ONE - magnitude(distance), ZERO)


def cubic(distance):
    """The same in bicubic resampling: Keys' kernel with a = -1/2, as in Pillow and antialiased
    torchvision."""
    x = magnitude(distance)
    near = (ONE_AND_HALF * x - TWO_AND_HALF) * x * x + ONE
    far = ((TWO_AND_HALF - HALF * x) * x - FOUR) * x + TWO
    return where(x < ONE, near, where(x < TWO, far, ZERO))


def turn(y, x, cos, sin):
    """Where the pixel at (y, x) of a view rotated counter-clockwise comes from, both relative to
    the centre; the y axis points down."""
    return y * cos + x * sin, x * cos - y * sin
