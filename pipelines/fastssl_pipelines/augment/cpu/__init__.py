"""Views on the CPU: a few threads that run compiled loops, the GIL released, no worker processes.

Shapes: N batch, G groups of it, C channels, S pixels per side.
"""

import math
import os
import sys
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastssl_pipelines.augment import sample_params
from fastssl_pipelines.augment.color_matrix import color_maps
from fastssl_pipelines.augment.cpu.kernels import draw_range, render_range
from fastssl_pipelines.augment.image_batch import Images
from fastssl_pipelines.spec import View

BUFFERS = 8  # at most so many outputs are kept to be used again
UNUSED = 3  # references to a buffer that no tensor holds: the deque's, the loop's, the call's
DRAWS = 2048  # views that one thread draws before another is worth waking
PIXELS = 16384  # what a thread takes at a time: one that is done early takes over more

_buffers: deque[np.ndarray] = deque(maxlen=BUFFERS)
_buffers_lock = Lock()
_calls: list[object] = []  # one entry for each call that runs now


def draw(
    views: Sequence[View], seed: int, epoch: int | Tensor, index: Tensor, layout: Tensor, first: int
) -> Tensor:
    """`reference.draw`, bit for bit. -> (V, N, columns)"""
    columns = len(sample_params.COLUMNS)
    table = torch.empty(len(views), len(index), columns)
    numbers = np.array([sample_params.view_numbers(view) for view in views])
    arguments = (table.view(-1, columns), index.contiguous(), layout.contiguous())
    _share(draw_range, len(views) * len(index), DRAWS, arguments, first, seed, int(epoch), numbers)
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
    _share(
        render_range,
        groups * count,
        max(1, PIXELS // size**2),
        (images.flat, images.layout.contiguous(), rows),
        affine,
        colors.contiguous().numpy(),
        size,
        view.interpolation == "bicubic",
        last,
        np.array(sample_params.view_numbers(view)),
        out.view(-1).numpy(),
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


def _share(
    kernel: Any, count: int, grain: int, tensors: tuple[Tensor, ...], *arguments: Any
) -> None:
    """kernel(taken, count, grain, *tensors, *arguments) on this thread and on helpers, which take
    `grain` of `count` rows at a time until none is left.

    The calls that run at one time use as many threads as torch does, in sum: more than there are
    cores would wait for one another.
    """
    taken = np.zeros(1, np.int64)
    shared = (taken, count, grain, *(tensor.numpy() for tensor in tensors), *arguments)
    _calls.append(kernel)
    try:
        threads = min(torch.get_num_threads() // len(_calls), -(-count // grain))
        helpers = [_helpers(os.getpid()).submit(kernel, *shared) for _ in range(1, threads)]
        kernel(*shared)
        for helper in helpers:
            if not helper.cancel():  # it has begun
                helper.result()
    finally:
        _calls.pop()


@cache
def _helpers(process: int) -> ThreadPoolExecutor:
    """One pool for this process: a forked child has not got its parent's threads."""
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="fastssl-views")
