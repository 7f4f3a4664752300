"""Whether parameters fit the images and the view that they are to render.

Every back end reads and writes memory where its parameters say. Parameters that it has drawn itself
for these images fit by construction; all others are checked before memory is touched. On a GPU that
check waits for the device, so pipelines, which draw their own, never make it.

Shapes: N batch, G groups of it.
"""

import torch
from torch import Tensor

from fastssl_pipelines.augment.sample_params import (
    ANGLE,
    COLUMNS,
    EQUALIZE,
    ERASE_HEIGHT,
    ERASE_LEFT,
    ERASE_TOP,
    ERASE_WIDTH,
    HEIGHT,
    LEFT,
    TOP,
    WIDTH,
)  # fmt: skip
from fastssl_pipelines.spec import MAX_SIGMA, View

ANY = 2.0**24  # above it float32 does not hold every integer
LIMITS = {
    "top": (0, ANY), "left": (0, ANY), "height": (1, ANY), "width": (1, ANY),
    "flip": (0, 1),
    "step0": (-1, 3), "step1": (-1, 3), "step2": (-1, 3), "step3": (-1, 3),
    "brightness": (0, ANY), "contrast": (0, ANY), "saturation": (0, ANY), "hue": (-0.5, 0.5),
    "gray": (0, 1),
    "sigma": (0, MAX_SIGMA),
    "solarize": (-ANY, ANY),
    "erase_top": (0, ANY), "erase_left": (0, ANY), "erase_height": (0, ANY),
    "erase_width": (0, ANY),
    "vertical_flip": (0, 1),
    "angle": (-360, 360),
    "equalize": (0, 1),
}  # fmt: skip
BOUNDS = torch.tensor([LIMITS[name] for name in COLUMNS], dtype=torch.float32).T  # (2, columns)
WHOLE = (TOP, LEFT, HEIGHT, WIDTH, ERASE_TOP, ERASE_LEFT, ERASE_HEIGHT, ERASE_WIDTH)
WHOLE_NUMBERS = torch.zeros(len(COLUMNS), dtype=torch.bool)
WHOLE_NUMBERS[list(WHOLE)] = True
DRAW_AGAIN = "draw the parameters for these images and this view"


def require_drawable(index: Tensor, layout: Tensor) -> None:
    """ValueError where `index` is not (N,) int64 beside a `layout` of (N, 3), on one device."""
    if index.dtype != torch.int64 or index.dim() != 1 or index.device != layout.device:
        raise ValueError(
            f"index is {index.dtype} of shape {tuple(index.shape)} on {index.device}: give (N,)"
            f" int64 on {layout.device}"
        )
    if len(index) != len(layout):
        raise ValueError(
            f"index has {len(index)} positions, there are {len(layout)} images: give one each"
        )


def require_table(layout: Tensor, table: Tensor) -> None:
    """ValueError where `table` is not (G, N, columns) float32 on the device of `layout` (N, 3)."""
    if table.dtype != torch.float32 or table.dim() != 3 or table.shape[2] != len(COLUMNS):
        raise ValueError(
            f"params are {table.dtype} with {table.shape[-1]} columns: they need float32 and the"
            f" {len(COLUMNS)} columns of `draw`"
        )
    if table.shape[1] != len(layout):
        raise ValueError(
            f"params have {table.shape[1]} rows, there are {len(layout)} images: give one each"
        )
    if table.device != layout.device:
        raise ValueError(f"params are on {table.device}, the images on {layout.device}: move one")


def require_fit(layout: Tensor, table: Tensor, view: View) -> None:
    """ValueError naming the first row of `table` (G, N, columns) that reaches beyond its image, of
    `Images.layout` (N, 3), or beyond the view, or holds a number that no View draws."""
    require_table(layout, table)
    wrong = misfits(layout, table, view)
    if bool(wrong.any()):
        raise misfit_error(layout, table, view, int(wrong.flatten().long().argmax()))


def misfits(layout: Tensor, table: Tensor, view: View) -> Tensor:
    """Which rows of `table` (G, N, columns) do not fit. -> (G, N) bool"""
    low, high = BOUNDS.to(table.device)
    fits = (table >= low) & (table <= high)  # NaN fits nowhere
    fits &= (table == table.floor()) | ~WHOLE_NUMBERS.to(table.device)
    crop_end = table[..., TOP : LEFT + 1] + table[..., HEIGHT : WIDTH + 1]
    end = table[..., ERASE_TOP : ERASE_LEFT + 1] + table[..., ERASE_HEIGHT : ERASE_WIDTH + 1]
    sides = torch.tensor(view.shape, device=table.device)
    inside = (crop_end <= layout[:, 1:]) & (end <= sides)
    return ~(fits.all(-1) & inside.all(-1))


def misfit_error(layout: Tensor, table: Tensor, view: View, slot: int) -> ValueError:
    """The error that says what is wrong with row `slot` of `table` (G, N, columns), flattened."""
    n = slot % len(layout)
    row = dict(zip(COLUMNS, table.reshape(-1, len(COLUMNS))[slot].tolist(), strict=True))
    for name, (low, high) in LIMITS.items():
        whole = COLUMNS.index(name) in WHOLE
        if not low <= row[name] <= high or (whole and row[name] % 1):
            kind = "a whole number" if whole else "a number"
            return ValueError(
                f"params row {n}: {name} is {row[name]:g}, wanted {kind} from {low:g} to {high:g}"
            )
    height, width = layout[n, 1:].tolist()
    box = [int(row[name]) for name in ("height", "width", "top", "left")]
    if box[0] + box[2] > height or box[1] + box[3] > width:
        return ValueError(
            f"params row {n}: a crop of {box[0]} x {box[1]} px at ({box[2]}, {box[3]}) does not fit"
            f" its image of {height} x {width} px; {DRAW_AGAIN}"
        )
    box = [int(row[f"erase_{name}"]) for name in ("height", "width", "top", "left")]
    return ValueError(
        f"params row {n}: erasing {box[0]} x {box[1]} px at ({box[2]}, {box[3]}) does not fit the"
        f" view of {view.shape[0]} x {view.shape[1]} px; {DRAW_AGAIN}"
    )


def applied_steps(table: Tensor, view: View, drawn: bool) -> tuple[bool, bool]:
    """Whether any row rotates, and whether any equalizes: for parameters drawn from `view` what it
    allows, which needs no wait for a GPU, for others what they hold."""
    if drawn:
        return view.rotate > 0, view.equalize > 0
    rotates, equalizes = (table[..., [ANGLE, EQUALIZE]] != 0).flatten(0, 1).any(0).tolist()
    return rotates, equalizes
