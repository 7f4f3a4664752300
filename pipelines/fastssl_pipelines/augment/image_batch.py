"""Images of one or of many sizes as one flat uint8 tensor, which every back end reads.

Shapes: M images, H and W pixels.
"""

import sys
import warnings
from collections.abc import Sequence
from dataclasses import InitVar, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastssl_pipelines.memory import require_memory
from fastssl_pipelines.sources.decoding import to_rgb

WANTED = "wanted uint8 RGB, (M, H, W, 3), or a sequence of (H, W, 3) or of PIL images"


@dataclass(frozen=True)
class Images:
    """RGB uint8 images, stored back to back: image i is `height * width * 3` bytes of `flat`.

    ValueError where an image reaches beyond `flat`, or `same_size` is not true: every back end
    reads memory where `layout` says. On a GPU this check waits for the device; `checked` skips it,
    for layouts that were checked on the host.
    """

    flat: Tensor  # uint8
    layout: Tensor  # (M, 3) int64: offset in `flat`, height, width
    same_size: bool  # whether all have one size
    checked: InitVar[bool] = False

    def __post_init__(self, checked: bool) -> None:
        flat, layout = self.flat, self.layout
        if flat.dtype != torch.uint8 or flat.dim() != 1 or not flat.is_contiguous():
            raise ValueError(
                f"flat is {flat.dtype} {tuple(flat.shape)}: give contiguous (.,) uint8"
            )
        if layout.dtype != torch.int64 or layout.dim() != 2 or layout.shape[1] != 3:
            raise ValueError(f"layout is {layout.dtype} {tuple(layout.shape)}: give (M, 3) int64")
        if layout.device != flat.device:
            raise ValueError(f"layout is on {layout.device}, flat on {flat.device}: move one")
        if not checked:
            require_layout(layout, len(flat), self.same_size)

    @property
    def count(self) -> int:
        return len(self.layout)

    def select(self, index: Tensor) -> "Images":
        """The images at `index` (N,); pixels are not copied."""
        return replace(self, layout=self.layout[index], checked=True)

    def to(self, device: torch.device | str) -> "Images":
        """These images on `device`; ValueError where they do not fit into its free memory."""
        if self.flat.device.type != torch.device(device).type:
            _require_room(self.count, self.flat.nbytes, torch.device(device))
        flat, layout = self.flat.to(device), self.layout.to(device)
        return replace(self, flat=flat, layout=layout, checked=True)

    def pixels(self, i: int) -> Tensor:
        """(H, W, 3) of image i."""
        start, height, width = self.layout[i].tolist()
        return self.flat[start : start + height * width * 3].view(height, width, 3)


def as_images(source: Any) -> Images:
    """`source`, checked, as `Images`; one contiguous array is not copied.

    source: uint8 array or tensor (M, H, W, 3), or a sequence of (H, W, 3) or of PIL images, of any
    sizes. Arrays may be flipped or otherwise strided (`bgr[..., ::-1]`). PIL images of other modes
    become RGB as files do: gray is repeated, alpha dropped. ValueError names the first image that
    is not uint8 RGB of at least 2 x 2 pixels.
    """
    if isinstance(source, Images):
        return source
    if isinstance(source, np.ndarray | Tensor) and source.dtype != object:
        pixels = _tensor(source)
        _check(pixels.shape, pixels.dtype, 4, "source")
        if not pixels.is_contiguous():
            _require_room(len(pixels), pixels.numel(), pixels.device)
        count, height, width, _ = pixels.shape
        layout = layout_of(torch.tensor([[height, width]]).expand(count, 2)).to(pixels.device)
        return Images(pixels.reshape(-1), layout, same_size=True, checked=True)
    if not isinstance(source, Sequence | np.ndarray) or len(source) == 0:
        raise ValueError(f"source is {type(source).__name__} without images; {WANTED}")
    tensors = [_tensor(image) for image in source]
    for i, image in enumerate(tensors):
        _check(image.shape, image.dtype, 3, f"source[{i}]")
    _require_room(len(tensors), sum(t.nbytes for t in tensors), tensors[0].device)
    flat = torch.cat([image.reshape(-1) for image in tensors])
    layout = layout_of([(t.shape[0], t.shape[1]) for t in tensors])
    return Images(flat, layout.to(flat.device), is_one_size(layout), checked=True)


def is_picture(source: Any) -> bool:
    """Whether `source` is a PIL image; there is none before PIL is imported."""
    library = sys.modules.get("PIL.Image")
    return library is not None and isinstance(source, library.Image)


def _tensor(pixels: Any) -> Tensor:
    if is_picture(pixels):
        pixels = to_rgb(pixels)
    if isinstance(pixels, np.ndarray) and min(pixels.strides, default=1) < 0:
        pixels = np.ascontiguousarray(pixels)  # torch has no negative strides
    with warnings.catch_warnings():  # a read-only array is fine: nothing here writes to it
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        try:
            return torch.as_tensor(pixels)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"source holds {type(pixels).__name__} ({error}); {WANTED}") from None


def layout_of(sizes: Sequence[tuple[int, int]] | Tensor) -> Tensor:
    """Offset, height and width of images of these sizes (N, 2), stored back to back. -> (N, 3)
    int64"""
    size = torch.as_tensor(sizes, dtype=torch.int64).reshape(-1, 2)
    length = 3 * size.prod(1)
    return torch.stack([length.cumsum(0) - length, *size.unbind(1)], dim=1)


def require_layout(layout: Tensor, size: int, same_size: bool) -> None:
    """ValueError where an image of `layout` (N, 3) reaches beyond `size` bytes, or has another size
    than the others though `same_size` is True."""
    if len(layout) == 0:
        return
    start, height, width = layout.unbind(1)
    lowest, end = int(start.min()), int((start + 3 * height * width).max())
    smallest = int(layout[:, 1:].min())
    if lowest < 0 or smallest < 1 or end > size:
        raise ValueError(
            f"layout reaches from byte {lowest} to {end} of {size}, its smallest side is"
            f" {smallest} px: give offset, height and width of each image"
        )
    if same_size and not is_one_size(layout):
        raise ValueError("same_size is True, and the images of layout have several sizes")


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
