"""The loops of the CPU back end, compiled with numba: one view at a time, in buffers that stay in
the cache.

A view is rendered in strips of a few rows that fit in the L1 cache. A row of the crop is the
weighted sum of source rows; its pixels are weighted sums of neighbours, one vector of four floats
per pixel (red, green, blue, and one that the next pixel overwrites). The colour steps before
contrast, which needs the mean of the view, run while the strip is in the cache; the others run in a
second sweep, which also normalises and stores. A blurred view needs a third.

Shapes: N batch, C channels, S pixels per side, K largest number of taps of a resampled pixel.
"""

# mypy: disable-error-code="no-untyped-def"
# ^ numba infers the types of what it compiles

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
from numba.np.unsafe.ndarray import to_fixed_tuple

from fastssl_pipelines import rng
from fastssl_pipelines.augment import pixel_ops, sample_params
from fastssl_pipelines.augment.cpu import intrinsics, numba_ops, resample
from fastssl_pipelines.augment.cpu.intrinsics import (
    LANES,
    atomic_fetch_add,
    prefetch_for_write,
    weigh_bytes,
    weigh_pairs,
    weigh_pixels,
)
from fastssl_pipelines.augment.cpu.numba_ops import (
    HALF,
    ONE,
    TWO,
    ZERO,
    exact,
    fast,
    of_pixels,
    of_views,
)
from fastssl_pipelines.augment.cpu.resample import fill_taps, max_taps
from fastssl_pipelines.augment.reference import BLUR_REACH

# The modules that numba compiles here: part of the key of its cache on disk.
SOURCES = (rng, sample_params, pixel_ops, numba_ops, resample, intrinsics)
STRIP = 1024  # pixels, approximately: three planes of them are 12 KiB


def _on_disk(function: Callable[..., None]) -> Any:
    """`function`, compiled once per machine and cached on disk, in __pycache__ or the user's cache
    folder.

    numba invalidates its cache by this file alone, so the qualified name holds a digest of the
    others.
    Where no folder is writable, each process compiles again.
    """
    sources = (Path(str(m.__file__)).read_bytes() for m in SOURCES)
    function.__qualname__ += "-" + hashlib.sha256(b"".join(sources)).hexdigest()[:16]
    try:
        return numba.njit(nogil=True, error_model="numpy", cache=True)(function)
    except RuntimeError:  # numba found no writable folder for its cache
        return exact(function)


sample_view = of_views.sample_view
adjust, recolor, tone, finish = (
    of_pixels.adjust,
    of_pixels.recolor,
    of_pixels.tone,
    of_pixels.finish,
)
clamp, luma = of_pixels.clamp, of_pixels.luma

BYTE = np.float32(1 / 255)
UNIT = np.uintp(1)  # unsigned indices, so that numba does not handle negative ones
REACH = np.float32(BLUR_REACH)
MEAN, STD = sample_params.MEAN, sample_params.STD
STEP0, STEP3, SIGMA = sample_params.STEP0, sample_params.STEP3, sample_params.SIGMA
TOP, LEFT, FLIP = sample_params.TOP, sample_params.LEFT, sample_params.FLIP
HEIGHT, WIDTH = sample_params.HEIGHT, sample_params.WIDTH
COUNT = len(sample_params.COLUMNS)
ERASE_TOP, ERASE_LEFT = sample_params.ERASE_TOP, sample_params.ERASE_LEFT
ERASE_HEIGHT, ERASE_WIDTH = sample_params.ERASE_HEIGHT, sample_params.ERASE_WIDTH


@fast
def _blend_rows(flat, start, spacing, width, weight, j, count, line):
    """The weighted sum of `count` rows of bytes at flat[start + k * spacing]. -> line (3 * width);
    writes up to LANES floats beyond"""
    end = start + (count - 1) * spacing + 3 * width + LANES
    if end <= len(flat):
        for i in range(0, 3 * width, LANES):
            weigh_bytes(line, i, flat, start + i, spacing, weight, j, count)
    else:  # a vector would read beyond the end of the memory
        for i in range(3 * width):
            line[i] = ZERO
            for k in range(count):
                line[i] += weight[j + k] * np.float32(flat[start + k * spacing + i])


