"""Sampling the parameters of a view, and rendering it: two steps, so that parameters can be logged,
replayed and learnt from.

Shapes: N batch, C channels, h and w pixels of a view, V views. Images are uint8 RGB of any sizes.
"""

from collections.abc import Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from itertools import groupby
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from fastssl_pipelines.augment.image_batch import Images, as_images
from fastssl_pipelines.augment.sample_params import Params
from fastssl_pipelines.spec import View

__all__ = ["Images", "Params", "Quality", "as_images", "draw", "render", "views_of"]

Quality = Literal["exact", "affine"]


def draw(
    view: View,
    seed: int,
    epoch: int | Tensor,
    index: Tensor,
    view_number: int,
    height: Tensor | int,
    width: Tensor | int,
) -> Params:
    """Sample the parameters of view `view_number` of images `index` (N,) int64 of these sizes, on
    its device.

    They depend on the arguments alone, bit for bit the same on every device. seed, epoch: below
    2^32. ValueError where one of these, or the shape or dtype of `index`, is wrong.
    """
    for name, word in (("seed", seed), ("epoch", epoch)):
        if not isinstance(word, Tensor) and not 0 <= word < 2**32:
            raise ValueError(f"{name} is {word}: it must lie in [0, 2^32)")
    sizes = (torch.as_tensor(x, device=index.device).expand(len(index)) for x in (height, width))
    layout = torch.stack([torch.zeros_like(index), *sizes], dim=1)
    return Params(_back_end(index).draw((view,), seed, epoch, index, layout, view_number)[0])


def render(images: Images, params: Params, view: View, quality: Quality = "exact") -> Tensor:
    """Render `images` (N) with the parameters `params` (N). -> (N, 3, h, w), the view's dtype and
    layout

    ValueError, before any memory is read, where a crop reaches beyond its image, an erased
    rectangle beyond the view, or a number is none that a View draws; on a GPU this check waits for
    the device, `views_of` needs none.
    quality: "exact" applies the colour steps as torchvision does; "affine" applies one matrix per
    view, with a linear hue and a fixed contrast centre (see `color_matrix.py`), which is cheaper.
    """
    if quality not in ("exact", "affine"):
        raise ValueError(f"quality is {quality!r}: choose 'exact' or 'affine'")
    return _back_end(images.flat).render(images, params.table[None], view, quality)[0]


def views_of(
    images: Images,
    views: Sequence[View],
    seed: int,
    epoch: int | Tensor,
    index: Tensor,
    quality: Quality = "exact",
) -> tuple[list[Tensor], tuple[Params, ...]]:
    """Sample and render all `views` of `images` (N), whose positions in the data set are `index`
    (N,). -> V tensors, V `Params`

    Consecutive views with one static configuration are rendered together, as slices of one tensor.
    """
    back_end = _back_end(images.flat)
    table = back_end.draw(tuple(views), seed, epoch, index, images.layout, 0)
    rendered: list[Tensor] = []
    for _, run in groupby(views, key=_static_config):
        alike = list(run)
        rows = table[len(rendered) : len(rendered) + len(alike)]
        rendered += back_end.render(images, rows, alike[0], quality, drawn=True).unbind(0)
    return rendered, tuple(Params(rows) for rows in table)


def _static_config(view: View) -> tuple[object, ...]:
    """The fields of a view that a render call fixes for all samples; the others are sampled."""
    normalization = (view.mean, view.std)
    memory = (view.dtype, view.channels_last)
    return view.size, view.interpolation, normalization, memory, view.rotate > 0, view.equalize > 0


def _back_end(tensor: Tensor) -> ModuleType:
    """Triton for tensors on a GPU; on a CPU numba, or plain torch where numba is not installed."""
    return _load_back_end(tensor.device.type)


@cache
def _load_back_end(device_type: str) -> ModuleType:
    if device_type == "cuda":
        return import_module("fastssl_pipelines.augment.cuda")
    name = "cpu" if find_spec("numba") else "reference"
    return import_module(f"fastssl_pipelines.augment.{name}")
