"""The Triton kernels: one samples parameters, two render views, one blurs them.

A program renders one view. Resampling is two products with weight matrices, out = Wy @ image @
Wx^T, one window of the source at a time, for any scale: antialias needs no extra code. The
Gaussian blur is the same with other weights. The operands are fp16 (bytes are exact in it, weights
carry 11 bits), the sums fp32.

Up to 32 px a view is one tile in registers, including its blur. Above, a program loops over tiles,
twice where a contrast step needs the mean first, and stores views to be blurred as bytes for a
second kernel.

Shapes: N batch, G views rendered together, S pixels per side, B tile side, W window side.
"""

# mypy: disable-error-code="no-untyped-def"
# ^ Triton infers the types of what it compiles

from types import SimpleNamespace

import triton
import triton.language as tl

from fastssl_pipelines import rng
from fastssl_pipelines.augment import pixel_ops, sample_params
from fastssl_pipelines.augment.reference import BLUR_REACH
from fastssl_pipelines.augment.retarget import retarget


@triton.jit
def _number(numbers, which):
    return tl.load(numbers + which)


@triton.jit
def _put(row, column, value):
    tl.store(row + column, value.to(tl.float32))


@triton.jit
def _real(word):
    return word.to(tl.float64)


@triton.jit
def _any_true(condition):
    return tl.max(condition.to(tl.int32), axis=0) > 0


@triton.jit
def _sqrt(x):
    return tl.sqrt(x)


@triton.jit
def _floor(x):
    return tl.floor(x)


@triton.jit
def _where(condition, x, y):
    return tl.where(condition, x, y)


@triton.jit
def _larger(x, y):
    return tl.maximum(x, y)


@triton.jit
def _smaller(x, y):
    return tl.minimum(x, y)


@triton.jit
def _magnitude(x):
    return tl.abs(x)


@triton.jit
def _get(row, column):
    return tl.load(row + column)


_primitives = {
    "tl": tl,
    "number": _number,
    "put": _put,
    "real": _real,
    "indicator": _real,
    "any_true": _any_true,
    "sqrt": _sqrt,
    "floor": _floor,
    "where": _where,
    "larger": _larger,  # one instruction each, where `where` takes two
    "smaller": _smaller,
    "magnitude": _magnitude,
    "get": _get,
}


def _constant(number: float) -> object:
    """A global that kernels may read; a plain number for the interpreter, where constexpr * tensor
    fails."""
    return tl.constexpr(number) if isinstance(_number, triton.JITFunction) else number


_f = SimpleNamespace(
    **retarget([rng, sample_params, pixel_ops], _primitives, triton.jit, _constant)
)
sample_view = _f.sample_view
adjust, recolor, tone, finish = _f.adjust, _f.recolor, _f.tone, _f.finish
clamp, luma = _f.clamp, _f.luma
triangle, cubic = _f.triangle, _f.cubic
REACH = _constant(BLUR_REACH)
TOP, LEFT, HEIGHT, WIDTH, FLIP = _f.TOP, _f.LEFT, _f.HEIGHT, _f.WIDTH, _f.FLIP
STEP0, SIGMA, MEAN, STD = _f.STEP0, _f.SIGMA, _f.MEAN, _f.STD
ERASE_TOP, ERASE_LEFT = _f.ERASE_TOP, _f.ERASE_LEFT
ERASE_HEIGHT, ERASE_WIDTH = _f.ERASE_HEIGHT, _f.ERASE_WIDTH


