"""Views on the CPU, compiled with numba: a few threads, the GIL released, no worker processes.

One view at a time, from its bytes to its normalised floats, in buffers that stay in the cache: rows
are resampled first (whole source rows, weighted), then columns; colour, blur and normalisation run
over three planes of S * S floats.

Shapes: N batch, C channels, S pixels per side, K most taps of a resampled pixel.
"""

# mypy: disable-error-code="no-untyped-def"
# ^ numba infers the types of what it compiles

import hashlib
import math
import os
import sys
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from pathlib import Path
from threading import Lock
from types import SimpleNamespace
from typing import Any

import numba
import numpy as np
import torch
from numba.np.unsafe.ndarray import to_fixed_tuple
from torch import Tensor

from fastssl_pipelines import randomness
from fastssl_pipelines.augment import draws, pixels
from fastssl_pipelines.augment.affine import color_maps
from fastssl_pipelines.augment.images import Images
from fastssl_pipelines.augment.rebind import rebind
from fastssl_pipelines.augment.reference import BLUR_REACH
from fastssl_pipelines.spec import View

BUFFERS = 8  # at most so many outputs are kept to be used again
UNUSED = 3  # references to a buffer that no tensor holds: the deque's, the loop's, the call's
CHUNKS_PER_THREAD = 4  # a thread that is done early takes over work of a slower one
RELAXED = {"contract", "reassoc", "arcp", "nsz", "nnan", "ninf"}  # lets sums and selects vectorise

_buffers: deque[np.ndarray] = deque(maxlen=BUFFERS)
_buffers_lock = Lock()

exact = numba.njit(nogil=True, error_model="numpy")
fast = numba.njit(nogil=True, error_model="numpy", fastmath=RELAXED)


def _on_disk(function: Callable[..., None]) -> Any:
    """`function`, compiled once per machine: in __pycache__, else in the user's cache folder.

    numba looks for changes in this file alone, so the cached file's name has the formulas' digest.
    Where no folder can be written, each process compiles for itself.
    """
    formulas = (Path(str(m.__file__)).read_bytes() for m in (randomness, draws, pixels))
    function.__qualname__ += "-" + hashlib.sha256(b"".join(formulas)).hexdigest()[:16]
    try:
        return numba.njit(nogil=True, error_model="numpy", cache=True)(function)
    except RuntimeError:  # numba found no place for its cache
        return exact(function)


@exact
def _put(row, column, value):
    row[column] = value


def _single(number: float) -> Any:
    """Floats as float32: with a Python float numba would compute in fp64."""
    return np.float32(number) if isinstance(number, float) else number


_DRAWS = {
    "number": exact(lambda numbers, which: numbers[which]),
    "put": _put,
    "real": exact(lambda word: np.float64(word)),
    "indicator": exact(lambda condition: 1.0 if condition else 0.0),
    "some": exact(lambda condition: condition),
    "sqrt": exact(lambda x: np.sqrt(x)),
    "floor": exact(lambda x: np.floor(x)),
    "where": exact(lambda condition, x, y: x if condition else y),
}
_PIXELS = {
    "get": fast(lambda row, column: row[column]),
    "where": fast(lambda condition, x, y: x if condition else y),
}
_d = SimpleNamespace(**rebind([randomness, draws], _DRAWS, exact, lambda number: number))
_p = SimpleNamespace(**rebind([pixels], _PIXELS, fast, _single))
draw_view = _d.draw_view
adjust, tone, finish, clamp, luma = _p.adjust, _p.tone, _p.finish, _p.clamp, _p.luma
recolor, triangle, cubic = _p.recolor, _p.triangle, _p.cubic

