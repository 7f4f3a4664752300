"""The Triton kernels: one samples parameters, two render views, one blurs them; and where views
are equalized or rotated, one maps the bytes of a crop, one resamples views before they are rotated.

A program renders one view. Resampling is two products with weight matrices, out = Wy @ image @
Wx^T, one window of the source at a time, for any scale: antialias needs no extra code. The
Gaussian blur is the same with other weights. The operands are fp16 (bytes are exact in it, weights
carry 11 bits), the sums fp32.

Up to 32 px a view is one tile in registers, including its blur. Above, a program loops over tiles,
twice where a contrast step needs the mean first, and stores views to be blurred as bytes for a
second kernel.

Shapes: N batch, G views rendered together, (HEIGHT, WIDTH) a view, B tile side, W window side.
"""

# mypy: disable-error-code="no-untyped-def"
# ^ Triton infers the types of what it compiles

from types import SimpleNamespace
from typing import Any

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


LEVELS = 256  # of a byte


def _constant(number: float) -> Any:
    """A global that kernels may read; a plain number for the interpreter, where constexpr * tensor
    fails."""
    return tl.constexpr(number) if isinstance(_number, triton.JITFunction) else number


_f = SimpleNamespace(
    **retarget([rng, sample_params, pixel_ops], _primitives, triton.jit, _constant)
)
sample_view = _f.sample_view
adjust, recolor, tone, finish = _f.adjust, _f.recolor, _f.tone, _f.finish
clamp, luma, turn = _f.clamp, _f.luma, _f.turn
triangle, cubic = _f.triangle, _f.cubic
REACH = _constant(BLUR_REACH)
TOP, LEFT, CROP_HEIGHT, CROP_WIDTH = _f.TOP, _f.LEFT, _f.HEIGHT, _f.WIDTH
FLIP, VERTICAL_FLIP, EQUALIZE = _f.FLIP, _f.VERTICAL_FLIP, _f.EQUALIZE
BYTE_LEVELS = _constant(LEVELS)
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
def _extent(start, SIZE: tl.constexpr, flip, B: tl.constexpr):
    """The pixels [low, high) of an unflipped view that a tile from `start` on shows, on one
    axis."""
    stop = tl.minimum(start + B, SIZE)
    return tl.where(flip, SIZE - stop, start), tl.where(flip, SIZE - start, stop)


@triton.jit
def _channel(image_ptr, lut_ptr, at, inside, EQUALIZED: tl.constexpr):
    value = tl.load(image_ptr + at, inside, 0)
    if EQUALIZED:
        value = tl.load(lut_ptr + value.to(tl.int32))
    return value.to(tl.float16)