@triton.jit
def _sample_kernel(
    table_ptr, index_ptr, layout_ptr, numbers_ptr, key_ptr, first, N, COLUMNS: tl.constexpr,
    NUMBERS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    view = tl.program_id(1)
    sample = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sample = tl.minimum(sample, N - 1)  # lanes beyond the end repeat the last sample
    row = table_ptr + (view.to(tl.int64) * N + sample) * COLUMNS
    index = tl.load(index_ptr + sample)
    height = tl.load(layout_ptr + 3 * sample + 1).to(tl.float64)
    width = tl.load(layout_ptr + 3 * sample + 2).to(tl.float64)
    seed, epoch = tl.load(key_ptr), tl.load(key_ptr + 1)
    numbers = numbers_ptr + view * NUMBERS
    sample_view(row, index, index * 0 + (first + view), seed, epoch, height, width, numbers)


@triton.jit
def _reach(start, stop, length, SIZE: tl.constexpr, CUBIC: tl.constexpr):
    """Source pixels [low, high) that outputs [start, stop) need."""
    scale = length / SIZE
    support = tl.maximum(scale, 1.0) * (2.0 if CUBIC else 1.0)
    low = tl.floor((start + 0.5) * scale - support + 0.5)
    high = tl.floor((stop - 0.5) * scale + support + 0.5)
    return tl.maximum(low, 0.0).to(tl.int32), tl.minimum(high, length).to(tl.int32)


@triton.jit
def _weights(output, source, length, SIZE: tl.constexpr, CUBIC: tl.constexpr):
    """Weights, not normalised, of source pixels (W,) in output pixels (B,). -> (B, W)"""
    scale = length / SIZE
    shrink = 1.0 / tl.maximum(scale, 1.0)
    distance = ((source + 0.5) * shrink)[None, :] - ((output + 0.5) * (scale * shrink))[:, None]
    if CUBIC:
        weight = cubic(distance)
    else:
        weight = triangle(distance)
    return tl.where((source < length)[None, :], weight, 0.0)


@triton.jit
def _product(wy, image, wx, sums):
    """sums + wy @ image @ wx^T: (B, W) @ (W, W) @ (W, B)"""
    rows = tl.dot(wy, image).to(tl.float16)
    return tl.dot(rows, tl.trans(wx), sums)


@triton.jit
def _resample(
    image_ptr, stride, row, y0, x0, SIZE: tl.constexpr, CUBIC: tl.constexpr, B: tl.constexpr,
    W: tl.constexpr,
):  # fmt: skip
    """Tile (y0, x0) of the cropped, resized, flipped image: r, g, b (B, B), fp32 in [0, 1]."""
    height, width = _get(row, HEIGHT), _get(row, WIDTH)
    image_ptr += _get(row, TOP).to(tl.int64) * stride + _get(row, LEFT).to(tl.int64) * 3
    y = tl.minimum(y0 + tl.arange(0, B), SIZE - 1)  # outside the view: its last row and column
    x = tl.minimum(x0 + tl.arange(0, B), SIZE - 1)
    flip = _get(row, FLIP) > 0
    x = tl.where(flip, SIZE - 1 - x, x)
    y_low, y_high = _reach(y0, tl.minimum(y0 + B, SIZE), height, SIZE, CUBIC)
    left = tl.where(flip, SIZE - tl.minimum(x0 + B, SIZE), x0)
    right = tl.where(flip, SIZE - x0, tl.minimum(x0 + B, SIZE))
    x_low, x_high = _reach(left, right, width, SIZE, CUBIC)
    r = tl.zeros([B, B], tl.float32)
    g = tl.zeros([B, B], tl.float32)
    b = tl.zeros([B, B], tl.float32)
    total = tl.zeros([B, B], tl.float32)
    for sy in range(y_low, y_high, W):
        ys = sy + tl.arange(0, W)
        wy = _weights(y, ys, height, SIZE, CUBIC).to(tl.float16)
        for sx in range(x_low, x_high, W):
            xs = sx + tl.arange(0, W)
            wx = _weights(x, xs, width, SIZE, CUBIC).to(tl.float16)
            at = image_ptr + (ys[:, None] * stride + xs[None, :] * 3)  # int32: one image < 2 GiB
            inside = (ys < height)[:, None] & (xs < width)[None, :]
            r = _product(wy, tl.load(at, inside, 0).to(tl.float16), wx, r)
            g = _product(wy, tl.load(at + 1, inside, 0).to(tl.float16), wx, g)
            b = _product(wy, tl.load(at + 2, inside, 0).to(tl.float16), wx, b)
            total += tl.sum(wy.to(tl.float32), 1)[:, None] * tl.sum(wx.to(tl.float32), 1)[None, :]
    gain = 1.0 / (255.0 * total)
    return clamp(r * gain), clamp(g * gain), clamp(b * gain)  # bicubic overshoots


@triton.jit
def _luma_sum(r, g, b, row, y, x, SIZE: tl.constexpr):
    """Sum of the luma before the contrast step, over the pixels of a tile inside the view."""
    before = 1
    for slot in range(4):
        step = _get(row, STEP0 + slot)
        before = tl.where(step == 1, 0, before)
        r, g, b = adjust(tl.where(before == 1, step, -1.0), r, g, b, 0.0, row)
    inside = (y < SIZE)[:, None] & (x < SIZE)[None, :]
    return tl.sum(tl.where(inside, luma(r, g, b), 0.0))


@triton.jit
def _color(r, g, b, row, mean, color_ptr, AFFINE: tl.constexpr):
    """The colour steps in the order of this view, or one affine map for all; then `tone`."""
    if AFFINE:
        r, g, b = recolor(r, g, b, color_ptr)
    else:
        for slot in range(4):
            r, g, b = adjust(_get(row, STEP0 + slot), r, g, b, mean, row)
    return tone(r, g, b, row)


@triton.jit
def _gaussian(output, source, sigma, SIZE: tl.constexpr):
    """Weights, not normalised, of source pixels (W,) in output pixels (B,), borders reflected. ->
    (B, W)"""
    radius = tl.minimum(tl.ceil(REACH * sigma), SIZE - 1)
    here = _density(source[None, :] - output[:, None], sigma, radius)
    before = _density(source[None, :] + output[:, None], sigma, radius)
    after = _density(2 * (SIZE - 1) - source[None, :] - output[:, None], sigma, radius)
    weight = here + tl.where((source > 0)[None, :], before, 0.0)
    weight += tl.where((source < SIZE - 1)[None, :], after, 0.0)
    return tl.where(((source >= 0) & (source < SIZE))[None, :], weight, 0.0)


@triton.jit
def _density(distance, sigma, radius):
    x = distance * (1.0 / sigma)
    return tl.where(tl.abs(distance) <= radius, tl.exp(-0.5 * x * x), 0.0)


@triton.jit
def _store(
    out_ptr, channel: tl.constexpr, value, row, numbers_ptr, y, x, SIZE: tl.constexpr,
    LAST: tl.constexpr,
):  # fmt: skip
    """Solarize, normalise, erase and write one channel of a tile."""
    mean = tl.load(numbers_ptr + MEAN + channel).to(tl.float32)
    std = tl.load(numbers_ptr + STD + channel).to(tl.float32)
    value = (finish(value, row) - mean) * (1.0 / std)
    top, left = _get(row, ERASE_TOP), _get(row, ERASE_LEFT)
    rows = (y >= top) & (y < top + _get(row, ERASE_HEIGHT))
    columns = (x >= left) & (x < left + _get(row, ERASE_WIDTH))
    value = tl.where(rows[:, None] & columns[None, :], 0.0, value)
    pixel = y[:, None] * SIZE + x[None, :]
    at = pixel * 3 + channel if LAST else channel * SIZE * SIZE + pixel
    inside = (y < SIZE)[:, None] & (x < SIZE)[None, :]
    tl.store(out_ptr + at, value.to(out_ptr.dtype.element_ty), inside)


@triton.jit
def _store_pixels(out_ptr, r, g, b, row, numbers_ptr, y, x, SIZE: tl.constexpr, LAST: tl.constexpr):
    _store(out_ptr, 0, r, row, numbers_ptr, y, x, SIZE, LAST)
    _store(out_ptr, 1, g, row, numbers_ptr, y, x, SIZE, LAST)
    _store(out_ptr, 2, b, row, numbers_ptr, y, x, SIZE, LAST)


@triton.jit
def _whole_kernel(
    flat_ptr, layout_ptr, table_ptr, color_ptr, numbers_ptr, out_ptr, N, G, COLUMNS: tl.constexpr,
    SIZE: tl.constexpr, CUBIC: tl.constexpr, LAST: tl.constexpr, AFFINE: tl.constexpr,
    B: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    n, view = tl.program_id(0) // G, tl.program_id(0) % G  # views of one image side by side: L2
    slot = view.to(tl.int64) * N + n
    row = table_ptr + slot * COLUMNS
    image_ptr = flat_ptr + tl.load(layout_ptr + 3 * n)
    stride = 3 * tl.load(layout_ptr + 3 * n + 2).to(tl.int32)
    y = tl.arange(0, B)
    r, g, b = _resample(image_ptr, stride, row, 0, 0, SIZE, CUBIC, B, W)
    mean = 0.0
    if not AFFINE:
        if _get(row, STEP0) >= 0:
            mean = _luma_sum(r, g, b, row, y, y, SIZE) / (SIZE * SIZE)
    r, g, b = _color(r, g, b, row, mean, color_ptr + slot * 12, AFFINE)
    sigma = _get(row, SIGMA)
    if sigma > 0:
        weight = _gaussian(tl.minimum(y, SIZE - 1), y, sigma, SIZE)
        weight = (weight / tl.sum(weight, 1)[:, None]).to(tl.float16)
        zeros = tl.zeros([B, B], tl.float32)
        r = _product(weight, r.to(tl.float16), weight, zeros)
        g = _product(weight, g.to(tl.float16), weight, zeros)
        b = _product(weight, b.to(tl.float16), weight, zeros)
    _store_pixels(out_ptr + slot * (3 * SIZE * SIZE), r, g, b, row, numbers_ptr, y, y, SIZE, LAST)


@triton.jit
def _tiled_kernel(
    flat_ptr, layout_ptr, table_ptr, color_ptr, numbers_ptr, out_ptr, bytes_ptr, N, G,
    COLUMNS: tl.constexpr, SIZE: tl.constexpr, CUBIC: tl.constexpr, LAST: tl.constexpr,
    AFFINE: tl.constexpr, B: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    n, view = tl.program_id(0) // G, tl.program_id(0) % G  # views of one image side by side: L2
    slot = view.to(tl.int64) * N + n
    row = table_ptr + slot * COLUMNS
    out_ptr += slot * (3 * SIZE * SIZE)
    bytes_ptr += slot * (3 * SIZE * SIZE)
    image_ptr = flat_ptr + tl.load(layout_ptr + 3 * n)
    stride = 3 * tl.load(layout_ptr + 3 * n + 2).to(tl.int32)
    mean = 0.0
    if not AFFINE:
        if _get(row, STEP0) >= 0:
            for y0 in range(0, SIZE, B):
                for x0 in range(0, SIZE, B):
                    r, g, b = _resample(image_ptr, stride, row, y0, x0, SIZE, CUBIC, B, W)
                    y, x = y0 + tl.arange(0, B), x0 + tl.arange(0, B)
                    mean += _luma_sum(r, g, b, row, y, x, SIZE)
            mean /= SIZE * SIZE
    for y0 in range(0, SIZE, B):
        for x0 in range(0, SIZE, B):
            r, g, b = _resample(image_ptr, stride, row, y0, x0, SIZE, CUBIC, B, W)
            r, g, b = _color(r, g, b, row, mean, color_ptr + slot * 12, AFFINE)
            y, x = y0 + tl.arange(0, B), x0 + tl.arange(0, B)
            if _get(row, SIGMA) > 0:
                at = bytes_ptr + (y[:, None] * SIZE + x[None, :])
                inside = (y < SIZE)[:, None] & (x < SIZE)[None, :]
                tl.store(at, (r * 255.0 + 0.5).to(tl.uint8), inside)
                tl.store(at + SIZE * SIZE, (g * 255.0 + 0.5).to(tl.uint8), inside)
                tl.store(at + 2 * SIZE * SIZE, (b * 255.0 + 0.5).to(tl.uint8), inside)
            else:
                _store_pixels(out_ptr, r, g, b, row, numbers_ptr, y, x, SIZE, LAST)


@triton.jit
def _blur_kernel(
    bytes_ptr, table_ptr, numbers_ptr, out_ptr, COLUMNS: tl.constexpr, SIZE: tl.constexpr,
    LAST: tl.constexpr, B: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0).to(tl.int64)
    row = table_ptr + slot * COLUMNS
    sigma = _get(row, SIGMA)
    if sigma > 0:
        out_ptr += slot * (3 * SIZE * SIZE)
        bytes_ptr += slot * (3 * SIZE * SIZE)
        tiles = tl.cdiv(SIZE, B)
        y0, x0 = tl.program_id(1) // tiles * B, tl.program_id(1) % tiles * B
        y, x = y0 + tl.arange(0, B), x0 + tl.arange(0, B)
        radius = tl.minimum(tl.ceil(REACH * sigma), SIZE - 1).to(tl.int32)
        r = tl.zeros([B, B], tl.float32)
        g = tl.zeros([B, B], tl.float32)
        b = tl.zeros([B, B], tl.float32)
        total = tl.zeros([B, B], tl.float32)
        for sy in range(tl.maximum(y0 - radius, 0), tl.minimum(y0 + B + radius, SIZE), W):
            ys = sy + tl.arange(0, W)
            wy = _gaussian(tl.minimum(y, SIZE - 1), ys, sigma, SIZE).to(tl.float16)
            for sx in range(tl.maximum(x0 - radius, 0), tl.minimum(x0 + B + radius, SIZE), W):
                xs = sx + tl.arange(0, W)
                wx = _gaussian(tl.minimum(x, SIZE - 1), xs, sigma, SIZE).to(tl.float16)
                at = bytes_ptr + (ys[:, None] * SIZE + xs[None, :])
                inside = (ys < SIZE)[:, None] & (xs < SIZE)[None, :]
                plane = SIZE * SIZE
                r = _product(wy, tl.load(at, inside, 0).to(tl.float16), wx, r)
                g = _product(wy, tl.load(at + plane, inside, 0).to(tl.float16), wx, g)
                b = _product(wy, tl.load(at + 2 * plane, inside, 0).to(tl.float16), wx, b)
                total += (
                    tl.sum(wy.to(tl.float32), 1)[:, None] * tl.sum(wx.to(tl.float32), 1)[None, :]
                )
        gain = 1.0 / (255.0 * total)
        _store_pixels(out_ptr, r * gain, g * gain, b * gain, row, numbers_ptr, y, x, SIZE, LAST)
