"""Views on the GPU: one launch draws all views, one renders all of a size, one blurs them.

What a program does, and why, is said in `kernels.py`.

Shapes: N batch, G views of one look, V views, S pixels per side, B tile side, W window side.
"""

from functools import cache

import torch
import triton
from torch import Tensor

from fastssl_pipelines.augment import sample_params
from fastssl_pipelines.augment.color_matrix import color_maps
from fastssl_pipelines.augment.cuda.kernels import (
    _blur_kernel,
    _draw_kernel,
    _tiled_kernel,
    _whole_kernel,
)
from fastssl_pipelines.augment.image_batch import Images
from fastssl_pipelines.spec import View

WHOLE = 32  # largest side that is one tile; at 64 px it would spill registers on sm_80
DRAW_BLOCK = 128
# Found by compiling for sm_80, sm_90 and sm_100: wide windows that spill no register.
WHOLE_TILES = {16: (16, 2), 32: (32, 4)}  # B = S rounded up: (W, warps)
TILE, WINDOW, WARPS = 32, 32, 8  # of larger views


@cache
def _numbers(views: tuple[View, ...], device: torch.device) -> Tensor:
    """What the views say, on the device once and for all: no upload per batch. (V, numbers) fp64"""
    numbers = [sample_params.view_numbers(view) for view in views]
    return torch.tensor(numbers, dtype=torch.float64, device=device)


def draw(
    views: tuple[View, ...],
    seed: int,
    epoch: int | Tensor,
    index: Tensor,
    layout: Tensor,
    first: int,
) -> Tensor:
    """Tables of `reference.draw`, bit for bit, of views numbered from `first`. -> (V, N, columns)

    index: (N,) int64. layout: (N, 3), `Images.layout`.
    """
    numbers = _numbers(views, index.device)
    key = torch.full((2,), seed, dtype=torch.int64, device=index.device)
    key[1] = epoch
    count, columns = len(index), len(sample_params.COLUMNS)
    table = torch.empty(len(views), count, columns, device=index.device)
    _draw_kernel[(triton.cdiv(count, DRAW_BLOCK), len(views))](
        table, index, layout, numbers, key, first, count,
        COLUMNS=columns, NUMBERS=numbers.shape[1], BLOCK=DRAW_BLOCK,
        enable_fp_fusion=False,  # a fused multiply-add rounds once where the reference rounds twice
    )  # fmt: skip
    return table


def render(images: Images, table: Tensor, view: View, quality: str) -> Tensor:
    """`reference.render`, within 1/255. -> (G, N, 3, S, S)

    table: (G, N, columns), contiguous.
    """
    groups, count, columns = table.shape
    size, last = view.size, view.channels_last
    shape = (groups, count, size, size, 3) if last else (groups, count, 3, size, size)
    out = torch.empty(shape, dtype=view.dtype, device=table.device)
    affine = quality == "affine"
    colors = color_maps(table) if affine else table
    numbers = _numbers((view,), table.device)
    source = (images.flat, images.layout, table, colors, numbers, out)
    look = {"COLUMNS": columns, "SIZE": size, "LAST": last}
    how = {"CUBIC": view.interpolation == "bicubic", "AFFINE": affine}
    if size <= WHOLE:
        tile = max(16, triton.next_power_of_2(size))
        window, warps = WHOLE_TILES[tile]
        tiling = {"B": tile, "W": window, "num_warps": warps, "num_stages": 1}
        _whole_kernel[(count * groups,)](*source, count, groups, **look, **how, **tiling)
    else:
        unblurred = torch.empty(shape, dtype=torch.uint8, device=out.device)
        tiling = {"B": TILE, "W": WINDOW, "num_warps": WARPS, "num_stages": 1}
        _tiled_kernel[(count * groups,)](*source, unblurred, count, groups, **look, **how, **tiling)
        grid = (count * groups, triton.cdiv(size, TILE) ** 2)
        _blur_kernel[grid](
            unblurred, table, numbers, out, **look, **tiling
        )  # ends at once at sigma 0
    return out.movedim(-1, 2) if last else out
