"""The contract of all engines: the views to render, the batches to yield, and what is guaranteed.

Guarantees. A pipeline's stream depends on (seed, epoch) alone. An epoch visits each index at most
once (the last incomplete batch is dropped, or shorter with drop_last=False), and ranks see disjoint
indices. `epoch(e, skip=b)` yields what `epoch(e)` yields from batch b on; `epoch(e, views=v)`
replaces the views of the pipeline for that epoch. An image is decoded once, whatever the number of
its views.

Shapes: N batch, M data set, C channels, H and W pixels of a view, V views.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

Interpolation = Literal["bilinear", "bicubic"]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PROBABILITIES = (
    "flip", "vertical_flip", "rotate", "jitter_p", "gray", "blur", "solarize", "equalize", "erase",
)  # fmt: skip
MAX_RATIO = 50.0  # of two sides: the exponential of the sampling is exact below e^4
MAX_SIGMA = 1e6  # px of a blur: any view is flat long before


@dataclass(frozen=True, kw_only=True)
class View:
    """One augmented view: crop, equalize, resize, flip, vertical flip, rotate, jitter, grayscale,
    blur, solarize, normalise, erase, in this order.

    Every engine supports every field. Probabilities are per sample; ranges are uniform.
    Semantics are torchvision's (pixel values in [0, 1], each colour operation clamps). ValueError
    names the field that no engine could render.
    """

    size: int | tuple[int, int]  # output side, or (height, width), px; (s, s) becomes s
    scale: tuple[float, float] = (0.08, 1.0)  # area of the crop over the area of the image
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width over height of the crop, log-uniform
    patch: int | None = None  # side of a square crop, px of the image, in place of scale and ratio
    interpolation: Interpolation = "bilinear"  # antialiased where the crop shrinks
    flip: float = 0.5  # probability of a horizontal flip
    vertical_flip: float = 0.0  # probability of a vertical flip
    rotate: float = 0.0  # probability of a rotation of the view, bilinear, black outside
    rotate_degrees: tuple[float, float] = (-30.0, 30.0)  # counter-clockwise
    # strengths of brightness, contrast, saturation (factors 1 - x to 1 + x) and hue (-x to x, parts
    # of the full circle)
    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    jitter_p: float = 0.0
    gray: float = 0.0  # probability of grayscale
    blur: float = 0.0  # probability of a Gaussian blur
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # px of the output
    # probability of equalizing the histogram of each channel of the crop, as bytes
    equalize: float = 0.0
    solarize: float = 0.0  # probability of solarizing
    solarize_threshold: float = 0.5  # values at or above it are inverted
    erase: float = 0.0  # probability of erasing a rectangle, after normalisation, with zeros
    erase_scale: tuple[float, float] = (0.02, 0.33)  # area erased over the area of the view
    erase_ratio: tuple[float, float] = (0.3, 3.3)  # height over width of the rectangle, log-uniform
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # RGB, of values in [0, 1]
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    dtype: torch.dtype = torch.float32  # of the output: float32, float16 or bfloat16
    channels_last: bool = False  # memory layout of the output

    def __post_init__(self) -> None:
        self._normalize_size()
        self._check_numbers()
        self._check_ranges()
        if self.interpolation not in ("bilinear", "bicubic"):
            raise ValueError(
                f"View.interpolation is {self.interpolation!r}: 'bilinear' or 'bicubic'"
            )
        if self.dtype not in DTYPES:
            raise ValueError(f"View.dtype is {self.dtype}: choose one of {DTYPES}")

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width) of the output, px."""
        return self.size if isinstance(self.size, tuple) else (self.size, self.size)

    def _normalize_size(self) -> None:
        """A square size is an int, so that equal views compare equal."""
        size = self.size if isinstance(self.size, tuple | list) else (self.size, self.size)
        whole = [isinstance(side, int | np.integer) and side >= 1 for side in size]
        if len(size) != 2 or not all(whole):
            raise ValueError(
                f"View.size is {self.size}: give a side, or (height, width), of at least 1 pixel"
            )
        height, width = (int(side) for side in size)
        object.__setattr__(self, "size", height if height == width else (height, width))

    def _check_numbers(self) -> None:
        if self.patch is not None and self.patch < 1:
            raise ValueError(f"View.patch is {self.patch}: it must be at least 1 pixel, or None")
        for name in PROBABILITIES:
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"View.{name} is {value}: a probability must lie in [0, 1]")
        finite = all(0 <= strength < math.inf for strength in self.jitter)
        if len(self.jitter) != 4 or not finite or self.jitter[3] > 0.5:
            raise ValueError(
                f"View.jitter is {self.jitter}: give 4 strengths >= 0, and hue at most 0.5"
            )
        if not math.isfinite(self.solarize_threshold):
            raise ValueError(f"View.solarize_threshold is {self.solarize_threshold}")
        if len(self.mean) != 3 or len(self.std) != 3 or not all(map(math.isfinite, self.mean)):
            raise ValueError(
                f"View.mean is {self.mean}, View.std is {self.std}: give 3 numbers each"
            )
        if not all(0 < s < math.inf for s in self.std):
            raise ValueError(f"View.std is {self.std}: standard deviations must be positive")

    def _check_ranges(self) -> None:
        for name in ("scale", "ratio", "blur_sigma", "erase_scale", "erase_ratio"):
            low, high = getattr(self, name)
            if not 0 < low <= high < math.inf:
                raise ValueError(
                    f"View.{name} is {(low, high)}: give (low, high) with 0 < low <= high"
                )
        if self.scale[1] > 1:
            raise ValueError(
                f"View.scale is {self.scale}: a crop cannot be larger than the image (1.0)"
            )
        if self.erase_scale[1] > 1:
            raise ValueError(
                f"View.erase_scale is {self.erase_scale}: at most the whole view (1.0)"
            )
        for name in ("ratio", "erase_ratio"):
            low, high = getattr(self, name)
            if low < 1 / MAX_RATIO or high > MAX_RATIO:
                raise ValueError(
                    f"View.{name} is {(low, high)}: sides may differ by a factor of {MAX_RATIO:g}"
                )
        if self.blur_sigma[1] > MAX_SIGMA:
            raise ValueError(f"View.blur_sigma is {self.blur_sigma}: at most {MAX_SIGMA:g} px")
        low, high = self.rotate_degrees
        if not -360 <= low <= high <= 360:
            raise ValueError(
                f"View.rotate_degrees is {(low, high)}: give (low, high) within [-360, 360]"
            )


class Batch(NamedTuple):
    """`views`: V tensors (N, C, H, W) in each view's dtype and memory format; `index`: (N,) int64
    on the same device, the images' positions in the data set; `params`: V `Params`, where
    keep_params was set."""

    views: Sequence[Tensor]
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody calls on a Batch
    params: Any = None


class Pipeline(Protocol):
    """An endless supply of epochs. `len()` is the number of batches in one epoch of this rank.

    It is also a data loader: `iter()` yields the batches of epoch `next_epoch`, which then is the
    following one, so that each `for batch in pipeline` walks through one epoch, in a new order.
    """

    next_epoch: int  # of the next `iter()`; 0 at first, and may be set

    @property
    def views(self) -> tuple[View, ...]: ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Batch]: ...

    def epoch(
        self, epoch: int, skip: int = 0, views: Sequence[View] | None = None
    ) -> Iterator[Batch]:
        """Batches `skip` to the last; `views` replaces the pipeline's own for this epoch."""
        ...
