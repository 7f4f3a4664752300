"""What every engine shares: its arguments, checked, and the order of an epoch.

Shapes: N batch, M data set, V views.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastssl_pipelines import rng
from fastssl_pipelines.augment import Quality
from fastssl_pipelines.spec import View


class ShuffledEpochs:
    """Batches of `count` images, shuffled anew in each epoch. ValueError says which argument is
    wrong."""

    def __init__(
        self,
        count: int,
        *,
        views: Sequence[View],
        batch_size: int,
        seed: int,
        shard: tuple[int, int],
        quality: Quality,
        keep_params: bool,
    ) -> None:
        rank, world = shard
        if not 0 <= rank < world:
            raise ValueError(f"shard is {shard}: give (rank, world) with 0 <= rank < world")
        share = count // world
        if not 1 <= batch_size <= share:
            raise ValueError(
                f"batch_size is {batch_size}: a rank has {share} images; choose 1 to that"
            )
        if not views:
            raise ValueError("views is empty: give at least one View, such as policies.simclr(2)")
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed is {seed}: it must lie in [0, 2^32)")
        if quality not in ("exact", "affine"):
            raise ValueError(f"quality is {quality!r}: choose 'exact' or 'affine'")
        self.count, self.views = count, tuple(views)
        self.batch_size, self.seed, self.shard = batch_size, seed, shard
        self.quality: Quality = quality
        self.keep_params = keep_params

    def __len__(self) -> int:
        return self.count // (self.batch_size * self.shard[1])

    def order(self, epoch: int) -> Tensor:
        """The indices of every batch of this rank. -> (len(self), N) int64

        Batch b holds the same images for any number of ranks that share one global batch size.
        """
        rank, world = self.shard
        used = len(self) * self.batch_size * world
        return self._shuffled(epoch)[:used].view(len(self), world, self.batch_size)[:, rank]

    def _shuffled(self, epoch: int) -> Tensor:
        """All images in the order of this epoch. -> (M,) int64"""
        return rng.permutation(self.count, self.seed, epoch, self._order_device())

    def _order_device(self) -> torch.device:
        """Where the order is made: where the engine uses it."""
        return torch.device("cpu")

    def _rest(self, epoch: int, skip: int) -> Tensor:
        """`order` from batch `skip` on; ValueError where there is no such epoch or batch."""
        if not 0 <= epoch < 2**32 or not 0 <= skip <= len(self):
            raise ValueError(
                f"epoch is {epoch}, skip is {skip}: give 0 to 2^32 and 0 to {len(self)}"
            )
        return self.order(epoch)[skip:]
