"""Views on the GPU: one launch samples the parameters of all views, one renders the views of one
static configuration, one blurs them. `kernels.py` explains what a program does.

Shapes: N batch, G views rendered together, V views, S pixels per side, B tile side, W window side.
"""

from functools import cache

import torch
import triton
from torch import Tensor

from fastssl_pipelines.augment import sample_params
from fastssl_pipelines.augment.color_matrix import color_maps
from fastssl_pipelines.augment.cuda.kernels import (
    _blur_kernel,
    _sample_kernel,
    _tiled_kernel,
    _whole_kernel,
)
from fastssl_pipelines.augment.image_batch import Images
from fastssl_pipelines.spec import View

WHOLE = 32  # largest side rendered as one tile; at 64 px it would spill registers on sm_80
SAMPLE_BLOCK = 128
# The widest windows that spill no registers on sm_80, sm_90 and sm_100.
WHOLE_TILES = {16: (16, 2), 32: (32, 4)}  # B = S rounded up: (W, warps)
TILE, WINDOW, WARPS = 32, 32, 8  # of larger views


@cache
def _numbers(views: tuple[View, ...], device: torch.device) -> Tensor:
    """`view_numbers` of the views, cached on the device, so that a batch uploads nothing. (V,
    numbers) fp64"""
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
    """`reference.draw`, bit for bit, of views numbered from `first` on. -> (V, N, columns)

    index: (N,) int64. layout: (N, 3), `Images.layout`.
    """
    numbers = _numbers(views, index.device)
    key = torch.full((2,), seed, dtype=torch.int64, device=index.device)
    key[1] = epoch
    count, columns = len(index), len(sample_params.COLUMNS)
    table = torch.empty(len(views), count, columns, device=index.device)
    _sample_kernel[(triton.cdiv(count, SAMPLE_BLOCK), len(views))](
        table, index, layout, numbers, key, first, count,
        COLUMNS=columns, NUMBERS=numbers.shape[1], BLOCK=SAMPLE_BLOCK,
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
    static_config = {"COLUMNS": columns, "SIZE": size, "LAST": last}
    variant = {"CUBIC": view.interpolation == "bicubic", "AFFINE": affine}
    grid = (count * groups,)
    if size <= WHOLE:
        tile = max(16, triton.next_power_of_2(size))
        window, warps = WHOLE_TILES[tile]
        tiling = {"B": tile, "W": window, "num_warps": warps, "num_stages": 1}
        _whole_kernel[grid](*source, count, groups, **static_config, **variant, **tiling)
    else:
        unblurred = torch.empty(shape, dtype=torch.uint8, device=out.device)
        tiling = {"B": TILE, "W": WINDOW, "num_warps": WARPS, "num_stages": 1}
        _tiled_kernel[grid](*source, unblurred, count, groups, **static_config, **variant, **tiling)
        tiles = triton.cdiv(size, TILE) ** 2
        # a program of a view without blur returns at once
        _blur_kernel[(count * groups, tiles)](
            unblurred, table, numbers, out, **static_config, **tiling
        )
    return out.movedim(-1, 2) if last else out
