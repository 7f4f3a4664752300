"""The whole data set as uint8 in memory, on the GPU or on the CPU: permute, draw, render.

Shapes: N batch, M data set, C channels, S pixels per side, V views.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastssl_pipelines import randomness
from fastssl_pipelines.augment import Quality, draw, render
from fastssl_pipelines.augment.images import as_images
from fastssl_pipelines.spec import Batch, View


class ResidentPipeline:
    """A `Pipeline` over images held in memory; see `open_pipeline`."""

    def __init__(
        self,
        source: Any,
        *,
        views: Sequence[View],
        batch_size: int,
        seed: int,
        device: torch.device | str,
        shard: tuple[int, int] = (0, 1),
        quality: Quality = "exact",
        keep_params: bool = False,
    ) -> None:
        images = as_images(source)
        count, (rank, world) = len(images.offset), shard
        if not 0 <= rank < world:
            raise ValueError(f"shard is {shard}: give (rank, world) with 0 <= rank < world")
        if not 1 <= batch_size <= count // world:
            raise ValueError(
                f"batch_size is {batch_size}, but each of {world} ranks has {count // world} images:"
                " choose 1 to that many"
            )
        if not views:
            raise ValueError("views is empty: give at least one View, such as policies.simclr(2)")
        smallest = int(min(images.height.min(), images.width.min()))
        for view in views:
            if view.patch is not None and view.patch > smallest:
                raise ValueError(
                    f"View.patch is {view.patch} px, larger than the smallest image side, {smallest}"
                )
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed is {seed}: it must lie in [0, 2^32)")
        self.images = images.to(device)
        self.views = tuple(views)
        self.batch_size, self.seed, self.shard = batch_size, seed, shard
        self.quality, self.keep_params = quality, keep_params

    def __len__(self) -> int:
        return len(self.images.offset) // (self.batch_size * self.shard[1])

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[Batch]:
        """Batches `skip` to the last of epoch `epoch`."""
        for index in self.order(epoch)[skip:]:
            yield self.batch(index, epoch)

    def order(self, epoch: int) -> Tensor:
        """The indices of every batch of this rank. -> (len(self), N) int64

        Batch b holds the same images for any number of ranks that share one global batch size.
        """
        rank, world = self.shard
        count = len(self) * self.batch_size * world
        total, device = len(self.images.offset), self.images.flat.device
        shuffled = randomness.permutation(total, self.seed, epoch, device)
        return shuffled[:count].view(len(self), world, self.batch_size)[:, rank]

    def batch(self, index: Tensor, epoch: int | Tensor) -> Batch:
        """All views of the images at `index` (N,) int64, as epoch `epoch` shows them."""
        images = self.images.select(index)
        params = tuple(
            draw(view, self.seed, epoch, index, v, images.height, images.width)
            for v, view in enumerate(self.views)
        )
        rendered = [
            render(images, p, view, self.quality)
            for p, view in zip(params, self.views, strict=True)
        ]
        return Batch(rendered, index, params if self.keep_params else None)
