"""The base of all engines: their settings, checked once, and the order of an epoch.

Shapes: N batch, M data set, V views.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
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
    drop_last: bool = True  # whether the images after the last full batch are left out

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


class ShuffledEpochs(ABC):
    """Batches of `count` images, reshuffled in each epoch. ValueError where a rank has too few
    images for one batch."""

    def __init__(self, count: int, settings: EngineSettings) -> None:
        world, share = settings.shard[1], count // settings.shard[1]
        if settings.drop_last and not 1 <= settings.batch_size <= share:
            raise ValueError(
                f"batch_size is {settings.batch_size}: a rank has {share} images; choose 1 to that,"
                " or drop_last=False"
            )
        if settings.batch_size < 1 or share < 1:
            raise ValueError(
                f"batch_size is {settings.batch_size}, {world} ranks share {count} images: each"
                " needs at least one"
            )
        self.count, self.settings = count, settings
        self.next_epoch = 0  # of the next `iter()`

    @property
    def views(self) -> tuple[View, ...]:
        """The views of every epoch that is not given others."""
        return self.settings.views

    def __len__(self) -> int:
        """Batches in one epoch of this rank; the short last one counts where it is not dropped."""
        return self._full_batches() + (not self.settings.drop_last and self._rest_size() > 0)

    def __iter__(self) -> Iterator[Batch]:
        """The batches of epoch `next_epoch`, which is the following one from the first batch on: an
        iterator that is never asked for a batch, as trainers make to probe a loader, leaves it."""
        epoch, self.next_epoch = self.next_epoch, self.next_epoch + 1
        yield from self.epoch(epoch)

    @abstractmethod
    def epoch(
        self, epoch: int, skip: int = 0, views: Sequence[View] | None = None
    ) -> Iterator[Batch]:
        """Batches `skip` to the last of epoch `epoch`."""

    def order(self, epoch: int) -> Tensor:
        """The indices of every full batch of this rank. -> (batches, N) int64

        Batch b holds the same images for any number of ranks that share one global batch size.
        """
        return self._full(self._shuffled(epoch))

    def batches(self, epoch: int) -> list[Tensor]:
        """The indices of every batch of this rank, (N,) int64 each; the last may be shorter.

        The ranks share the images of a last batch as evenly as their number allows; a rank for
        which none is left has one batch less.
        """
        shuffled = self._shuffled(epoch)
        full = list(self._full(shuffled))
        if len(full) == len(self):
            return full
        rank, world = self.settings.shard
        rest = shuffled[len(full) * self.settings.batch_size * world :]
        return [*full, rest.tensor_split(world)[rank]]

    def _full(self, shuffled: Tensor) -> Tensor:
        (rank, world), size = self.settings.shard, self.settings.batch_size
        used = self._full_batches() * size * world
        return shuffled[:used].view(self._full_batches(), world, size)[:, rank]

    def _full_batches(self) -> int:
        return self.count // (self.settings.batch_size * self.settings.shard[1])

    def _rest_size(self) -> int:
        """The images of this rank after its last full batch."""
        rank, world = self.settings.shard
        rest = self.count - self._full_batches() * self.settings.batch_size * world
        return rest // world + (rank < rest % world)  # as tensor_split does

    def _shuffled(self, epoch: int) -> Tensor:
        """All images in the order of this epoch. -> (M,) int64"""
        return rng.permutation(self.count, self.settings.seed, epoch, self._order_device())

    def _order_device(self) -> torch.device:
        """The device on which the engine uses the order."""
        return torch.device("cpu")

    def _rest(self, epoch: int, skip: int) -> list[Tensor]:
        """`batches` from batch `skip` on; ValueError where there is no such epoch or batch."""
        if not 0 <= epoch < 2**32 or not 0 <= skip <= len(self):
            raise ValueError(
                f"epoch is {epoch}, skip is {skip}: give 0 to 2^32 and 0 to {len(self)}"
            )
        return self.batches(epoch)[skip:]

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
