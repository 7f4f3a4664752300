"""Sample the parameters of a view from Philox words: one source for all back ends.

As written this file is torch, vectorised over samples. `retarget.py` compiles the same functions
for numba and for Triton, with that compiler's `real`, `sqrt`, ... in place of the primitives below;
so they use operators, each other, primitives and the constants in capitals only. All arithmetic is
fp64 in single IEEE operations of a fixed order: the three compilers agree bit for bit.

Crop and erasing follow torchvision's `RandomResizedCrop.make_params` and `RandomErasing`: ten
attempts, then the largest centred crop of an allowed ratio (crop), or nothing (erasing).
"""

# mypy: disable-error-code="no-untyped-def"
# ^ arguments are tensors, scalars or blocks of pointers, depending on the compiler

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastssl_pipelines.rng import philox
from fastssl_pipelines.spec import View

# The parameters of one view of one image: a row of float32 (integers below 2^24 are exact).
COLUMNS = (
    "top", "left", "height", "width",  # the crop, px of the image
    "flip",
    "step0", "step1", "step2", "step3",  # 0 brightness, 1 contrast, 2 saturation, 3 hue; -1 none
    "brightness", "contrast", "saturation", "hue",  # factors; hue in parts of the full circle
    "gray",
    "sigma",  # of the blur, px of the view; 0 is none
    "solarize",  # the threshold; 2 is none
    "erase_top", "erase_left", "erase_height", "erase_width",  # px of the view; height 0 is none
    "vertical_flip",
    "angle",  # of the rotation, degrees counter-clockwise; 0 is none
    "equalize",
)  # fmt: skip
(
    TOP, LEFT, HEIGHT, WIDTH, FLIP, STEP0, STEP1, STEP2, STEP3, BRIGHTNESS, CONTRAST, SATURATION,
    HUE, GRAY, SIGMA, SOLARIZE, ERASE_TOP, ERASE_LEFT, ERASE_HEIGHT, ERASE_WIDTH, VERTICAL_FLIP,
    ANGLE, EQUALIZE,
) = range(len(COLUMNS))  # fmt: skip


@dataclass(frozen=True)
class Params:
    """The parameters of a batch of views, one row per sample: `params["sigma"]` is a column (N,) of
    `table` (N, len(COLUMNS)), float32; integers are exact."""

    table: Tensor

    def __getitem__(self, column: str) -> Tensor:
        return self.table[:, COLUMNS.index(column)]

    def __len__(self) -> int:
        return len(self.table)

    def replace(self, **columns: Tensor | float) -> "Params":
        """A copy with some columns changed, to replay a view with other parameters."""
        table = self.table.clone()
        for name, values in columns.items():
            table[:, COLUMNS.index(name)] = torch.as_tensor(values, dtype=table.dtype).to(
                table.device
            )
        return Params(table)


# Positions in `view_numbers`. A range is two numbers, (low, high - low).
VIEW_HEIGHT, PATCHED, PATCH, RATIO_LOW, RATIO_HIGH = 0, 1, 2, 3, 4
FLIP_P, JITTER_P, GRAY_P, BLUR_P, SOLARIZE_P, THRESHOLD, ERASE_P = 5, 6, 7, 8, 9, 10, 11
AREA, LOG_RATIO, BRIGHTNESSES, CONTRASTS, SATURATIONS, HUES, SIGMAS = 12, 14, 16, 18, 20, 22, 24
ERASE_AREA, ERASE_LOG_RATIO = 26, 28
MEAN, STD = 30, 33
VIEW_WIDTH, VERTICAL_FLIP_P, ROTATE_P, EQUALIZE_P, ANGLES = 36, 37, 38, 39, 40


