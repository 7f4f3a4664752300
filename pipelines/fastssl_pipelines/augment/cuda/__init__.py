"""Views on the GPU: one launch samples the parameters of all views, one renders the views of one
static configuration, one blurs them; equalizing and rotating take one more each. `kernels.py`
explains what a program does.

Shapes: N batch, G views rendered together, V views, h and w pixels of a view, B tile side, W window
side.
"""

from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from fastssl_pipelines.augment import pixel_ops, sample_params
from fastssl_pipelines.augment.checks import applied_steps, require_drawable, require_fit
from fastssl_pipelines.augment.color_matrix import color_maps
from fastssl_pipelines.augment.cuda.kernels import (
    LEVELS,
    _blur_kernel,
    _equalize_kernel,
    _resample_kernel,
    _sample_kernel,
    _tiled_kernel,
    _whole_kernel,
)
from fastssl_pipelines.augment.image_batch import Images
from fastssl_pipelines.spec import View

WHOLE = 32  # largest side rendered as one tile; at 64 px it would spill registers on sm_80
SAMPLE_BLOCK = 128
HISTOGRAM_BLOCK = 1024  # pixels
# The widest windows that spill no registers on sm_80, sm_90 and sm_100.
WHOLE_TILES = {16: (16, 2), 32: (32, 4)}  # B = S rounded up: (W, warps)
PLANES_WARPS = 4  # at least, where views are resampled into planes: with 2, sm_90 spills
TILE, WINDOW, WARPS = 32, 32, 8  # of larger views
_TILING = {"B": TILE, "W": WINDOW, "num_warps": WARPS, "num_stages": 1}


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
    require_drawable(index, layout)
    layout = layout.contiguous()
    numbers = _numbers(views, index.device)
    key = torch.full((2,), seed, dtype=torch.int64, device=index.device)
    key[1] = epoch
    count, columns = len(index), len(sample_params.COLUMNS)
    table = torch.empty(len(views), count, columns, device=index.device)
    _sample_kernel[(triton.cdiv(count, SAMPLE_BLOCK), len(views))](
        table, index.contiguous(), layout, numbers, key, first, count,
        COLUMNS=columns, NUMBERS=numbers.shape[1], BLOCK=SAMPLE_BLOCK,
        enable_fp_fusion=False,  # a fused multiply-add rounds once where the reference rounds twice
    )  # fmt: skip
    return table


def render(
    images: Images, table: Tensor, view: View, quality: str, *, drawn: bool = False
) -> Tensor:
    """`reference.render`, within 1/255. -> (G, N, 3, h, w)

    The parameters are read back, and so waited for, unless they are `drawn`.
    """
    table = table.contiguous()
    if not drawn:
        require_fit(images.layout, table, view)
    rotates, equalizes = applied_steps(table, view, drawn)
    groups, count, columns = table.shape
    (height, width), last = view.shape, view.channels_last
    shape = (groups, count, height, width, 3) if last else (groups, count, 3, height, width)
    out = torch.empty(shape, dtype=view.dtype, device=table.device)
    affine = quality == "affine"
    colors = color_maps(table) if affine else table
    numbers = _numbers((view,), table.device)
    layout = images.layout.contiguous()
    static_config = {"COLUMNS": columns, "HEIGHT": height, "WIDTH": width}
    crop = {"CUBIC": view.interpolation == "bicubic", "EQUALIZED": equalizes}
    variant = {"LAST": last, "AFFINE": affine, "ROTATED": rotates}
    whole = max(height, width) <= WHOLE
    tiling = _whole_tiling(max(height, width)) if whole else _TILING
    lut = _equalized(images.flat, layout, table) if equalizes else images.flat
    planes = turns = colors  # unused where nothing is rotated
    grid = (count * groups,)
    if rotates:
        angle = table[..., sample_params.ANGLE] * pixel_ops.DEGREE
        # here, since the kernels' cosine of any argument would need a stack
        turns = torch.stack([angle.cos(), angle.sin()], dim=-1)
        planes = torch.empty(groups, count, 3, height, width, device=table.device)
        _resample_kernel[grid](
            images.flat, layout, table, lut, planes, count, groups, **static_config, **crop,
            **tiling | {"num_warps": max(tiling["num_warps"], PLANES_WARPS)},
        )  # fmt: skip
    source = (images.flat, layout, table, colors, numbers, lut, planes, turns, out)
    if whole:
        _whole_kernel[grid](*source, count, groups, **static_config, **crop, **variant, **tiling)
    else:
        unblurred = torch.empty(shape, dtype=torch.uint8, device=out.device)
        _tiled_kernel[grid](
            *source, unblurred, count, groups, **static_config, **crop, **variant, **tiling
        )
        tiles = triton.cdiv(height, TILE) * triton.cdiv(width, TILE)
        # a program of a view without blur returns at once
        _blur_kernel[(count * groups, tiles)](
            unblurred, table, numbers, out, **static_config, LAST=last, **tiling
        )
    return out.movedim(-1, 2) if last else out


def _whole_tiling(side: int) -> dict[str, Any]:
    """The tile of a view that is rendered as one."""
    tile = max(16, triton.next_power_of_2(side))
    window, warps = WHOLE_TILES[tile]
    return {"B": tile, "W": window, "num_warps": warps, "num_stages": 1}


def _equalized(flat: Tensor, layout: Tensor, table: Tensor) -> Tensor:
    """What the bytes of each channel of each crop become: (G * N, 3, 256) uint8."""
    groups, count, columns = table.shape
    lut = torch.empty(groups * count, 3, LEVELS, dtype=torch.uint8, device=table.device)
    _equalize_kernel[(groups * count, 3)](
        flat, layout, table, lut, count, COLUMNS=columns, BLOCK=HISTOGRAM_BLOCK
    )
    return lut
