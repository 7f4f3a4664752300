"""The contract of all engines: the views to render, the batches to yield, and what is guaranteed.

Guarantees. A pipeline's stream depends on (seed, epoch) alone. An epoch visits each index at most
once (the last incomplete batch is dropped), and ranks see disjoint indices. `epoch(e, skip=b)`
yields what `epoch(e)` yields from batch b on; `epoch(e, views=v)` replaces the views of the
pipeline for that epoch. An image is decoded once, whatever the number of its views.

Shapes: N batch, M data set, C channels, S pixels per side, V views.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

Interpolation = Literal["bilinear", "bicubic"]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, kw_only=True)
class View:
    """One augmented view: crop, flip, jitter, grayscale, blur, solarize, normalise, erase, in this
    order.

    Every engine supports every field. Probabilities are per sample; ranges are uniform.
    Semantics are torchvision's (pixel values in [0, 1], each colour operation clamps).
    """

    size: int  # output side, px
    scale: tuple[float, float] = (0.08, 1.0)  # area of the crop over the area of the image
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width over height of the crop, log-uniform
    patch: int | None = None  # side of a square crop, px of the image, in place of scale and ratio
    interpolation: Interpolation = "bilinear"  # antialiased where the crop shrinks
    flip: float = 0.5  # probability of a horizontal flip
    # strengths of brightness, contrast, saturation (factors 1 - x to 1 + x) and hue (-x to x, parts
    # of the full circle)
    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    jitter_p: float = 0.0
    gray: float = 0.0  # probability of grayscale
    blur: float = 0.0  # probability of a Gaussian blur
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # px of the output
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
        if self.size < 1:
            raise ValueError(f"View.size is {self.size}: it must be at least 1 pixel")
        if self.patch is not None and self.patch < 1:
            raise ValueError(f"View.patch is {self.patch}: it must be at least 1 pixel, or None")
        for name in ("flip", "jitter_p", "gray", "blur", "solarize", "erase"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"View.{name} is {value}: a probability must lie in [0, 1]")
        for name in ("scale", "ratio", "blur_sigma", "erase_scale", "erase_ratio"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
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
        if not all(strength >= 0 for strength in self.jitter) or self.jitter[3] > 0.5:
            raise ValueError(
                f"View.jitter is {self.jitter}: strengths are >= 0, and hue at most 0.5"
            )
        if self.interpolation not in ("bilinear", "bicubic"):
            raise ValueError(
                f"View.interpolation is {self.interpolation!r}: 'bilinear' or 'bicubic'"
            )
        if len(self.mean) != 3 or len(self.std) != 3:
            raise ValueError(
                f"View.mean is {self.mean}, View.std is {self.std}: give 3 numbers each"
            )
        if not all(s > 0 for s in self.std):
            raise ValueError(f"View.std is {self.std}: standard deviations must be positive")
        if self.dtype not in DTYPES:
            raise ValueError(f"View.dtype is {self.dtype}: choose one of {DTYPES}")


class Batch(NamedTuple):
    """`views`: V tensors (N, C, S, S) in each view's dtype and memory format; `index`: (N,) int64
    on the same device, the images' positions in the data set; `params`: V `Params`, where
    keep_params was set."""

    views: Sequence[Tensor]
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody calls on a Batch
    params: Any = None


class Pipeline(Protocol):
    """An endless supply of epochs. `len()` is the number of batches in one epoch of this rank."""

    @property
    def views(self) -> tuple[View, ...]: ...

    def __len__(self) -> int: ...

    def epoch(
        self, epoch: int, skip: int = 0, views: Sequence[View] | None = None
    ) -> Iterator[Batch]:
        """Batches `skip` to the last; `views` replaces the pipeline's own for this epoch."""
        ...
