"""Images of one or of many sizes as one flat uint8 tensor, which every back end reads.

Shapes: M images, H and W pixels.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastssl_pipelines.memory import require_memory

WANTED = "wanted uint8 RGB, (M, H, W, 3) or a sequence of (H, W, 3)"


@dataclass(frozen=True)
class Images:
    """RGB uint8 images, stored back to back: image i is `height * width * 3` bytes of `flat`."""

    flat: Tensor  # uint8
    layout: Tensor  # (M, 3) int64: offset in `flat`, height, width
    same_size: bool  # whether all have one size

    @property
    def count(self) -> int:
        return len(self.layout)

    def select(self, index: Tensor) -> "Images":
        """The images at `index` (N,); pixels are not copied."""
        return replace(self, layout=self.layout[index])

    def to(self, device: torch.device | str) -> "Images":
        """These images on `device`; ValueError where they do not fit into its free memory."""
        if self.flat.device.type != torch.device(device).type:
            _require_room(self.count, self.flat.nbytes, torch.device(device))
        return replace(self, flat=self.flat.to(device), layout=self.layout.to(device))

    def pixels(self, i: int) -> Tensor:
        """(H, W, 3) of image i."""
        start, height, width = self.layout[i].tolist()
        return self.flat[start : start + height * width * 3].view(height, width, 3)


def as_images(source: Any) -> Images:
    """`source`, checked, as `Images`; one contiguous array is not copied.

    source: uint8 array or tensor (M, H, W, 3), or a sequence of (H, W, 3) of any sizes. ValueError
    names the first image that is not uint8 RGB of at least 2 x 2 pixels.
    """
    if isinstance(source, Images):
        return source
    if isinstance(source, np.ndarray | Tensor):
        pixels = _tensor(source)
        _check(pixels.shape, pixels.dtype, 4, "source")
        count, height, width, _ = pixels.shape
        layout = layout_of(torch.tensor([[height, width]]).expand(count, 2))
        return Images(pixels.reshape(-1), layout.to(pixels.device), same_size=True)
    if not isinstance(source, Sequence) or len(source) == 0:
        raise ValueError(f"source is {type(source).__name__} without images; {WANTED}")
    tensors = [_tensor(image) for image in source]
    for i, image in enumerate(tensors):
        _check(image.shape, image.dtype, 3, f"source[{i}]")
    _require_room(len(tensors), sum(t.nbytes for t in tensors), tensors[0].device)
    flat = torch.cat([image.reshape(-1) for image in tensors])
    layout = layout_of([(t.shape[0], t.shape[1]) for t in tensors])
    return Images(flat, layout.to(flat.device), is_one_size(layout))


def _tensor(pixels: Any) -> Tensor:
    with warnings.catch_warnings():  # a read-only array is fine: nothing here writes to it
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.as_tensor(pixels)


def layout_of(sizes: Sequence[tuple[int, int]] | Tensor) -> Tensor:
    """Offset, height and width of images of these sizes (N, 2), stored back to back. -> (N, 3)
    int64"""
    size = torch.as_tensor(sizes, dtype=torch.int64).reshape(-1, 2)
    length = 3 * size.prod(1)
    return torch.stack([length.cumsum(0) - length, *size.unbind(1)], dim=1)


def is_one_size(layout: Tensor) -> bool:
    """Whether all images of a layout (N, 3) have one size."""
    return bool((layout[:, 1:] == layout[:1, 1:]).all())


def _require_room(count: int, needed: int, device: torch.device) -> None:
    remedy = "store them smaller, or use an engine that reads from disk (dali, ffcv)"
    require_memory(needed, f"holding {count} images in memory", remedy, device)


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
