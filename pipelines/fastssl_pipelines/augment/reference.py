"""Views in plain torch, on any device: documentation and oracle of the fast back ends.

Resampling and blur are products with dense weight matrices, one per sample and axis:
out = Wy @ image @ Wx^T.

Shapes: N batch, C channels, H and W pixels of an image, S pixels per side of a view.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastssl_pipelines.augment import pixel_ops, sample_params
from fastssl_pipelines.augment.color_matrix import color_maps
from fastssl_pipelines.augment.image_batch import Images
from fastssl_pipelines.spec import View

BLUR_REACH = 3.5  # sigma at which the blur is truncated, where 0.05 % of the Gaussian is left


def draw(
    views: Sequence[View], seed: int, epoch: int | Tensor, index: Tensor, layout: Tensor, first: int
) -> Tensor:
    """Sample the parameters of `views`, numbered from `first` on. -> (V, N, columns)

    index: (N,) int64, positions in the data set. layout: (N, 3), `Images.layout`.
    """
    table = torch.empty(len(views), len(index), len(sample_params.COLUMNS), device=index.device)
    height, width = layout[:, 1].double(), layout[:, 2].double()
    for v, view in enumerate(views):
        number = torch.full_like(index, first + v)
        numbers = sample_params.view_numbers(view)
        sample_params.sample_view(table[v], index, number, seed, epoch, height, width, numbers)
    return table


def render(images: Images, table: Tensor, view: View, quality: str) -> Tensor:
    """Render one view for each row of `table`. -> (G, N, 3, S, S)

    table: (G, N, columns). `view` has the size, interpolation, normalisation, dtype and memory
    format of all of them.
    """
    order = torch.channels_last if view.channels_last else torch.contiguous_format
    groups = (_render_group(images, rows, view, quality) for rows in table)
    return torch.stack([group.to(view.dtype, memory_format=order) for group in groups])


def _render_group(images: Images, rows: Tensor, view: View, quality: str) -> Tensor:
    """(N, columns) -> (N, 3, S, S) float32"""
    if images.same_size:
        return _render(_gather(images), rows, view, quality)
    single = [images.pixels(i)[None] for i in range(len(rows))]
    pairs = zip(single, rows.split(1), strict=True)
    return torch.cat([_render(image, row, view, quality) for image, row in pairs])


def _gather(images: Images) -> Tensor:
    """(N, H, W, 3), of images that all have one size."""
    _, height, width = images.layout[0].tolist()
    span = torch.arange(height * width * 3, device=images.flat.device)
    return images.flat[images.layout[:, :1] + span].view(-1, height, width, 3)


def _render(image: Tensor, row: Tensor, view: View, quality: str) -> Tensor:
    """(N, H, W, 3) uint8, (N, columns) -> (N, 3, S, S) float32"""
    x = _resample(image, row, view)
    if quality == "affine":
        r, g, b = x.unbind(1)
        r, g, b = pixel_ops.recolor(r, g, b, color_maps(row))
    else:
        r, g, b = _jitter(x, row).unbind(1)
    x = torch.stack(pixel_ops.tone(r, g, b, row), dim=1)
    x = _blur(x, row)
    x = torch.stack([pixel_ops.finish(channel, row) for channel in x.unbind(1)], dim=1)
    mean, std = (torch.tensor(v, device=x.device).view(3, 1, 1) for v in (view.mean, view.std))
    return _erase((x - mean) / std, row)


def _resample(image: Tensor, row: Tensor, view: View) -> Tensor:
    """Crop, resize with antialias, flip. -> (N, 3, S, S) in [0, 1]"""
    top, left = row[:, sample_params.TOP], row[:, sample_params.LEFT]
    height, width = row[:, sample_params.HEIGHT], row[:, sample_params.WIDTH]
    wy = _axis_weights(top, height, image.shape[1], view)
    wx = _axis_weights(left, width, image.shape[2], view)
    flip = row[:, sample_params.FLIP, None, None] > 0
    wx = torch.where(flip, wx.flip(1), wx)
    x = torch.einsum("nyh,nhwc,nxw->ncyx", wy, image.to(wy.dtype) / 255, wx)
    return pixel_ops.clamp(x)  # bicubic overshoots


def _axis_weights(start: Tensor, length: Tensor, size: int, view: View) -> Tensor:
    """Weights of `size` source pixels in each of S output pixels, rows summing to 1. -> (N, S,
    size)"""
    start, scale = start[:, None, None], length[:, None, None] / view.size
    stretch = scale.clamp(min=1)  # antialias: the kernel widens where the crop shrinks
    source = torch.arange(size, device=start.device)[None, None, :]
    center = (torch.arange(view.size, device=start.device)[None, :, None] + 0.5) * scale
    distance = (source - start + 0.5 - center) / stretch
    weight = (pixel_ops.cubic if view.interpolation == "bicubic" else pixel_ops.triangle)(distance)
    inside = (source >= start) & (source < start + length[:, None, None])
    weight = torch.where(inside, weight, 0.0)
    return weight / weight.sum(-1, keepdim=True)


def _jitter(x: Tensor, row: Tensor) -> Tensor:
    """The four colour steps in the order of each sample. (N, 3, S, S)"""
    for slot in range(sample_params.STEP0, sample_params.STEP3 + 1):
        r, g, b = x.unbind(1)
        mean = pixel_ops.luma(r, g, b).mean((1, 2), keepdim=True)
        for step in range(4):
            adjusted = torch.stack(pixel_ops.adjust(step, r, g, b, mean, row), dim=1)
            x = torch.where(row[:, slot, None, None, None] == step, adjusted, x)
    return x


def _blur(x: Tensor, row: Tensor) -> Tensor:
    """Gaussian, borders reflected without repeating the edge. (N, 3, S, S)"""
    side = x.shape[-1]
    sigma = row[:, sample_params.SIGMA, None, None]
    radius = torch.ceil(BLUR_REACH * sigma).clamp(max=side - 1)
    to, source = torch.arange(side, device=x.device)[:, None], torch.arange(side, device=x.device)
    weight = torch.zeros(len(x), side, side, device=x.device)
    mirrors = (source, -source, 2 * (side - 1) - source)
    counts = (source >= 0, source > 0, source < side - 1)  # an edge is its own mirror image
    for mirror, counted in zip(mirrors, counts, strict=True):
        distance = (mirror - to).float()
        density = torch.exp(-0.5 * (distance / sigma.clamp(min=1e-3)).square())
        weight = weight + torch.where((distance.abs() <= radius) & counted, density, 0.0)
    weight = weight / weight.sum(-1, keepdim=True)
    blurred = torch.einsum("nyh,nchw,nxw->ncyx", weight, x, weight)
    return torch.where(sigma[..., None] > 0, blurred, x)


def _erase(x: Tensor, row: Tensor) -> Tensor:
    """Zeros in the erased rectangle, after normalisation. (N, 3, S, S)"""
    top, left, height, width = (row[:, sample_params.ERASE_TOP + i, None] for i in range(4))
    line = torch.arange(x.shape[-1], device=x.device)
    rows = (line >= top) & (line < top + height)
    columns = (line >= left) & (line < left + width)
    return x.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0.0)
