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
    place: Tensor  # (M, 3) int64: offset, height, width
    same: bool  # whether all have one size

    @property
    def offset(self) -> Tensor:
        return self.place[:, 0]

    @property
    def height(self) -> Tensor:
        return self.place[:, 1]

    @property
    def width(self) -> Tensor:
        return self.place[:, 2]

    def select(self, index: Tensor) -> "Images":
        """The images at `index` (N,): no pixel is copied."""
        return self._replace(place=self.place[index])

    def to(self, device: torch.device | str) -> "Images":
        return self._replace(flat=self.flat.to(device), place=self.place.to(device))

    def pixels(self, i: int) -> Tensor:
        """(H, W, 3) of image i."""
        start, height, width = self.place[i].tolist()
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
    height, width = torch.tensor(heights), torch.tensor(widths)
    size = height * width * 3
    place = torch.stack([size.cumsum(0) - size, height, width], dim=1)
    same = bool((place[:, 1:] == place[0, 1:]).all())
    return Images(flat, place.to(flat.device), same)


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