def view_numbers(view: View) -> tuple[float, ...]:
    """The fields of `view` as the numbers that the formulas and the kernels read."""
    b, c, s, h = view.jitter
    ranges = (
        view.scale,
        (math.log(view.ratio[0]), math.log(view.ratio[1])),
        *((max(0.0, 1 - x), 1 + x) for x in (b, c, s)),
        (-h, h),
        view.blur_sigma,
        view.erase_scale,
        (math.log(view.erase_ratio[0]), math.log(view.erase_ratio[1])),
    )
    low, high = view.rotate_degrees
    view_height, view_width = view.shape
    return (
        float(view_height),
        float(view.patch is not None),
        float(view.patch or 0),
        *view.ratio,
        view.flip,
        view.jitter_p,
        view.gray,
        view.blur,
        view.solarize,
        view.solarize_threshold,
        view.erase,
        *(number for low, high in ranges for number in (low, high - low)),
        *view.mean,
        *view.std,
        float(view_width),
        view.vertical_flip,
        view.rotate,
        view.equalize,
        low,
        high - low,
    )


def number(numbers, which):
    return numbers[which]


def put(row, column, value):
    row[:, column] = value


def real(word):
    return word.double()


def indicator(condition):
    return condition.double()


def any_true(condition):
    return condition.any()


sqrt, floor, where = torch.sqrt, torch.floor, torch.where


def uniform(word):
    """[0, 1), a multiple of 2^-32."""
    return real(word) * 2.3283064365386963e-10


def bernoulli(word, p):
    return indicator(uniform(word) < p)


def uniform_in(word, numbers, which):
    return number(numbers, which) + uniform(word) * number(numbers, which + 1)


def round_even(x):
    """To the nearest integer, ties to even, as fp64 rounds at 1.5 * 2^52."""
    return (x + 6755399441055744.0) - 6755399441055744.0


def exponential(x):
    """exp(x) for |x| < 4 within 1e-14: the exp of each library differs in the last bits."""
    y = x * 0.0625
    e = y * 0.09090909090909091 + 1.0
    e = e * y * 0.1 + 1.0
    e = e * y * 0.1111111111111111 + 1.0
    e = e * y * 0.125 + 1.0
    e = e * y * 0.14285714285714285 + 1.0
    e = e * y * 0.16666666666666666 + 1.0
    e = e * y * 0.2 + 1.0
    e = e * y * 0.25 + 1.0
    e = e * y * 0.3333333333333333 + 1.0
    e = e * y * 0.5 + 1.0
    e = e * y + 1.0
    e = e * e
    e = e * e
    e = e * e
    return e * e


def sides(area, ratio):
    """(sqrt(area * ratio), sqrt(area / ratio)) as integers."""
    return round_even(sqrt(area * ratio)), round_even(sqrt(area / ratio))


def sample_crop(index, view, seed, epoch, height, width, numbers):
    """(top, left, height, width), from Philox blocks 3 to 12."""
    found = height * 0.0
    top = height * 0.0
    left = height * 0.0
    h = height * 0.0
    w = height * 0.0
    for attempt in range(10):
        if any_true(found < 1.0):
            a, b, c, d = philox(index, view, view * 0 + (attempt + 3), seed, epoch)
            area = height * width * uniform_in(a, numbers, AREA)
            wide, high = sides(area, exponential(uniform_in(b, numbers, LOG_RATIO)))
            wide = wide + number(numbers, PATCHED) * (number(numbers, PATCH) - wide)
            high = high + number(numbers, PATCHED) * (number(numbers, PATCH) - high)
            fits = (wide > 0) & (wide <= width) & (high > 0) & (high <= height)
            accept = indicator(fits) * (1.0 - found)
            h = h + accept * (high - h)
            w = w + accept * (wide - w)
            top = top + accept * floor(uniform(c) * (height - high + 1.0))
            left = left + accept * floor(uniform(d) * (width - wide + 1.0))
            found = found + accept
    low = number(numbers, RATIO_LOW)
    high = number(numbers, RATIO_HIGH)
    wide = where(width > height * high, round_even(height * high), width)
    high = where(width < height * low, round_even(width / low), height)
    wide = where(wide < 1.0, 1.0, wide)
    high = where(high < 1.0, 1.0, high)
    h = h + (1.0 - found) * (high - h)
    w = w + (1.0 - found) * (wide - w)
    top = top + (1.0 - found) * floor((height - h) * 0.5)
    left = left + (1.0 - found) * floor((width - w) * 0.5)
    return top, left, h, w