@fast
def _blend_columns(line, first, max_count, weight, taps, size, colors):
    """Row `line` (3 * width) of the crop at S pixels: colors (3 * S), interleaved. weight (S *
    K)"""
    if max_count == 2:
        for x in range(size):
            weigh_pixels(colors, 3 * x, line, 3 * first[x], weight, x * taps, 2)
    elif max_count == 3:
        for x in range(size):
            weigh_pixels(colors, 3 * x, line, 3 * first[x], weight, x * taps, 3)
    elif max_count == 4:
        for x in range(size):
            weigh_pixels(colors, 3 * x, line, 3 * first[x], weight, x * taps, 4)
    else:
        for x in range(size):
            weigh_pixels(colors, 3 * x, line, 3 * first[x], weight, x * taps, max_count)


@fast
def _spread(colors, start, size, planes):
    """colors (3 * S) into pixels `start` and following of planes (3 * S * S)."""
    r, spacing = np.uintp(start), np.uintp(size * size)
    g, b = r + spacing, r + spacing + spacing
    for x in range(np.uintp(size)):
        planes[r + x] = clamp(colors[3 * x])
        planes[g + x] = clamp(colors[3 * x + 1])
        planes[b + x] = clamp(colors[3 * x + 2])


@fast
def _jitter(planes, start, stop, spacing, first, last, mean, row):
    """Steps [first, last) of the jitter of this view, on pixels [start, stop); one loop for each
    kind of step, so that it vectorises."""
    n, m = np.uintp(spacing), np.uintp(2 * spacing)
    for slot in range(first, last):
        step = row[STEP0 + slot]
        if step == 0:
            for i in range(np.uintp(start), np.uintp(stop)):
                r, g, b = adjust(0, planes[i], planes[n + i], planes[m + i], mean, row)
                planes[i], planes[n + i], planes[m + i] = r, g, b
        elif step == 1:
            for i in range(np.uintp(start), np.uintp(stop)):
                r, g, b = adjust(1, planes[i], planes[n + i], planes[m + i], mean, row)
                planes[i], planes[n + i], planes[m + i] = r, g, b
        elif step == 2:
            for i in range(np.uintp(start), np.uintp(stop)):
                r, g, b = adjust(2, planes[i], planes[n + i], planes[m + i], mean, row)
                planes[i], planes[n + i], planes[m + i] = r, g, b
        elif step == 3:
            for i in range(np.uintp(start), np.uintp(stop)):
                r, g, b = adjust(3, planes[i], planes[n + i], planes[m + i], mean, row)
                planes[i], planes[n + i], planes[m + i] = r, g, b


@fast
def _luma_sum(planes, start, stop, spacing):
    n, m = np.uintp(spacing), np.uintp(2 * spacing)
    total = ZERO
    for i in range(np.uintp(start), np.uintp(stop)):
        total += luma(planes[i], planes[n + i], planes[m + i])
    return total


@fast
def _recolor(planes, start, stop, spacing, color):
    n, m = np.uintp(spacing), np.uintp(2 * spacing)
    for i in range(np.uintp(start), np.uintp(stop)):
        r, g, b = recolor(planes[i], planes[n + i], planes[m + i], color)
        planes[i], planes[n + i], planes[m + i] = r, g, b


@fast
def _tone(planes, start, stop, spacing, row):
    n, m = np.uintp(spacing), np.uintp(2 * spacing)
    for i in range(np.uintp(start), np.uintp(stop)):
        r, g, b = tone(planes[i], planes[n + i], planes[m + i], row)
        planes[i], planes[n + i], planes[m + i] = r, g, b


