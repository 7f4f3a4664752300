"""The base of all engines: their settings, checked once, and the order of an epoch.

Shapes: N batch, M data set, V views.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastssl_pipelines import rng
from fastssl_pipelines.augment import Images, Quality, views_of
from fastssl_pipelines.spec import Batch, View


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """The arguments of `open_pipeline` that every engine has. ValueError says which is wrong."""

    views: tuple[View, ...]
    batch_size: int  # images per batch of one rank
    seed: int  # below 2^32
    device: torch.device  # of the views
    shard: tuple[int, int] = (0, 1)  # (rank, world)
    quality: Quality = "exact"
    keep_params: bool = False

    def __post_init__(self) -> None:
        rank, world = self.shard
        if not 0 <= rank < world:
            raise ValueError(f"shard is {self.shard}: give (rank, world) with 0 <= rank < world")
        require_views(self.views)
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed}: it must lie in [0, 2^32)")
        if self.quality not in ("exact", "affine"):
            raise ValueError(f"quality is {self.quality!r}: choose 'exact' or 'affine'")


def require_views(views: Sequence[View]) -> None:
    """ValueError where there are none."""
    if not views:
        raise ValueError("views is empty: give at least one View, such as policies.simclr(2)")


class ShuffledEpochs:
    """Batches of `count` images, reshuffled in each epoch. ValueError where a rank has too few
    images for one batch."""

    def __init__(self, count: int, settings: EngineSettings) -> None:
        share = count // settings.shard[1]
        if not 1 <= settings.batch_size <= share:
            raise ValueError(
                f"batch_size is {settings.batch_size}: a rank has {share} images; choose 1 to that"
            )
        self.count, self.settings = count, settings

    @property
    def views(self) -> tuple[View, ...]:
        """The views of every epoch that is not given others."""
        return self.settings.views

    def __len__(self) -> int:
        return self.count // (self.settings.batch_size * self.settings.shard[1])

    def order(self, epoch: int) -> Tensor:
        """The indices of every batch of this rank. -> (len(self), N) int64

        Batch b holds the same images for any number of ranks that share one global batch size.
        """
        (rank, world), size = self.settings.shard, self.settings.batch_size
        used = len(self) * size * world
        return self._shuffled(epoch)[:used].view(len(self), world, size)[:, rank]

    def _shuffled(self, epoch: int) -> Tensor:
        """All images in the order of this epoch. -> (M,) int64"""
        return rng.permutation(self.count, self.settings.seed, epoch, self._order_device())

    def _order_device(self) -> torch.device:
        """The device on which the engine uses the order."""
        return torch.device("cpu")

    def _rest(self, epoch: int, skip: int) -> Tensor:
        """`order` from batch `skip` on; ValueError where there is no such epoch or batch."""
        if not 0 <= epoch < 2**32 or not 0 <= skip <= len(self):
            raise ValueError(
                f"epoch is {epoch}, skip is {skip}: give 0 to 2^32 and 0 to {len(self)}"
            )
        return self.order(epoch)[skip:]

    def _views_or(self, views: Sequence[View] | None) -> tuple[View, ...]:
        """`views`, checked; where they are None, those of the settings."""
        if views is None:
            return self.views
        require_views(views)
        return tuple(views)

    def _rendered(
        self, images: Images, index: Tensor, epoch: int | Tensor, views: Sequence[View]
    ) -> Batch:
        """The batch of `images` (N), whose positions in the data set are `index` (N,)."""
        seed, quality = self.settings.seed, self.settings.quality
        rendered, params = views_of(images, views, seed, epoch, index, quality)
        return Batch(rendered, index, params if self.settings.keep_params else None)