def sample_erasing(index, view, seed, epoch, enabled, numbers):
    """(top, left, height, width), all 0 where erasing is not `enabled` or no rectangle fits; from
    Philox blocks 13 to 22."""
    height = number(numbers, VIEW_HEIGHT)
    width = number(numbers, VIEW_WIDTH)
    found = 1.0 - enabled
    top = enabled * 0.0
    left = enabled * 0.0
    h = enabled * 0.0
    w = enabled * 0.0
    for attempt in range(10):
        if any_true(found < 1.0):
            a, b, c, d = philox(index, view, view * 0 + (attempt + 13), seed, epoch)
            area = height * width * uniform_in(a, numbers, ERASE_AREA)
            high, wide = sides(area, exponential(uniform_in(b, numbers, ERASE_LOG_RATIO)))
            accept = indicator((wide < width) & (high < height)) * (1.0 - found)
            h = h + accept * (high - h)
            w = w + accept * (wide - w)
            top = top + accept * floor(uniform(c) * (height - high + 1.0))
            left = left + accept * floor(uniform(d) * (width - wide + 1.0))
            found = found + accept
    return top, left, h, w


def sample_jitter_order(word, enabled, row):
    """Store one of the 24 orders of the four jitter steps, or -1 where jitter is not `enabled`."""
    rank = floor(uniform(word) * 24.0)
    first = floor((rank + 0.5) / 6.0)
    rest = rank - first * 6.0
    second = floor(rest * 0.5)
    third = rest - second * 2.0
    second = second + indicator(second >= first)
    smaller = where(first < second, first, second)
    larger = where(first < second, second, first)
    third = third + indicator(third >= smaller)
    third = third + indicator(third >= larger)
    put(row, STEP0, enabled * (first + 1.0) - 1.0)
    put(row, STEP1, enabled * (second + 1.0) - 1.0)
    put(row, STEP2, enabled * (third + 1.0) - 1.0)
    put(row, STEP3, enabled * (7.0 - first - second - third) - 1.0)


def sample_view(row, index, view, seed, epoch, height, width, numbers):
    """Fill `row`, the COLUMNS of one view of one image, or of a vector of images.

    index, view, seed, epoch: int64. height, width: of the image, fp64. numbers: `view_numbers`.
    """
    top, left, h, w = sample_crop(index, view, seed, epoch, height, width, numbers)
    put(row, TOP, top)
    put(row, LEFT, left)
    put(row, HEIGHT, h)
    put(row, WIDTH, w)
    a, b, c, d = philox(index, view, view * 0, seed, epoch)
    put(row, FLIP, bernoulli(a, number(numbers, FLIP_P)))
    sample_jitter_order(d, bernoulli(b, number(numbers, JITTER_P)), row)
    put(row, GRAY, bernoulli(c, number(numbers, GRAY_P)))
    a, b, c, d = philox(index, view, view * 0 + 1, seed, epoch)
    put(row, BRIGHTNESS, uniform_in(a, numbers, BRIGHTNESSES))
    put(row, CONTRAST, uniform_in(b, numbers, CONTRASTS))
    put(row, SATURATION, uniform_in(c, numbers, SATURATIONS))
    put(row, HUE, uniform_in(d, numbers, HUES))
    a, b, c, d = philox(index, view, view * 0 + 2, seed, epoch)
    put(row, SIGMA, bernoulli(a, number(numbers, BLUR_P)) * uniform_in(b, numbers, SIGMAS))
    put(
        row,
        SOLARIZE,
        where(bernoulli(c, number(numbers, SOLARIZE_P)) > 0, number(numbers, THRESHOLD), 2.0),
    )
    top, left, h, w = sample_erasing(
        index, view, seed, epoch, bernoulli(d, number(numbers, ERASE_P)), numbers
    )
    put(row, ERASE_TOP, top)
    put(row, ERASE_LEFT, left)
    put(row, ERASE_HEIGHT, h)
    put(row, ERASE_WIDTH, w)
    a, b, c, d = philox(index, view, view * 0 + 23, seed, epoch)
    put(row, VERTICAL_FLIP, bernoulli(a, number(numbers, VERTICAL_FLIP_P)))
    put(row, ANGLE, bernoulli(b, number(numbers, ROTATE_P)) * uniform_in(c, numbers, ANGLES))
    put(row, EQUALIZE, bernoulli(d, number(numbers, EQUALIZE_P)))