@fast
def _store(planes, start, stop, size, row, normal, out, view, last):
    """Grayscale, solarize, normalise pixels [start, stop) into the view at out[view], channels
    first or last."""
    gain_r, gain_g, gain_b, bias_r, bias_g, bias_b = normal
    n, m = np.uintp(size * size), np.uintp(2 * size * size)
    o = np.uintp(view)
    if last:
        for i in range(np.uintp(start), np.uintp(stop)):
            r, g, b = tone(planes[i], planes[n + i], planes[m + i], row)
            out[o + i + i + i] = finish(r, row) * gain_r + bias_r
            out[o + i + i + i + UNIT] = finish(g, row) * gain_g + bias_g
            out[o + i + i + i + UNIT + UNIT] = finish(b, row) * gain_b + bias_b
    else:
        for i in range(np.uintp(start), np.uintp(stop)):
            r, g, b = tone(planes[i], planes[n + i], planes[m + i], row)
            out[o + i] = finish(r, row) * gain_r + bias_r
            out[o + n + i] = finish(g, row) * gain_g + bias_g
            out[o + m + i] = finish(b, row) * gain_b + bias_b


@fast
def _gaussian(sigma, size, weight):
    """Fill `weight` with half a Gaussian, from its centre on. -> the number of weights"""
    radius = min(int(np.ceil(REACH * sigma)), size - 1)
    total = -ONE
    for t in range(radius + 1):
        x = np.float32(t) / sigma
        weight[t] = np.exp(-HALF * x * x)
        total += TWO * weight[t]
    for t in range(radius + 1):
        weight[t] /= total
    weight[0] *= HALF  # added twice, as a pair like the others
    return radius + 1


@fast
def _blur_columns(planes, start, y, size, count, weight, before, after, line):
    """Row y of the plane at planes[start], blurred vertically. -> line[S : 2 S]"""
    for t in range(count):
        before[t] = (abs(y - t) - y) * size
        after[t] = (size - 1 - abs(size - 1 - y - t) - y) * size
    for x in range(0, size, LANES):
        weigh_pairs(line, size + x, planes, start + y * size + x, weight, before, after, count)


@fast
def _blur_rows(line, size, count, weight, before, after, soft):
    """line[S : 2 S], blurred horizontally. -> soft (S,)"""
    for t in range(1, count):
        line[size - t] = line[size + t]
        line[2 * size - 1 + t] = line[2 * size - 1 - t]
    for t in range(count):
        before[t], after[t] = -t, t
    for x in range(0, size, LANES):
        weigh_pairs(soft, x, line, size + x, weight, before, after, count)


@fast
def _store_blurred(planes, size, row, normal, scratch, out, start, spacing, step):
    """Blur, solarize and normalise a view, and store it as `_store` does."""
    weight, before, after, line, soft = scratch
    count = _gaussian(row[SIGMA], size, weight)
    for c in range(3):
        gain, bias = normal[c], normal[3 + c]
        for y in range(size):
            _blur_columns(planes, c * size * size, y, size, count, weight, before, after, line)
            _blur_rows(line, size, count, weight, before, after, soft)
            o = np.uintp(start + c * spacing + y * size * step)
            if step == 1:
                for x in range(np.uintp(size)):
                    out[o + x] = finish(soft[x], row) * gain + bias
            else:
                for x in range(np.uintp(size)):
                    out[o + x + x + x] = finish(soft[x], row) * gain + bias


@fast
def _erase(row, size, out, view, spacing, step):
    top, left = int(row[ERASE_TOP]), int(row[ERASE_LEFT])
    for c in range(3):
        for y in range(top, top + int(row[ERASE_HEIGHT])):
            for x in range(left, left + int(row[ERASE_WIDTH])):
                out[view + c * spacing + (y * size + x) * step] = ZERO


def _sample_range(counter, count, grain, table, index, layout, first, seed, epoch, numbers):
    """Fill the `count` rows of table (V * N, columns), `grain` at a time, shared with other threads
    through `counter`. index (N,), layout (N, 3), numbers (V, ...)"""
    low = atomic_fetch_add(counter, grain)
    while low < count:
        for slot in range(low, min(low + grain, count)):
            v, n = slot // len(index), slot % len(index)
            height, width = np.float64(layout[n, 1]), np.float64(layout[n, 2])
            sample_view(table[slot], index[n], first + v, seed, epoch, height, width, numbers[v])
        low = atomic_fetch_add(counter, grain)


