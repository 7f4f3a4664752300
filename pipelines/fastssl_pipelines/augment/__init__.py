"""Drawing what a view is, and rendering it: apart, so that parameters can be logged, replayed and
learnt from.

Shapes: N batch, C channels, S pixels per side. Images are uint8 RGB of any sizes.
"""

from typing import Literal

from torch import Tensor

from fastssl_pipelines.augment.images import Images
from fastssl_pipelines.augment.params import Params
from fastssl_pipelines.spec import View

__all__ = ["Images", "Params", "draw", "render"]

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
    """The parameters of view `view_number` of the images `index` (N,) int64 of sizes `height`,
    `width`."""
    from fastssl_pipelines.augment import reference

    return reference.draw(view, seed, epoch, index, view_number, height, width)


def render(images: Images, params: Params, view: View, quality: Quality = "exact") -> Tensor:
    """The views of `images` that `params` describes. -> (N, 3, S, S) in the view's dtype and
    layout"""
    from fastssl_pipelines.augment import reference

    return reference.render(images, params, view)