ZERO, HALF, ONE, TWO = (np.float32(x) for x in (0, 0.5, 1, 2))
BYTE = np.float32(1 / 255)
REACH = np.float32(BLUR_REACH)
MEAN, STD = draws.MEAN, draws.STD
STEP0, STEP3, SIGMA = draws.STEP0, draws.STEP3, draws.SIGMA
TOP, LEFT, HEIGHT, WIDTH, FLIP = draws.TOP, draws.LEFT, draws.HEIGHT, draws.WIDTH, draws.FLIP
COUNT = len(draws.COLUMNS)
ERASE_TOP, ERASE_LEFT = draws.ERASE_TOP, draws.ERASE_LEFT
ERASE_HEIGHT, ERASE_WIDTH = draws.ERASE_HEIGHT, draws.ERASE_WIDTH


@fast
def _taps(longest, size, bicubic):
    """Room for the taps of a crop up to `longest`: first (S,), count (S,), weight (S, K)."""
    most = (4 if bicubic else 2) * max(1, -(-longest // size)) + 2
    return np.empty(size, np.int64), np.empty(size, np.int64), np.empty((size, most), np.float32)


@fast
def _fill_taps(length, bicubic, flip, gain, first, count, weight):
    """Fill `_taps`: which of `length` pixels make each of S pixels, and how much."""
    size = len(first)
    scale = np.float32(length) / np.float32(size)
    stretch = max(scale, ONE)  # antialias
    support = stretch * (TWO if bicubic else ONE)
    for i in range(size):
        center = (np.float32(i) + HALF) * scale
        low = max(0, int(np.floor(center - support + HALF)))
        high = min(length, int(np.floor(center + support + HALF)))
        o = size - 1 - i if flip else i
        total = ZERO
        for k in range(high - low):
            distance = (np.float32(low + k) + HALF - center) / stretch
            w = cubic(distance) if bicubic else triangle(distance)
            weight[o, k] = w
            total += w
        for k in range(high - low):
            weight[o, k] *= gain / total
        first[o] = low
        count[o] = high - low


@fast
def _resample(source, stride, height, width, size, taps_y, taps_x, line, planes):
    """Crop, resize, flip into planes (3, S * S). `source` starts at the crop; rows are `stride`
    apart."""
    first_y, count_y, weight_y = taps_y
    first_x, count_x, weight_x = taps_x
    for y in range(size):
        line[: 3 * width] = ZERO
        for k in range(count_y[y]):
            w = weight_y[y, k]
            values = source[(first_y[y] + k) * stride :]
            for i in range(3 * width):
                line[i] += w * np.float32(values[i])
        for x in range(size):
            r = g = b = ZERO
            i = 3 * first_x[x]
            for k in range(count_x[x]):
                w = weight_x[x, k]
                r += w * line[i]
                g += w * line[i + 1]
                b += w * line[i + 2]
                i += 3
            o = y * size + x
            planes[0, o], planes[1, o], planes[2, o] = clamp(r), clamp(g), clamp(b)


@fast
def _jitter(planes, row):
    """The colour steps in this view's order; one loop each, so that each is vectorised."""
    r, g, b = planes[0], planes[1], planes[2]
    for slot in range(STEP0, STEP3 + 1):
        step = row[slot]
        mean = ZERO
        if step == 1:
            for i in range(len(r)):
                mean += luma(r[i], g[i], b[i])
            mean /= np.float32(len(r))
        if step == 0:
            for i in range(len(r)):
                r[i], g[i], b[i] = adjust(0, r[i], g[i], b[i], mean, row)
        elif step == 1:
            for i in range(len(r)):
                r[i], g[i], b[i] = adjust(1, r[i], g[i], b[i], mean, row)
        elif step == 2:
            for i in range(len(r)):
                r[i], g[i], b[i] = adjust(2, r[i], g[i], b[i], mean, row)
        elif step == 3:
            for i in range(len(r)):
                r[i], g[i], b[i] = adjust(3, r[i], g[i], b[i], mean, row)


@fast
def _recolor(planes, color):
    r, g, b = planes[0], planes[1], planes[2]
    for i in range(len(r)):
        r[i], g[i], b[i] = recolor(r[i], g[i], b[i], color)


@fast
def _tone(planes, row):
    r, g, b = planes[0], planes[1], planes[2]
    for i in range(len(r)):
        r[i], g[i], b[i] = tone(r[i], g[i], b[i], row)


@fast
def _blur(plane, sigma, weight, rows):
    """Gaussian of plane (S, S), in place. weight (S,) and rows (S, S) are scratch."""
    size = len(plane)
    radius = min(int(np.ceil(REACH * sigma)), size - 1)
    total = -ONE
    for t in range(radius + 1):
        x = np.float32(t) / sigma
        weight[t] = np.exp(-HALF * x * x)
        total += TWO * weight[t]
    for t in range(radius + 1):
        weight[t] /= total
    for y in range(size):
        for x in range(size):
            rows[y, x] = weight[0] * plane[y, x]
        for t in range(1, radius + 1):
            above = plane[abs(y - t)]
            below = plane[size - 1 - abs(size - 1 - y - t)]
            w = weight[t]
            for x in range(size):
                rows[y, x] += w * (above[x] + below[x])
    padded = np.empty(size + 2 * radius, np.float32)
    for y in range(size):
        for x in range(size):
            padded[radius + x] = rows[y, x]
        for t in range(1, radius + 1):
            padded[radius - t] = rows[y, t]
            padded[radius + size - 1 + t] = rows[y, size - 1 - t]
        for x in range(size):
            plane[y, x] = weight[0] * rows[y, x]
        for t in range(1, radius + 1):
            before, after, w = padded[radius - t :], padded[radius + t :], weight[t]
            for x in range(size):
                plane[y, x] += w * (before[x] + after[x])


@fast
def _store(planes, row, numbers, last, size, out):
    """Solarize, normalise, erase; out (3 * S * S,), channels first or last."""
    for c in range(3):
        plane = planes[c]
        gain, shift = np.float32(1 / numbers[STD + c]), np.float32(numbers[MEAN + c])
        if last:
            for i in range(size * size):
                out[3 * i + c] = (finish(plane[i], row) - shift) * gain
        else:
            image = out[c * size * size : (c + 1) * size * size]
            for i in range(size * size):
                image[i] = (finish(plane[i], row) - shift) * gain
        top, left = int(row[ERASE_TOP]), int(row[ERASE_LEFT])
        for y in range(top, top + int(row[ERASE_HEIGHT])):
            for x in range(left, left + int(row[ERASE_WIDTH])):
                i = y * size + x
                out[3 * i + c if last else c * size * size + i] = ZERO


def _draw_range(low, high, table, index, place, first, seed, epoch, numbers):
    """Rows [low, high) of table (V * N, columns); index (N,), place (N, 3), numbers (V, ...)."""
    for slot in range(low, high):
        v, n = slot // len(index), slot % len(index)
        height, width = np.float64(place[n, 1]), np.float64(place[n, 2])
        draw_view(table[slot], index[n], first + v, seed, epoch, height, width, numbers[v])


def _render_range(
    low, high, flat, place, table, affine, colors, size, bicubic, last, numbers, out
):  # fmt: skip
    """Rows [low, high) of out (G * N, 3 * S * S) from those of table (G * N, columns)."""
    longest_y, longest_x = 1, 1
    for slot in range(low, high):
        longest_y = max(longest_y, int(table[slot, HEIGHT]))
        longest_x = max(longest_x, int(table[slot, WIDTH]))
    taps_y = _taps(longest_y, size, bicubic)
    taps_x = _taps(longest_x, size, bicubic)
    line = np.empty(3 * longest_x, np.float32)
    planes = np.empty((3, size * size), np.float32)
    weight = np.empty(size, np.float32)
    rows = np.empty((size, size), np.float32)
    for slot in range(low, high):
        n = slot % len(place)
        row = to_fixed_tuple(
            table[slot], COUNT
        )  # by value: nothing it says can change inside a loop
        height, width = int(row[HEIGHT]), int(row[WIDTH])
        stride = 3 * place[n, 2]
        source = flat[place[n, 0] + int(row[TOP]) * stride + 3 * int(row[LEFT]) :]
        _fill_taps(height, bicubic, False, BYTE, *taps_y)
        _fill_taps(width, bicubic, row[FLIP] > 0, ONE, *taps_x)
        _resample(source, stride, height, width, size, taps_y, taps_x, line, planes)
        if affine:
            _recolor(planes, to_fixed_tuple(colors[slot], 12))
        else:
            _jitter(planes, row)
        _tone(planes, row)
        if row[SIGMA] > 0:
            for c in range(3):
                _blur(planes[c].reshape(size, size), row[SIGMA], weight, rows)
        _store(planes, row, numbers, last, size, out[slot])


_draw_range = _on_disk(_draw_range)
_render_range = _on_disk(_render_range)


def draw(
    views: Sequence[View], seed: int, epoch: int | Tensor, index: Tensor, place: Tensor, first: int
) -> Tensor:
    """`reference.draw`, bit for bit. -> (V, N, columns)"""
    columns = len(draws.COLUMNS)
    table = torch.empty(len(views), len(index), columns)
    numbers = np.array([draws.view_numbers(view) for view in views])
    arguments = (table.view(-1, columns), index.contiguous(), place.contiguous())
    _in_chunks(_draw_range, len(views) * len(index), arguments, first, seed, int(epoch), numbers)
    return table


def render(images: Images, table: Tensor, view: View, quality: str) -> Tensor:
    """`reference.render`, within 1/255. -> (G, N, 3, S, S)"""
    groups, count, columns = table.shape
    size, last = view.size, view.channels_last
    shape = (groups, count, size, size, 3) if last else (groups, count, 3, size, size)
    out = _empty(math.prod(shape)).view(shape)
    affine = quality == "affine"
    rows = table.reshape(-1, columns)
    colors = color_maps(rows) if affine else rows[:0, :12]
    _in_chunks(
        _render_range,
        groups * count,
        (images.flat, images.place.contiguous(), rows),
        affine,
        colors.contiguous().numpy(),
        size,
        view.interpolation == "bicubic",
        last,
        np.array(draws.view_numbers(view)),
        out.view(groups * count, 3 * size * size).numpy(),
    )
    return (out.movedim(-1, 2) if last else out).to(view.dtype)


def _empty(count: int) -> Tensor:
    """float32 (count,), in memory of an earlier batch that nobody looks at any more, if there is
    any.

    The first touch of fresh pages costs as much time as rendering small views into them.
    """
    with _buffers_lock:
        for buffer in _buffers:
            if buffer.size == count and sys.getrefcount(buffer) == UNUSED:
                return torch.from_numpy(buffer)  # holds a reference for as long as it lives
        _buffers.append(np.empty(count, np.float32))
        return torch.from_numpy(_buffers[-1])


def _in_chunks(kernel: Any, count: int, tensors: tuple[Tensor, ...], *arguments: Any) -> None:
    """kernel(low, high, *tensors, *arguments) over `count` rows, on as many threads as torch
    uses."""
    threads = torch.get_num_threads()
    chunks = max(1, min(count, threads * CHUNKS_PER_THREAD))
    bounds = [count * i // chunks for i in range(chunks + 1)]
    shared: tuple[Any, ...] = (*(tensor.numpy() for tensor in tensors), *arguments)
    pool = _threads(os.getpid(), threads)
    work = [pool.submit(kernel, low, high, *shared) for low, high in pairwise(bounds)]
    for chunk in work:
        chunk.result()


@cache
def _threads(process: int, count: int) -> ThreadPoolExecutor:
    """One pool for this process: a forked child has not got its parent's threads."""
    return ThreadPoolExecutor(count, thread_name_prefix="fastssl-views")
