"""The loops of the CPU back end, compiled with numba: one view at a time, in buffers that stay in
the cache.

A view is rendered in strips of a few rows that fit in the L1 cache. A row of the crop is the
weighted sum of source rows; its pixels are weighted sums of neighbours, one vector of four floats
per pixel (red, green, blue, and one that the next pixel overwrites). The colour steps before
contrast, which needs the mean of the view, run while the strip is in the cache; the others run in a
second sweep, which also normalises and stores. A blurred view needs a third.

A view that is rotated is resampled as a whole first, and one that is equalized is resampled from a
copy of its crop.

Shapes: N batch, C channels, h and w pixels of a view, K largest number of taps of a resampled
pixel.
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


def _on_disk(function: Callable[..., Any]) -> Any:
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
clamp, luma, turn = of_pixels.clamp, of_pixels.luma, of_pixels.turn

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
VERTICAL_FLIP, ANGLE = sample_params.VERTICAL_FLIP, sample_params.ANGLE
EQUALIZE, DEGREE = sample_params.EQUALIZE, np.float32(pixel_ops.DEGREE)
LEVELS = 256  # of a byte


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
    """Row `line` (3 * width) of the crop at `size` pixels: colors (3 * size), interleaved. weight
    (size * K)"""
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
def _spread(colors, start, size, area, planes):
    """colors (3 * size) into pixels `start` and following of planes (3 * area)."""
    r, spacing = np.uintp(start), np.uintp(area)
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
def _store(planes, start, stop, area, row, normal, out, view, last):
    """Grayscale, solarize, normalise pixels [start, stop) into the view at out[view], channels
    first or last."""
    gain_r, gain_g, gain_b, bias_r, bias_g, bias_b = normal
    n, m = np.uintp(area), np.uintp(2 * area)
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
def _blur_columns(planes, start, y, height, width, count, weight, before, after, line):
    """Row y of the plane at planes[start], blurred vertically. -> line[w : 2 w]"""
    for t in range(count):
        before[t] = (abs(y - t) - y) * width
        after[t] = (height - 1 - abs(height - 1 - y - t) - y) * width
    for x in range(0, width, LANES):
        weigh_pairs(line, width + x, planes, start + y * width + x, weight, before, after, count)


@fast
def _blur_rows(line, size, count, weight, before, after, soft):
    """line[w : 2 w], blurred horizontally. -> soft (w,)"""
    for t in range(1, count):
        line[size - t] = line[size + t]
        line[2 * size - 1 + t] = line[2 * size - 1 - t]
    for t in range(count):
        before[t], after[t] = -t, t
    for x in range(0, size, LANES):
        weigh_pairs(soft, x, line, size + x, weight, before, after, count)


@fast
def _store_blurred(planes, height, width, row, normal, scratch, out, start, spacing, step):
    """Blur, solarize and normalise a view, and store it as `_store` does."""
    weight_y, weight_x, before, after, line, soft = scratch
    count_y = _gaussian(row[SIGMA], height, weight_y)
    count_x = _gaussian(row[SIGMA], width, weight_x)
    for c in range(3):
        gain, bias = normal[c], normal[3 + c]
        for y in range(height):
            first = c * height * width
            _blur_columns(planes, first, y, height, width, count_y, weight_y, before, after, line)
            _blur_rows(line, width, count_x, weight_x, before, after, soft)
            o = np.uintp(start + c * spacing + y * width * step)
            if step == 1:
                for x in range(np.uintp(width)):
                    out[o + x] = finish(soft[x], row) * gain + bias
            else:
                for x in range(np.uintp(width)):
                    out[o + x + x + x] = finish(soft[x], row) * gain + bias


@fast
def _erase(row, width, out, view, spacing, step):
    top, left = int(row[ERASE_TOP]), int(row[ERASE_LEFT])
    for c in range(3):
        for y in range(top, top + int(row[ERASE_HEIGHT])):
            for x in range(left, left + int(row[ERASE_WIDTH])):
                out[view + c * spacing + (y * width + x) * step] = ZERO


@exact
def _equalize(flat, corner, stride, height, width, histogram, copy):
    """The crop at flat[corner], with the histogram of each channel equalized. -> copy (3 * height *
    width)"""
    histogram[:] = 0
    for y in range(height):
        for i in range(3 * width):
            histogram[i % 3, flat[corner + y * stride + i]] += 1
    for c in range(3):
        brightest = LEVELS - 1
        while histogram[c, brightest] == 0:
            brightest -= 1
        step = (height * width - histogram[c, brightest]) // 255
        below = 0
        for level in range(LEVELS):
            count = histogram[c, level]
            histogram[c, level] = min((below + step // 2) // step, 255) if step > 0 else level
            below += count
    for y in range(height):
        for i in range(3 * width):
            copy[y * 3 * width + i] = histogram[i % 3, flat[corner + y * stride + i]]


@exact
def _rotate(planes, height, width, angle, rotated):
    """The view in planes (3 * h * w) rotated around its centre, bilinear, black outside. `rotated`
    is memory for a copy."""
    area = height * width
    cos, sin = np.float32(np.cos(angle * DEGREE)), np.float32(np.sin(angle * DEGREE))
    middle_y, middle_x = np.float32(height - 1) * HALF, np.float32(width - 1) * HALF
    rotated[: 3 * area] = planes[: 3 * area]
    for y in range(height):
        for x in range(width):
            to_y, to_x = np.float32(y) - middle_y, np.float32(x) - middle_x
            from_y, from_x = turn(to_y, to_x, cos, sin)
            from_y, from_x = from_y + middle_y, from_x + middle_x
            top, left = int(np.floor(from_y)), int(np.floor(from_x))
            down, right = from_y - np.float32(top), from_x - np.float32(left)
            for c in range(3):
                value = ZERO
                for corner in range(4):
                    i, j = top + corner // 2, left + corner % 2
                    if 0 <= i < height and 0 <= j < width:
                        share = down if corner // 2 else ONE - down
                        share *= right if corner % 2 else ONE - right
                        value += share * rotated[c * area + i * width + j]
                planes[c * area + y * width + x] = value


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


@exact
def first_misfit(table, layout, low, high, fraction, height, width):
    """`checks.misfits`: the first row of table (G * N, columns) that does not fit its image of
    layout (N, 3) or the view; -1 where all do. low, high, fraction (columns,): the limits, and
    whether a number need not be whole."""
    for slot in range(len(table)):
        row, image = table[slot], layout[slot % len(layout)]
        fits = True
        for column in range(COUNT):  # without a branch, so that it vectorises; NaN fits nowhere
            x = row[column]
            fits &= (x >= low[column]) & (x <= high[column])
            fits &= (x == np.floor(x)) | fraction[column]
        fits &= (row[TOP] + row[HEIGHT] <= image[1]) & (row[LEFT] + row[WIDTH] <= image[2])
        fits &= row[ERASE_TOP] + row[ERASE_HEIGHT] <= height
        fits &= row[ERASE_LEFT] + row[ERASE_WIDTH] <= width
        if not fits:
            return slot
    return -1


def _render_range(
    counter, count, grain, flat, layout, table, drawn, low_bound, high_bound, fraction, affine,
    colors, height, width, bicubic, last, numbers, out,
):  # fmt: skip
    """Render the `count` rows of table (G * N, columns) into out (G * N * 3 * h * w), `grain` at a
    time, shared with other threads through `counter`. -> -1, or, unless all rows are `drawn` for
    these images, the first that does not fit; then nothing is rendered"""
    if not drawn:
        misfit = first_misfit(table, layout, low_bound, high_bound, fraction, height, width)
        if misfit >= 0:
            return misfit
    longest_y, longest_x, rotates, largest = 1, 1, False, 0
    for slot in range(count):
        longest_y = max(longest_y, int(table[slot, HEIGHT]))
        longest_x = max(longest_x, int(table[slot, WIDTH]))
        rotates |= table[slot, ANGLE] != 0
        if table[slot, EQUALIZE] > 0:
            largest = max(largest, 3 * int(table[slot, HEIGHT]) * int(table[slot, WIDTH]))
    taps_y, taps_x = max_taps(longest_y, height, bicubic), max_taps(longest_x, width, bicubic)
    first_y, first_x = np.empty(height, np.int64), np.empty(width, np.int64)
    count_y, count_x = np.empty(height, np.int64), np.empty(width, np.int64)
    weight_y = np.empty(height * taps_y, np.float32)
    weight_x = np.empty(width * taps_x, np.float32)
    line = np.zeros(3 * (longest_x + taps_x) + LANES, np.float32)  # read past its end, times zero
    color = np.empty(3 * width + 1, np.float32)
    area = height * width
    planes = np.zeros(3 * area + LANES, np.float32)
    unrotated = np.empty(3 * area if rotates else 0, np.float32)
    equalized = np.empty(largest, np.uint8)
    histogram = np.empty((3, LEVELS), np.int64)
    scratch = (
        np.empty(height, np.float32),
        np.empty(width, np.float32),
        np.empty(max(height, width), np.int64),
        np.empty(max(height, width), np.int64),
        np.zeros(3 * width + LANES, np.float32),
        np.empty(width + LANES, np.float32),
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
    strip = max(1, STRIP // width)
    low = atomic_fetch_add(counter, grain)
    while low < count:
        for slot in range(low, min(low + grain, count)):
            n = slot % len(layout)
            # a tuple, by value: the compiler then knows it constant within the loops
            row = to_fixed_tuple(table[slot], COUNT)
            stride = 3 * layout[n, 2]
            corner = layout[n, 0] + int(row[TOP]) * stride + 3 * int(row[LEFT])
            tall, wide = int(row[HEIGHT]), int(row[WIDTH])
            source = flat
            if row[EQUALIZE] > 0:
                _equalize(flat, corner, stride, tall, wide, histogram, equalized)
                source, corner, stride = equalized, 0, 3 * wide
            fill_taps(
                tall, height, bicubic, row[VERTICAL_FLIP] > 0, BYTE, first_y, count_y, weight_y,
                taps_y,
            )  # fmt: skip
            max_count = fill_taps(
                wide, width, bicubic, row[FLIP] > 0, ONE, first_x, count_x, weight_x, taps_x
            )
            contrast = 4
            for k in range(4):
                if row[STEP0 + k] == 1 and not affine:
                    contrast = k
            rotated, blurred = row[ANGLE] != 0, row[SIGMA] > 0
            view = 3 * area * slot
            mean = ZERO
            # sweep -1 resamples alone, as a rotation needs the whole view
            for sweep in range(-1 if rotated else 0, 2 if contrast < 4 else 1):
                for top in range(0, height, strip):
                    bottom = min(top + strip, height)
                    start, stop = top * width, bottom * width
                    if sweep == (-1 if rotated else 0):
                        for y in range(top, bottom):
                            for c in range(0, 3, step):  # channels last is one run
                                prefetch_for_write(
                                    out, view + c * area + y * width * step, width * step
                                )
                            first, j = corner + first_y[y] * stride, y * taps_y
                            _blend_rows(source, first, stride, wide, weight_y, j, count_y[y], line)
                            _blend_columns(line, first_x, max_count, weight_x, taps_x, width, color)
                            _spread(color, y * width, width, area, planes)
                    if sweep < 0:
                        continue
                    if sweep == 0:
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
                        _store(planes, start, stop, area, row, normal, out, view, last)
                if sweep < 0:
                    _rotate(planes, height, width, row[ANGLE], unrotated)
                mean /= np.float32(area)
            if blurred:
                _store_blurred(
                    planes, height, width, row, normal, scratch, out, view, spacing, step
                )
            _erase(row, width, out, view, spacing, step)
        low = atomic_fetch_add(counter, grain)
    return -1


sample_range = _on_disk(_sample_range)
render_range = _on_disk(_render_range)