def _render_range(
    counter, count, grain, flat, layout, table, affine, colors, size, bicubic, last, numbers, out
):  # fmt: skip
    """Render the `count` rows of table (G * N, columns) into out (G * N * 3 * S * S), `grain` at a
    time, shared with other threads through `counter`."""
    longest_y, longest_x = 1, 1
    for slot in range(count):
        longest_y = max(longest_y, int(table[slot, HEIGHT]))
        longest_x = max(longest_x, int(table[slot, WIDTH]))
    taps_y, taps_x = max_taps(longest_y, size, bicubic), max_taps(longest_x, size, bicubic)
    first_y, first_x = np.empty(size, np.int64), np.empty(size, np.int64)
    count_y, count_x = np.empty(size, np.int64), np.empty(size, np.int64)
    weight_y = np.empty(size * taps_y, np.float32)
    weight_x = np.empty(size * taps_x, np.float32)
    line = np.zeros(3 * (longest_x + taps_x) + LANES, np.float32)  # read past its end, times zero
    color = np.empty(3 * size + 1, np.float32)
    area = size * size
    planes = np.zeros(3 * area + LANES, np.float32)
    scratch = (
        np.empty(size, np.float32),
        np.empty(size, np.int64),
        np.empty(size, np.int64),
        np.zeros(3 * size + LANES, np.float32),
        np.empty(size + LANES, np.float32),
    )
    normal = (
        np.float32(1 / numbers[STD]),
        np.float32(1 / numbers[STD + 1]),
        np.float32(1 / numbers[STD + 2]),
        np.float32(-numbers[MEAN] / numbers[STD]),
        np.float32(-numbers[MEAN + 1] / numbers[STD + 1]),
        np.float32(-numbers[MEAN + 2] / numbers[STD + 2]),
    )
    spacing, step = (1, 3) if last else (area, 1)
    strip = max(1, STRIP // size)
    low = atomic_fetch_add(counter, grain)
    while low < count:
        for slot in range(low, min(low + grain, count)):
            n = slot % len(layout)
            # a tuple, by value: the compiler then knows it constant within the loops
            row = to_fixed_tuple(table[slot], COUNT)
            stride = 3 * layout[n, 2]
            corner = layout[n, 0] + int(row[TOP]) * stride + 3 * int(row[LEFT])
            width = int(row[WIDTH])
            height, flip = int(row[HEIGHT]), row[FLIP] > 0
            fill_taps(height, size, bicubic, False, BYTE, first_y, count_y, weight_y, taps_y)
            max_count = fill_taps(
                width, size, bicubic, flip, ONE, first_x, count_x, weight_x, taps_x
            )
            contrast = 4
            for k in range(4):
                if row[STEP0 + k] == 1 and not affine:
                    contrast = k
            blurred = row[SIGMA] > 0
            view = 3 * area * slot
            mean = ZERO
            for sweep in range(2 if contrast < 4 else 1):
                for top in range(0, size, strip):
                    bottom = min(top + strip, size)
                    start, stop = top * size, bottom * size
                    if sweep == 0:
                        for y in range(top, bottom):
                            for c in range(0, 3, step):  # channels last is one run
                                prefetch_for_write(
                                    out, view + c * area + y * size * step, size * step
                                )
                            first, j = corner + first_y[y] * stride, y * taps_y
                            _blend_rows(flat, first, stride, width, weight_y, j, count_y[y], line)
                            _blend_columns(line, first_x, max_count, weight_x, taps_x, size, color)
                            _spread(color, y * size, size, planes)
                        if affine:
                            _recolor(planes, start, stop, area, to_fixed_tuple(colors[slot], 12))
                        else:
                            _jitter(planes, start, stop, area, 0, contrast, mean, row)
                        if contrast < 4:
                            mean += _luma_sum(planes, start, stop, area)
                            continue
                    else:
                        _jitter(planes, start, stop, area, contrast, 4, mean, row)
                    if blurred:
                        _tone(planes, start, stop, area, row)
                    else:
                        _store(planes, start, stop, size, row, normal, out, view, last)
                mean /= np.float32(area)
            if blurred:
                _store_blurred(planes, size, row, normal, scratch, out, view, spacing, step)
            _erase(row, size, out, view, spacing, step)
        low = atomic_fetch_add(counter, grain)


sample_range = _on_disk(_sample_range)
render_range = _on_disk(_render_range)
