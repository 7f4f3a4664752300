"""The colour steps of a view as one affine map of RGB: quality "affine".

It differs visibly from quality "exact": no clamping between steps, contrast around 0.5 in place of
the mean of the view, and hue as a rotation in YIQ (as in NVIDIA DALI's color_twist) in place of
HSV.

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
    """The colour steps of each row of `table` (..., columns), in its order. -> (..., 12)

    The 12 numbers are the rows of a (3, 4) matrix: red' = m[0] r + m[1] g + m[2] b + m[3].
    """
    gray, center, *_ = constants = _constants(table.device)
    color = torch.eye(3, 4, device=table.device).expand(*table.shape[:-1], 3, 4)
    factors = table[..., sample_params.BRIGHTNESS : sample_params.HUE + 1, None, None]
    brightness, contrast, saturation, hue = factors.unbind(-3)
    rotation = _hue_rotation(hue, *constants[2:])
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
    """gray (3, 3), center (4,), and the three matrices (3, 3) of `_hue_rotation`; cached on the
    device, so that a batch uploads nothing."""
    gray = [[pixel_ops.RED, pixel_ops.GREEN, pixel_ops.BLUE]] * 3
    luma, plane, across = np.diag([1.0, 0, 0]), np.diag([0.0, 1, 1]), np.zeros((3, 3))
    across[1, 2], across[2, 1] = 1.0, -1.0
    inverse = np.linalg.inv(YIQ)
    rotation = [inverse @ part @ YIQ for part in (luma, plane, across)]
    numbers = (gray, [0.0, 0.0, 0.0, 0.5], *rotation)
    return tuple(torch.tensor(x, dtype=torch.float32, device=device) for x in numbers)


def _hue_rotation(hue: Tensor, luma: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """The rotation of the (I, Q) plane, by a `hue` in parts of the full circle; the hue of HSV has
    the opposite sign. (..., 1, 1) -> (..., 3, 3)"""
    angle = 2 * math.pi * hue
    return luma + torch.cos(angle) * cosine + torch.sin(angle) * sine
