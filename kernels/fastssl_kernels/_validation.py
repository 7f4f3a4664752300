"""One check of the `views` argument for every loss over views.

Shapes: N batch, D embedding, V views.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def stack_views(
    views: Tensor | Sequence[Tensor], name: str, at_least: int = 2, rows: int = 2
) -> Tensor:
    """`views` as one floating tensor (V, N, D), V >= at_least, N >= rows; else ValueError."""
    if not isinstance(views, Tensor):
        tensors = list(views)
        shapes = [tuple(t.shape) for t in tensors]
        if len(set(shapes)) > 1:
            raise ValueError(f"{name}: views have shapes {shapes}; all must be one (N, D)")
        if len({t.device for t in tensors}) > 1:
            devices = [str(t.device) for t in tensors]
            raise ValueError(f"{name}: views are on {devices}; move them to one device")
        if len({t.dtype for t in tensors}) > 1:
            dtypes = [str(t.dtype) for t in tensors]
            raise ValueError(f"{name}: views have dtypes {dtypes}; cast them to one")
        if len(tensors) < at_least:
            raise ValueError(f"{name}: got {len(tensors)} views; it takes at least {at_least}")
        views = torch.stack(tensors)
    if views.ndim != 3 or views.shape[0] < at_least or views.shape[1] < rows or views.shape[2] < 1:
        raise ValueError(
            f"{name}: views have shape {tuple(views.shape)}; "
            f"wanted (V, N, D) with V >= {at_least}, N >= {rows}, D >= 1"
        )
    if not views.is_floating_point():
        raise ValueError(f"{name}: views are {views.dtype}; wanted a floating-point dtype")
    return views