@triton.jit
def _resample(
    image_ptr, lut_ptr, stride, row, y0, x0, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    CUBIC: tl.constexpr, EQUALIZED: tl.constexpr, B: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Tile (y0, x0) of the cropped, equalized, resized, flipped image: r, g, b (B, B), fp32 in
    [0, 1]."""
    height, width = _get(row, CROP_HEIGHT), _get(row, CROP_WIDTH)
    image_ptr += _get(row, TOP).to(tl.int64) * stride + _get(row, LEFT).to(tl.int64) * 3
    y = tl.minimum(y0 + tl.arange(0, B), HEIGHT - 1)  # outside the view: its last row and column
    x = tl.minimum(x0 + tl.arange(0, B), WIDTH - 1)
    flip, vertical_flip = _get(row, FLIP) > 0, _get(row, VERTICAL_FLIP) > 0
    y = tl.where(vertical_flip, HEIGHT - 1 - y, y)
    x = tl.where(flip, WIDTH - 1 - x, x)
    top, bottom = _extent(y0, HEIGHT, vertical_flip, B)
    left, right = _extent(x0, WIDTH, flip, B)
    y_low, y_high = _reach(top, bottom, height, HEIGHT, CUBIC)
    x_low, x_high = _reach(left, right, width, WIDTH, CUBIC)
    r = tl.zeros([B, B], tl.float32)
    g = tl.zeros([B, B], tl.float32)
    b = tl.zeros([B, B], tl.float32)
    total = tl.zeros([B, B], tl.float32)
    for sy in range(y_low, y_high, W):
        ys = sy + tl.arange(0, W)
        wy = _weights(y, ys, height, HEIGHT, CUBIC).to(tl.float16)
        for sx in range(x_low, x_high, W):
            xs = sx + tl.arange(0, W)
            wx = _weights(x, xs, width, WIDTH, CUBIC).to(tl.float16)
            at = ys[:, None] * stride + xs[None, :] * 3  # int32: one image < 2 GiB
            inside = (ys < height)[:, None] & (xs < width)[None, :]
            r = _product(wy, _channel(image_ptr, lut_ptr, at, inside, EQUALIZED), wx, r)
            lut_g, lut_b = lut_ptr + BYTE_LEVELS, lut_ptr + 2 * BYTE_LEVELS
            g = _product(wy, _channel(image_ptr, lut_g, at + 1, inside, EQUALIZED), wx, g)
            b = _product(wy, _channel(image_ptr, lut_b, at + 2, inside, EQUALIZED), wx, b)
            total += tl.sum(wy.to(tl.float32), 1)[:, None] * tl.sum(wx.to(tl.float32), 1)[None, :]
    gain = 1.0 / (255.0 * total)
    return clamp(r * gain), clamp(g * gain), clamp(b * gain)  # bicubic overshoots


@triton.jit
def _corner(plane_ptr, y, x, share, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """`share` of pixel (y, x) of a plane, 0 outside of it."""
    inside = (y >= 0) & (y < HEIGHT) & (x >= 0) & (x < WIDTH)
    return share * tl.load(plane_ptr + y * WIDTH + x, inside, 0.0)


@triton.jit
def _rotated(
    plane_ptr, turn_ptr, y0, x0, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, B: tl.constexpr
):  # fmt: skip
    """Tile (y0, x0) of one channel (HEIGHT, WIDTH), rotated around its centre. -> (B, B)"""
    cos, sin = tl.load(turn_ptr), tl.load(turn_ptr + 1)
    middle_y, middle_x = (HEIGHT - 1) * 0.5, (WIDTH - 1) * 0.5
    to_y = (tl.minimum(y0 + tl.arange(0, B), HEIGHT - 1) - middle_y)[:, None]
    to_x = (tl.minimum(x0 + tl.arange(0, B), WIDTH - 1) - middle_x)[None, :]
    from_y, from_x = turn(to_y, to_x, cos, sin)
    from_y, from_x = from_y + middle_y, from_x + middle_x
    top, left = tl.floor(from_y), tl.floor(from_x)
    down, right = from_y - top, from_x - left
    y, x = top.to(tl.int32), left.to(tl.int32)
    value = _corner(plane_ptr, y, x, (1.0 - down) * (1.0 - right), HEIGHT, WIDTH)
    value += _corner(plane_ptr, y, x + 1, (1.0 - down) * right, HEIGHT, WIDTH)
    value += _corner(plane_ptr, y + 1, x, down * (1.0 - right), HEIGHT, WIDTH)
    return value + _corner(plane_ptr, y + 1, x + 1, down * right, HEIGHT, WIDTH)


@triton.jit
def _pixels(
    image_ptr, lut_ptr, planes_ptr, turn_ptr, stride, row, y0, x0, HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr, CUBIC: tl.constexpr, EQUALIZED: tl.constexpr, ROTATED: tl.constexpr,
    B: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Tile (y0, x0) of the view before its colour steps: r, g, b (B, B), fp32 in [0, 1]."""
    if ROTATED:
        area: tl.constexpr = HEIGHT * WIDTH
        r = _rotated(planes_ptr, turn_ptr, y0, x0, HEIGHT, WIDTH, B)
        g = _rotated(planes_ptr + area, turn_ptr, y0, x0, HEIGHT, WIDTH, B)
        b = _rotated(planes_ptr + 2 * area, turn_ptr, y0, x0, HEIGHT, WIDTH, B)
    else:
        r, g, b = _resample(
            image_ptr, lut_ptr, stride, row, y0, x0, HEIGHT, WIDTH, CUBIC, EQUALIZED, B, W
        )
    return r, g, b


@triton.jit
def _equalize_kernel(
    flat_ptr, layout_ptr, table_ptr, lut_ptr, N, COLUMNS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """What the bytes of one channel of a crop become: lut (G * N, 3, 256); the same bytes where the
    view is not equalized. As PIL.ImageOps.equalize does."""
    slot = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1)
    n = slot % N
    row = table_ptr + slot * COLUMNS
    level = tl.arange(0, 256)
    mapped = level
    if _get(row, EQUALIZE) > 0:
        stride = 3 * tl.load(layout_ptr + 3 * n + 2).to(tl.int32)
        width = _get(row, CROP_WIDTH).to(tl.int32)
        count = _get(row, CROP_HEIGHT).to(tl.int32) * width
        image_ptr = flat_ptr + tl.load(layout_ptr + 3 * n) + channel
        image_ptr += _get(row, TOP).to(tl.int64) * stride + _get(row, LEFT).to(tl.int64) * 3
        histogram = tl.zeros([256], tl.int32)
        for start in range(0, count, BLOCK):
            pixel = start + tl.arange(0, BLOCK)
            inside = pixel < count
            at = pixel // width * stride + pixel % width * 3
            value = tl.load(image_ptr + at, inside, 0).to(tl.int32)
            histogram += tl.histogram(value, 256, inside)
        below = tl.cumsum(histogram, 0) - histogram
        brightest = tl.max(tl.where(histogram > 0, level, 0), 0)
        step = (count - tl.sum(tl.where(level == brightest, histogram, 0), 0)) // 255
        equalized = tl.minimum((below + step // 2) // tl.maximum(step, 1), 255)
        mapped = tl.where(step > 0, equalized, level)
    tl.store(lut_ptr + (slot * 3 + channel) * BYTE_LEVELS + level, mapped.to(tl.uint8))


@triton.jit
def _resample_kernel(
    flat_ptr, layout_ptr, table_ptr, lut_ptr, planes_ptr, N, G, COLUMNS: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, CUBIC: tl.constexpr, EQUALIZED: tl.constexpr,
    B: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """The views before rotation and colour steps: planes (G * N, 3, HEIGHT, WIDTH), fp32."""
    n, view = tl.program_id(0) // G, tl.program_id(0) % G
    slot = view.to(tl.int64) * N + n
    row = table_ptr + slot * COLUMNS
    area: tl.constexpr = HEIGHT * WIDTH
    planes_ptr += slot * (3 * area)
    lut_ptr += slot * (3 * BYTE_LEVELS)
    image_ptr = flat_ptr + tl.load(layout_ptr + 3 * n)
    stride = 3 * tl.load(layout_ptr + 3 * n + 2).to(tl.int32)
    for y0 in range(0, HEIGHT, B):
        for x0 in range(0, WIDTH, B):
            r, g, b = _resample(
                image_ptr, lut_ptr, stride, row, y0, x0, HEIGHT, WIDTH, CUBIC, EQUALIZED, B, W
            )
            y, x = y0 + tl.arange(0, B), x0 + tl.arange(0, B)
            at = planes_ptr + (y[:, None] * WIDTH + x[None, :])
            inside = (y < HEIGHT)[:, None] & (x < WIDTH)[None, :]
            tl.store(at, r, inside)
            tl.store(at + area, g, inside)
            tl.store(at + 2 * area, b, inside)


@triton.jit
def _luma_sum(r, g, b, row, y, x, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """Sum of the luma before the contrast step, over the pixels of a tile inside the view."""
    before = 1
    for slot in range(4):
        step = _get(row, STEP0 + slot)
        before = tl.where(step == 1, 0, before)
        r, g, b = adjust(tl.where(before == 1, step, -1.0), r, g, b, 0.0, row)
    inside = (y < HEIGHT)[:, None] & (x < WIDTH)[None, :]
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
    out_ptr, channel: tl.constexpr, value, row, numbers_ptr, y, x, HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Solarize, normalise, erase and write one channel of a tile."""
    mean = tl.load(numbers_ptr + MEAN + channel).to(tl.float32)
    std = tl.load(numbers_ptr + STD + channel).to(tl.float32)
    value = (finish(value, row) - mean) * (1.0 / std)
    top, left = _get(row, ERASE_TOP), _get(row, ERASE_LEFT)
    rows = (y >= top) & (y < top + _get(row, ERASE_HEIGHT))
    columns = (x >= left) & (x < left + _get(row, ERASE_WIDTH))
    value = tl.where(rows[:, None] & columns[None, :], 0.0, value)
    pixel = y[:, None] * WIDTH + x[None, :]
    at = pixel * 3 + channel if LAST else channel * HEIGHT * WIDTH + pixel
    inside = (y < HEIGHT)[:, None] & (x < WIDTH)[None, :]
    tl.store(out_ptr + at, value.to(out_ptr.dtype.element_ty), inside)


@triton.jit
def _store_pixels(
    out_ptr, r, g, b, row, numbers_ptr, y, x, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    LAST: tl.constexpr,
):  # fmt: skip
    _store(out_ptr, 0, r, row, numbers_ptr, y, x, HEIGHT, WIDTH, LAST)
    _store(out_ptr, 1, g, row, numbers_ptr, y, x, HEIGHT, WIDTH, LAST)
    _store(out_ptr, 2, b, row, numbers_ptr, y, x, HEIGHT, WIDTH, LAST)


@triton.jit
def _whole_kernel(
    flat_ptr, layout_ptr, table_ptr, color_ptr, numbers_ptr, lut_ptr, planes_ptr, turn_ptr,
    out_ptr, N, G, COLUMNS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    CUBIC: tl.constexpr, LAST: tl.constexpr, AFFINE: tl.constexpr, EQUALIZED: tl.constexpr,
    ROTATED: tl.constexpr, B: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    n, view = tl.program_id(0) // G, tl.program_id(0) % G  # views of one image side by side: L2
    slot = view.to(tl.int64) * N + n
    row = table_ptr + slot * COLUMNS
    area: tl.constexpr = HEIGHT * WIDTH
    image_ptr = flat_ptr + tl.load(layout_ptr + 3 * n)
    stride = 3 * tl.load(layout_ptr + 3 * n + 2).to(tl.int32)
    y = tl.arange(0, B)
    r, g, b = _pixels(
        image_ptr, lut_ptr + slot * (3 * BYTE_LEVELS), planes_ptr + slot * (3 * area),
        turn_ptr + slot * 2, stride, row, 0, 0, HEIGHT, WIDTH, CUBIC, EQUALIZED, ROTATED, B, W,
    )  # fmt: skip
    mean = 0.0
    if not AFFINE:
        if _get(row, STEP0) >= 0:
            mean = _luma_sum(r, g, b, row, y, y, HEIGHT, WIDTH) / area
    r, g, b = _color(r, g, b, row, mean, color_ptr + slot * 12, AFFINE)
    sigma = _get(row, SIGMA)
    if sigma > 0:
        weight = _gaussian(tl.minimum(y, WIDTH - 1), y, sigma, WIDTH)
        wx = (weight / tl.sum(weight, 1)[:, None]).to(tl.float16)
        if HEIGHT == WIDTH:
            wy = wx
        else:
            weight = _gaussian(tl.minimum(y, HEIGHT - 1), y, sigma, HEIGHT)
            wy = (weight / tl.sum(weight, 1)[:, None]).to(tl.float16)
        zeros = tl.zeros([B, B], tl.float32)
        r = _product(wy, r.to(tl.float16), wx, zeros)
        g = _product(wy, g.to(tl.float16), wx, zeros)
        b = _product(wy, b.to(tl.float16), wx, zeros)
    _store_pixels(out_ptr + slot * (3 * area), r, g, b, row, numbers_ptr, y, y, HEIGHT, WIDTH, LAST)


@triton.jit
def _tiled_kernel(
    flat_ptr, layout_ptr, table_ptr, color_ptr, numbers_ptr, lut_ptr, planes_ptr, turn_ptr,
    out_ptr, bytes_ptr, N, G, COLUMNS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    CUBIC: tl.constexpr, LAST: tl.constexpr, AFFINE: tl.constexpr, EQUALIZED: tl.constexpr,
    ROTATED: tl.constexpr, B: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    n, view = tl.program_id(0) // G, tl.program_id(0) % G  # views of one image side by side: L2
    slot = view.to(tl.int64) * N + n
    row = table_ptr + slot * COLUMNS
    area: tl.constexpr = HEIGHT * WIDTH
    out_ptr += slot * (3 * area)
    bytes_ptr += slot * (3 * area)
    planes_ptr += slot * (3 * area)
    turn_ptr += slot * 2
    lut_ptr += slot * (3 * BYTE_LEVELS)
    image_ptr = flat_ptr + tl.load(layout_ptr + 3 * n)
    stride = 3 * tl.load(layout_ptr + 3 * n + 2).to(tl.int32)
    mean = 0.0
    if not AFFINE:
        if _get(row, STEP0) >= 0:
            for y0 in range(0, HEIGHT, B):
                for x0 in range(0, WIDTH, B):
                    r, g, b = _pixels(
                        image_ptr, lut_ptr, planes_ptr, turn_ptr, stride, row, y0, x0, HEIGHT,
                        WIDTH, CUBIC, EQUALIZED, ROTATED, B, W,
                    )  # fmt: skip
                    y, x = y0 + tl.arange(0, B), x0 + tl.arange(0, B)
                    mean += _luma_sum(r, g, b, row, y, x, HEIGHT, WIDTH)
            mean /= area
    for y0 in range(0, HEIGHT, B):
        for x0 in range(0, WIDTH, B):
            r, g, b = _pixels(
                image_ptr, lut_ptr, planes_ptr, turn_ptr, stride, row, y0, x0, HEIGHT, WIDTH,
                CUBIC, EQUALIZED, ROTATED, B, W,
            )  # fmt: skip
            r, g, b = _color(r, g, b, row, mean, color_ptr + slot * 12, AFFINE)
            y, x = y0 + tl.arange(0, B), x0 + tl.arange(0, B)
            if _get(row, SIGMA) > 0:
                at = bytes_ptr + (y[:, None] * WIDTH + x[None, :])
                inside = (y < HEIGHT)[:, None] & (x < WIDTH)[None, :]
                tl.store(at, (r * 255.0 + 0.5).to(tl.uint8), inside)
                tl.store(at + area, (g * 255.0 + 0.5).to(tl.uint8), inside)
                tl.store(at + 2 * area, (b * 255.0 + 0.5).to(tl.uint8), inside)
            else:
                _store_pixels(out_ptr, r, g, b, row, numbers_ptr, y, x, HEIGHT, WIDTH, LAST)


@triton.jit
def _blur_kernel(
    bytes_ptr, table_ptr, numbers_ptr, out_ptr, COLUMNS: tl.constexpr, HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr, LAST: tl.constexpr, B: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0).to(tl.int64)
    row = table_ptr + slot * COLUMNS
    sigma = _get(row, SIGMA)
    if sigma > 0:
        area: tl.constexpr = HEIGHT * WIDTH
        out_ptr += slot * (3 * area)
        bytes_ptr += slot * (3 * area)
        tiles = tl.cdiv(WIDTH, B)
        y0, x0 = tl.program_id(1) // tiles * B, tl.program_id(1) % tiles * B
        y, x = y0 + tl.arange(0, B), x0 + tl.arange(0, B)
        reach = tl.ceil(REACH * sigma)
        reach_y = tl.minimum(reach, HEIGHT - 1).to(tl.int32)
        reach_x = tl.minimum(reach, WIDTH - 1).to(tl.int32)
        r = tl.zeros([B, B], tl.float32)
        g = tl.zeros([B, B], tl.float32)
        b = tl.zeros([B, B], tl.float32)
        total = tl.zeros([B, B], tl.float32)
        for sy in range(tl.maximum(y0 - reach_y, 0), tl.minimum(y0 + B + reach_y, HEIGHT), W):
            ys = sy + tl.arange(0, W)
            wy = _gaussian(tl.minimum(y, HEIGHT - 1), ys, sigma, HEIGHT).to(tl.float16)
            for sx in range(tl.maximum(x0 - reach_x, 0), tl.minimum(x0 + B + reach_x, WIDTH), W):
                xs = sx + tl.arange(0, W)
                wx = _gaussian(tl.minimum(x, WIDTH - 1), xs, sigma, WIDTH).to(tl.float16)
                at = bytes_ptr + (ys[:, None] * WIDTH + xs[None, :])
                inside = (ys < HEIGHT)[:, None] & (xs < WIDTH)[None, :]
                r = _product(wy, tl.load(at, inside, 0).to(tl.float16), wx, r)
                g = _product(wy, tl.load(at + area, inside, 0).to(tl.float16), wx, g)
                b = _product(wy, tl.load(at + 2 * area, inside, 0).to(tl.float16), wx, b)
                total += (
                    tl.sum(wy.to(tl.float32), 1)[:, None] * tl.sum(wx.to(tl.float32), 1)[None, :]
                )
        gain = 1.0 / (255.0 * total)
        _store_pixels(
            out_ptr, r * gain, g * gain, b * gain, row, numbers_ptr, y, x, HEIGHT, WIDTH, LAST
        )
