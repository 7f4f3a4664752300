"""Resampling taps: which pixels of a crop contribute to a pixel of the view, with which weights."""

# mypy: disable-error-code="no-untyped-def"
# ^ numba infers the types of what it compiles

import numpy as np

from fastssl_pipelines.augment.cpu.numba_ops import HALF, ONE, TWO, ZERO, fast, of_pixels

triangle, cubic = of_pixels.triangle, of_pixels.cubic


@fast
def max_taps(longest, size, bicubic):
    """An upper bound on the taps of a pixel of the view, for crops up to `longest` px."""
    return (4 if bicubic else 2) * max(1, -(-longest // size)) + 2


@fast
def _fill_pairs(length, scale, size, flip, gain, first, count, weight, taps):
    """`fill_taps` for bilinear enlargement, where a pixel has two taps."""
    last = np.float32(length - 1)
    for i in range(size):
        source = min(max((np.float32(i) + HALF) * scale - HALF, ZERO), last)
        low = min(int(source), length - 2)
        share = gain * (source - np.float32(low))
        o = size - 1 - i if flip else i
        first[o], count[o] = low, 2
        weight[o * taps], weight[o * taps + 1] = gain - share, share
    return 2


@fast
def fill_taps(length, size, bicubic, flip, gain, first, count, weight, taps):
    """Fill in the taps of `size` output pixels among `length` source pixels. -> the largest count

    first (size,), count (size,), weight (size * `taps`): zero from `count` on.
    """
    scale = np.float32(length) / np.float32(size)
    if scale <= ONE and not bicubic and length > 1:
        return _fill_pairs(length, scale, size, flip, gain, first, count, weight, taps)
    stretch = max(scale, ONE)  # antialias
    support = stretch * (TWO if bicubic else ONE)
    closer = ONE / stretch
    max_count = 2
    for i in range(size):
        center = (np.float32(i) + HALF) * scale
        low = max(0, int(np.floor(center - support + HALF)))
        high = min(length, int(np.floor(center + support + HALF)))
        o = size - 1 - i if flip else i
        j = o * taps
        total = ZERO
        for k in range(high - low):
            distance = (np.float32(low + k) + HALF - center) * closer
            w = cubic(distance) if bicubic else triangle(distance)
            weight[j + k] = w
            total += w
        share = gain / total
        for k in range(high - low):
            weight[j + k] *= share
        first[o] = low
        count[o] = high - low
        max_count = max(max_count, high - low)
    for o in range(size):
        for k in range(count[o], max_count):
            weight[o * taps + k] = ZERO
    return max_count
