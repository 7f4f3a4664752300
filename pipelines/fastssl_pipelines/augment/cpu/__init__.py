"""Views on the CPU: a few threads run compiled loops without the GIL; no worker processes.

Shapes: N batch, G groups of it, C channels, h and w pixels of a view.
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
from fastssl_pipelines.augment.checks import (
    BOUNDS,
    WHOLE_NUMBERS,
    misfit_error,
    require_drawable,
    require_table,
)
from fastssl_pipelines.augment.color_matrix import color_maps
from fastssl_pipelines.augment.cpu.kernels import render_range, sample_range
from fastssl_pipelines.augment.image_batch import Images
from fastssl_pipelines.spec import View

MAX_BUFFERS = 8  # outputs held for reuse
UNUSED_REFCOUNT = 3  # of a buffer that no tensor holds: by the deque, the loop and the call
VIEWS_PER_TASK = 2048  # sampling fewer views costs less than waking a thread
PIXELS_PER_TASK = 16384  # small, for load balance
_LIMITS = (*BOUNDS.contiguous().numpy(), (~WHOLE_NUMBERS).numpy())

_buffers: deque[np.ndarray] = deque(maxlen=MAX_BUFFERS)
_buffers_lock = Lock()
_calls: list[object] = []  # one entry for each call in progress


def draw(
    views: Sequence[View], seed: int, epoch: int | Tensor, index: Tensor, layout: Tensor, first: int
) -> Tensor:
    """`reference.draw`, bit for bit. -> (V, N, columns)"""
    require_drawable(index, layout)
    columns = len(sample_params.COLUMNS)
    table = torch.empty(len(views), len(index), columns)
    numbers = np.array([sample_params.view_numbers(view) for view in views])
    tensors = (table.view(-1, columns), index.contiguous(), layout.contiguous())
    rows = len(views) * len(index)
    key = (first, seed, int(epoch))
    _run_in_parallel(sample_range, rows, VIEWS_PER_TASK, tensors, *key, numbers)
    return table


def render(
    images: Images, table: Tensor, view: View, quality: str, *, drawn: bool = False
) -> Tensor:
    """`reference.render`, within 1/255. -> (G, N, 3, h, w)"""
    table, layout = table.contiguous(), images.layout.contiguous()
    if not drawn:
        require_table(layout, table)
    groups, count, columns = table.shape
    (height, width), last = view.shape, view.channels_last
    shape = (groups, count, height, width, 3) if last else (groups, count, 3, height, width)
    out = _empty(math.prod(shape)).view(shape)
    affine = quality == "affine"
    rows = table.reshape(-1, columns)
    colors = color_maps(rows) if affine else rows[:0, :12]
    misfit = _run_in_parallel(
        render_range,
        groups * count,
        max(1, PIXELS_PER_TASK // (height * width)),
        (images.flat, layout, rows),
        drawn,
        *_LIMITS,
        affine,
        colors.contiguous().numpy(),
        height,
        width,
        view.interpolation == "bicubic",
        last,
        np.array(sample_params.view_numbers(view)),
        out.view(-1).numpy(),
    )
    if misfit >= 0:
        raise misfit_error(layout, table, view, misfit)
    return (out.movedim(-1, 2) if last else out).to(view.dtype)


def _empty(count: int) -> Tensor:
    """float32 (count,), in the memory of an earlier batch that is no longer referenced, if there is
    one.

    The first touch of new pages takes as long as rendering small views into them.
    """
    with _buffers_lock:
        for buffer in _buffers:
            if buffer.size == count and sys.getrefcount(buffer) == UNUSED_REFCOUNT:
                return torch.from_numpy(buffer)  # holds a reference for as long as it lives
        _buffers.append(np.empty(count, np.float32))
        return torch.from_numpy(_buffers[-1])


def _run_in_parallel(
    kernel: Any, count: int, grain: int, tensors: tuple[Tensor, ...], *arguments: Any
) -> Any:
    """kernel(counter, count, grain, *tensors, *arguments) on this thread and on helpers, which
    process `grain` of `count` rows at a time. -> what it returns on this thread

    Concurrent calls together use as many threads as torch does: with more threads than cores they
    would wait for one another.
    """
    counter = np.zeros(1, np.int64)
    shared = (counter, count, grain, *(tensor.numpy() for tensor in tensors), *arguments)
    _calls.append(kernel)
    try:
        threads = min(torch.get_num_threads() // len(_calls), -(-count // grain))
        helpers = [_helpers(os.getpid()).submit(kernel, *shared) for _ in range(1, threads)]
        result = kernel(*shared)
        for helper in helpers:
            if not helper.cancel():  # it has started
                helper.result()
        return result
    finally:
        _calls.pop()


@cache
def _helpers(process: int) -> ThreadPoolExecutor:
    """One pool per process: a forked child does not inherit the threads of its parent."""
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="fastssl-views")
