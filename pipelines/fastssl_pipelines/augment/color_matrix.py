"""The colour steps of a view as one affine map of RGB: quality "affine".

What it changes, all of it visible: no clamping between steps, contrast around 0.5 in place of the
view's own mean, and a hue that turns linearly in YIQ (as NVIDIA DALI's color_twist does) in place
of HSV.

Shapes: ... any leading dimensions.
"""

import math
from functools import cache

import numpy as np
import torch
from torch import Tensor

from fastssl_pipelines.augment import pixel_ops, sample_params

YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.321], [0.211, -0.523, 0.311]])  # from RGB


def color_maps(table: Tensor) -> Tensor:
    """The colour steps of every row of `table` (..., columns), in its own order. -> (..., 12)

    The 12 numbers are the rows of a (3, 4) matrix: red' = m[0] r + m[1] g + m[2] b + m[3].
    """
    gray, center, *_ = constants = _constants(table.device)
    color = torch.eye(3, 4, device=table.device).expand(*table.shape[:-1], 3, 4)
    factors = table[..., sample_params.BRIGHTNESS : sample_params.HUE + 1, None, None]
    brightness, contrast, saturation, turns = factors.unbind(-3)
    rotation = _hue_rotation(turns, *constants[2:])
    for slot in range(sample_params.STEP0, sample_params.STEP3 + 1):
        step = table[..., slot, None, None]
        color = torch.where(
            step == 0,
            brightness * color,
            torch.where(
                step == 1,
                contrast * color + (1 - contrast) * center,
                torch.where(
                    step == 2,
                    saturation * color + (1 - saturation) * (gray @ color),
                    torch.where(step == 3, rotation @ color, color),
                ),
            ),
        )
    return color.reshape(*table.shape[:-1], 12)


@cache
def _constants(device: torch.device) -> tuple[Tensor, ...]:
    """gray (3, 3), center (4,), and what `_hue_rotation` keeps, turns along and across, (3, 3)
    each; on the device once and for all: no upload per batch."""
    gray = [[pixel_ops.RED, pixel_ops.GREEN, pixel_ops.BLUE]] * 3
    luma, plane, across = np.diag([1.0, 0, 0]), np.diag([0.0, 1, 1]), np.zeros((3, 3))
    across[1, 2], across[2, 1] = 1.0, -1.0
    inverse = np.linalg.inv(YIQ)
    turned = [inverse @ part @ YIQ for part in (luma, plane, across)]
    numbers = (gray, [0.0, 0.0, 0.0, 0.5], *turned)
    return tuple(torch.tensor(x, dtype=torch.float32, device=device) for x in numbers)


def _hue_rotation(turns: Tensor, keep: Tensor, along: Tensor, over: Tensor) -> Tensor:
    """(..., 1, 1) -> (..., 3, 3): the rotation of the (I, Q) plane; HSV's hue runs against its
    angle."""
    angle = 2 * math.pi * turns
    return keep + torch.cos(angle) * along + torch.sin(angle) * over
