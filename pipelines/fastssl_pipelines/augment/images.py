"""Images of one size or of many, as one flat run of bytes: what every back end reads.

Shapes: M images, H and W pixels.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

WANTED = "wanted uint8 RGB, (M, H, W, 3) or a sequence of (H, W, 3)"


class Images(NamedTuple):
    """RGB uint8 images. Image i is the `height[i] * width[i] * 3` bytes of `flat` from `offset[i]`
    on."""

    flat: Tensor  # uint8
    offset: Tensor  # (M,) int64
    height: Tensor  # (M,) int32
    width: Tensor  # (M,) int32
    same: bool  # whether all have one size

    def select(self, index: Tensor) -> "Images":
        """The images at `index` (N,): no pixel is copied."""
        return Images(
            self.flat, self.offset[index], self.height[index], self.width[index], self.same
        )

    def to(self, device: torch.device | str) -> "Images":
        flat, offset, height, width = (part.to(device) for part in self[:4])
        return Images(flat, offset, height, width, self.same)

    def pixels(self, i: int) -> Tensor:
        """(H, W, 3) of image i."""
        start, height, width = int(self.offset[i]), int(self.height[i]), int(self.width[i])
        return self.flat[start : start + height * width * 3].view(height, width, 3)


def as_images(source: Any) -> Images:
    """`source` checked and laid flat, without a copy where it is one contiguous array.

    source: uint8 array or tensor (M, H, W, 3), or a sequence of (H, W, 3) of any sizes. ValueError
    says which image is wrong and how.
    """
    if isinstance(source, Images):
        return source
    if isinstance(source, np.ndarray | Tensor):
        pixels = torch.as_tensor(source)
        _check(pixels.shape, pixels.dtype, 4, "source")
        count, height, width, _ = pixels.shape
        return _lay(pixels.reshape(-1), [height] * count, [width] * count)
    if not isinstance(source, Sequence) or len(source) == 0:
        raise ValueError(f"source is {type(source).__name__} without images; {WANTED}")
    tensors = [torch.as_tensor(image) for image in source]
    for i, image in enumerate(tensors):
        _check(image.shape, image.dtype, 3, f"source[{i}]")
    flat = torch.cat([image.reshape(-1) for image in tensors])
    return _lay(flat, [t.shape[0] for t in tensors], [t.shape[1] for t in tensors])


def _lay(flat: Tensor, heights: list[int], widths: list[int]) -> Images:
    height, width = (
        torch.tensor(heights, dtype=torch.int32),
        torch.tensor(widths, dtype=torch.int32),
    )
    size = height.long() * width.long() * 3
    same = bool((height == height[0]).all() and (width == width[0]).all())
    device = flat.device
    return Images(
        flat, (size.cumsum(0) - size).to(device), height.to(device), width.to(device), same
    )


def _check(shape: torch.Size, dtype: torch.dtype, dims: int, name: str) -> None:
    if dtype != torch.uint8:
        raise ValueError(f"{name} is {dtype}; {WANTED}: multiply by 255, round and cast")
    if len(shape) != dims:
        raise ValueError(f"{name} has shape {tuple(shape)}; {WANTED}")
    if shape[-1] != 3:
        hint = "repeat gray 3 times along a last axis, drop alpha, put channels last"
        raise ValueError(f"{name} has shape {tuple(shape)}; {WANTED}: {hint}")
    if min(shape) < 1 or min(shape[-3:-1]) < 2:
        raise ValueError(f"{name} has shape {tuple(shape)}: an image needs at least 2 x 2 pixels")
