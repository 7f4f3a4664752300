"""Views in plain torch, on any device: documentation and oracle of the fast back ends.

Resampling and blur are products with dense weight matrices, one per sample and axis:
out = Wy @ image @ Wx^T.

Shapes: N batch, G groups of it, C channels, H and W pixels of an image, h and w of a view.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastssl_pipelines.augment import pixel_ops, sample_params
from fastssl_pipelines.augment.checks import (
    applied_steps,
    require_drawable,
    require_fit,
)
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
    require_drawable(index, layout)
    table = torch.empty(len(views), len(index), len(sample_params.COLUMNS), device=index.device)
    height, width = layout[:, 1].double(), layout[:, 2].double()
    for v, view in enumerate(views):
        number = torch.full_like(index, first + v)
        numbers = sample_params.view_numbers(view)
        sample_params.sample_view(table[v], index, number, seed, epoch, height, width, numbers)
    return table


def render(
    images: Images, table: Tensor, view: View, quality: str, *, drawn: bool = False
) -> Tensor:
    """Render one view for each row of `table`. -> (G, N, 3, h, w)

    table: (G, N, columns). `view` has the size, interpolation, normalisation, dtype and memory
    format of all of them. drawn: `table` was drawn for these images and this view, and unchanged
    since; otherwise ValueError says which row does not fit.
    """
    if not drawn:
        require_fit(images.layout, table, view)
    steps = applied_steps(table, view, drawn)
    order = torch.channels_last if view.channels_last else torch.contiguous_format
    groups = (_render_group(images, rows, view, quality, *steps) for rows in table)
    return torch.stack([group.to(view.dtype, memory_format=order) for group in groups])


def _render_group(
    images: Images, rows: Tensor, view: View, quality: str, rotates: bool, equalizes: bool
) -> Tensor:
    """(N, columns) -> (N, 3, h, w) float32"""
    if images.same_size:
        return _render(_gather(images), rows, view, quality, rotates, equalizes)
    single = [images.pixels(i)[None] for i in range(len(rows))]
    pairs = zip(single, rows.split(1), strict=True)
    return torch.cat([_render(*pair, view, quality, rotates, equalizes) for pair in pairs])


def _gather(images: Images) -> Tensor:
    """(N, H, W, 3), of images that all have one size."""
    _, height, width = images.layout[0].tolist()
    span = torch.arange(height * width * 3, device=images.flat.device)
    return images.flat[images.layout[:, :1] + span].view(-1, height, width, 3)


def _render(
    image: Tensor, row: Tensor, view: View, quality: str, rotates: bool, equalizes: bool
) -> Tensor:
    """(N, H, W, 3) uint8, (N, columns) -> (N, 3, h, w) float32"""
    image = _equalize(image, row) if equalizes else image
    x = _resample(image, row, view)
    x = _rotate(x, row) if rotates else x
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


def _equalize(image: Tensor, row: Tensor) -> Tensor:
    """The histogram of each channel of the crop equalized, as PIL.ImageOps does. (N, H, W, 3)
    uint8"""
    inside = _rectangle(row, sample_params.TOP, image.shape[1], image.shape[2])
    values = image.flatten(1, 2).transpose(1, 2).long()  # (N, 3, H * W)
    counted = inside.flatten(1)[:, None].expand_as(values).long()
    histogram = torch.zeros(len(image), 3, 256, dtype=torch.long, device=image.device)
    histogram.scatter_add_(2, values, counted)
    below = histogram.cumsum(2) - histogram  # how many pixels are darker
    level = torch.arange(256, device=image.device)
    brightest = torch.where(histogram > 0, level, 0).amax(2, keepdim=True)
    step = (counted.sum(2, keepdim=True) - histogram.gather(2, brightest)) // 255
    mapped = ((below + step // 2) // step.clamp(min=1)).clamp(max=255)
    applies = (row[:, sample_params.EQUALIZE, None, None] > 0) & (step > 0)
    table = torch.where(applies, mapped, level)
    return table.gather(2, values).transpose(1, 2).reshape(image.shape).to(torch.uint8)


def _resample(image: Tensor, row: Tensor, view: View) -> Tensor:
    """Crop, resize with antialias, flip. -> (N, 3, h, w) in [0, 1]"""
    top, left = row[:, sample_params.TOP], row[:, sample_params.LEFT]
    height, width = row[:, sample_params.HEIGHT], row[:, sample_params.WIDTH]
    wy = _axis_weights(top, height, image.shape[1], view.shape[0], view.interpolation)
    wx = _axis_weights(left, width, image.shape[2], view.shape[1], view.interpolation)
    wy = torch.where(row[:, sample_params.VERTICAL_FLIP, None, None] > 0, wy.flip(1), wy)
    wx = torch.where(row[:, sample_params.FLIP, None, None] > 0, wx.flip(1), wx)
    x = torch.einsum("nyh,nhwc,nxw->ncyx", wy, image.to(wy.dtype) / 255, wx)
    return pixel_ops.clamp(x)  # bicubic overshoots


def _axis_weights(
    start: Tensor, length: Tensor, size: int, count: int, interpolation: str
) -> Tensor:
    """Weights of `size` source pixels in each of `count` output pixels, rows summing to 1. -> (N,
    count, size)"""
    start, scale = start[:, None, None], length[:, None, None] / count
    stretch = scale.clamp(min=1)  # antialias: the kernel widens where the crop shrinks
    source = torch.arange(size, device=start.device)[None, None, :]
    center = (torch.arange(count, device=start.device)[None, :, None] + 0.5) * scale
    distance = (source - start + 0.5 - center) / stretch
    weight = (pixel_ops.cubic if interpolation == "bicubic" else pixel_ops.triangle)(distance)
    inside = (source >= start) & (source < start + length[:, None, None])
    weight = torch.where(inside, weight, 0.0)
    return weight / weight.sum(-1, keepdim=True)


def _rotate(x: Tensor, row: Tensor) -> Tensor:
    """Around the centre, counter-clockwise, bilinear, black outside. (N, 3, h, w)"""
    height, width = x.shape[2:]
    angle = row[:, sample_params.ANGLE, None, None] * pixel_ops.DEGREE
    middle_y, middle_x = (height - 1) / 2, (width - 1) / 2
    to_y = torch.arange(height, device=x.device)[:, None] - middle_y
    to_x = torch.arange(width, device=x.device) - middle_x
    from_y, from_x = pixel_ops.turn(to_y, to_x, angle.cos(), angle.sin())
    from_y, from_x = from_y + middle_y, from_x + middle_x  # (N, h, w)
    top, left = from_y.floor(), from_x.floor()
    rotated = torch.zeros_like(x)
    for corner_y, corner_x in ((top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)):
        weight = pixel_ops.triangle(from_y - corner_y) * pixel_ops.triangle(from_x - corner_x)
        inside = (corner_y >= 0) & (corner_y < height) & (corner_x >= 0) & (corner_x < width)
        at = corner_y.clamp(0, height - 1) * width + corner_x.clamp(0, width - 1)
        at = at.long().flatten(1)[:, None].expand(-1, 3, -1)
        pixels = x.flatten(2).gather(2, at).view_as(x)
        rotated = rotated + pixels * torch.where(inside, weight, 0.0)[:, None]
    return torch.where(angle[..., None] == 0, x, rotated)


def _jitter(x: Tensor, row: Tensor) -> Tensor:
    """The four colour steps in the order of each sample. (N, 3, h, w)"""
    for slot in range(sample_params.STEP0, sample_params.STEP3 + 1):
        r, g, b = x.unbind(1)
        mean = pixel_ops.luma(r, g, b).mean((1, 2), keepdim=True)
        for step in range(4):
            adjusted = torch.stack(pixel_ops.adjust(step, r, g, b, mean, row), dim=1)
            x = torch.where(row[:, slot, None, None, None] == step, adjusted, x)
    return x


def _blur(x: Tensor, row: Tensor) -> Tensor:
    """Gaussian, borders reflected without repeating the edge. (N, 3, h, w)"""
    sigma = row[:, sample_params.SIGMA, None, None]
    wy, wx = (_gaussian(sigma, side) for side in x.shape[2:])
    blurred = torch.einsum("nyh,nchw,nxw->ncyx", wy, x, wx)
    return torch.where(sigma[..., None] > 0, blurred, x)


def _gaussian(sigma: Tensor, side: int) -> Tensor:
    """Weights of `side` pixels in each of them. sigma: (N, 1, 1). -> (N, side, side)"""
    radius = torch.ceil(BLUR_REACH * sigma).clamp(max=side - 1)
    source = torch.arange(side, device=sigma.device)
    to = source[:, None]
    weight = torch.zeros(len(sigma), side, side, device=sigma.device)
    mirrors = (source, -source, 2 * (side - 1) - source)
    counts = (source >= 0, source > 0, source < side - 1)  # an edge is its own mirror image
    for mirror, counted in zip(mirrors, counts, strict=True):
        distance = (mirror - to).float()
        density = torch.exp(-0.5 * (distance / sigma.clamp(min=1e-3)).square())
        weight = weight + torch.where((distance.abs() <= radius) & counted, density, 0.0)
    return weight / weight.sum(-1, keepdim=True)


def _erase(x: Tensor, row: Tensor) -> Tensor:
    """Zeros in the erased rectangle, after normalisation. (N, 3, h, w)"""
    erased = _rectangle(row, sample_params.ERASE_TOP, x.shape[2], x.shape[3])
    return x.masked_fill(erased[:, None], 0.0)


def _rectangle(row: Tensor, first: int, height: int, width: int) -> Tensor:
    """Where the rectangle of columns `first` to `first + 3` is. -> (N, height, width) bool"""
    top, left, tall, wide = (row[:, first + i, None] for i in range(4))
    y, x = (torch.arange(side, device=row.device) for side in (height, width))
    rows, columns = (y >= top) & (y < top + tall), (x >= left) & (x < left + wide)
    return rows[:, :, None] & columns[:, None, :]
