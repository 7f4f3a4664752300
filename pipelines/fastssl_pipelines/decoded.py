"""What the engines that decode as they go share: the order, the views, the unreadable images.

An engine adds one thing: how the images of a batch become pixels, one batch ahead.

Shapes: N batch, M data set, V views.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from typing import TypeVar

import torch
from torch import Tensor

from fastssl_pipelines import randomness
from fastssl_pipelines.augment import Images, Quality, views_of
from fastssl_pipelines.corrupt import QUOTA, Corrupt, CorruptDataError, OnCorrupt
from fastssl_pipelines.encoded import SMALLEST
from fastssl_pipelines.spec import Batch, View

Start = TypeVar("Start")
Item = TypeVar("Item")
Done = TypeVar("Done")


def ahead(
    items: Iterable[Item],
    start: Callable[[Item], Start],
    finish: Callable[[Start], Done],
    depth: int,
) -> Iterator[Done]:
    """finish(start(item)) of each item in order, with `depth` more items started beforehand."""
    started: deque[Start] = deque()
    for item in items:
        started.append(start(item))
        if len(started) > depth:
            yield finish(started.popleft())
    while started:
        yield finish(started.popleft())


class Buffer:
    """Host memory for the pixels of a batch: grows to the largest, and is used again and again.

    For a GPU it is pinned, and written again only when its copy there is complete.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._copied: torch.cuda.Event | None = None

    def take(self, size: int) -> Tensor:
        """(size,) uint8, to be filled."""
        if self._copied is not None:
            self._copied.synchronize()
        if len(self._memory) < size:
            pin = self.device.type == "cuda"
            self._memory = torch.empty(size + size // 4, dtype=torch.uint8, pin_memory=pin)
        return self._memory[:size]

    def images(self, flat: Tensor, place: Tensor) -> Images:
        """What was filled in, on the device. place: (N, 3) offset, height, width"""
        same = bool((place[:, 1:] == place[:1, 1:]).all())
        images = Images(flat.to(self.device, non_blocking=True), place.to(self.device), same)
        if self.device.type == "cuda":
            self._copied = torch.cuda.current_stream(self.device).record_event()
        return images


def places(sizes: Sequence[tuple[int, int]] | Tensor) -> Tensor:
    """Offset, height and width of images of these sizes laid one behind the other. -> (N, 3)
    int64"""
    size = torch.as_tensor(sizes, dtype=torch.int64).reshape(-1, 2)
    length = 3 * size.prod(1)
    return torch.stack([length.cumsum(0) - length, *size.unbind(1)], dim=1)


class DecodedPipeline(ABC):
    """A `Pipeline` whose batches are decoded while their predecessors are in use.

    An unreadable image is left out of its batch, which is then shorter; it is never replaced. So
    the stream depends on (seed, epoch) and the data alone.
    """

    def __init__(
        self,
        count: int,
        *,
        views: Sequence[View],
        batch_size: int,
        seed: int,
        device: torch.device | str,
        shard: tuple[int, int] = (0, 1),
        quality: Quality = "exact",
        keep_params: bool = False,
        on_corrupt: OnCorrupt = "skip",
        quota: float = QUOTA,
    ) -> None:
        rank, world = shard
        if not 0 <= rank < world:
            raise ValueError(f"shard is {shard}: give (rank, world) with 0 <= rank < world")
        if not 1 <= batch_size <= count // world:
            share = count // world
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
        self.device = torch.device(device)
        self.quality: Quality = quality
        self.keep_params = keep_params
        self.smallest = max([SMALLEST, *(view.patch or 1 for view in views)])  # px, of an image
        self.corrupt = Corrupt(count, on_corrupt, quota)

    def __len__(self) -> int:
        return self.count // (self.batch_size * self.shard[1])

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[Batch]:
        """Batches `skip` to the last of epoch `epoch`."""
        if not 0 <= epoch < 2**32 or not 0 <= skip <= len(self):
            raise ValueError(
                f"epoch is {epoch}, skip is {skip}: give 0 to 2^32 and 0 to {len(self)}"
            )
        return self._rendered(epoch, skip)

    def _rendered(self, epoch: int, skip: int) -> Iterator[Batch]:
        with closing(self._decoded(self.order(epoch)[skip:], epoch)) as decoded:
            for images, index in decoded:
                if len(index) == 0:
                    raise CorruptDataError("a whole batch is unreadable; `fastssl doctor` says why")
                yield self._batch(images, index, epoch)

    def order(self, epoch: int) -> Tensor:
        """The indices of every batch of this rank. -> (len(self), N) int64

        Batch b holds the same images for any number of ranks that share one global batch size.
        """
        rank, world = self.shard
        used = len(self) * self.batch_size * world
        return self._shuffled(epoch)[:used].view(len(self), world, self.batch_size)[:, rank]

    def _shuffled(self, epoch: int) -> Tensor:
        """All images in the order of this epoch. -> (M,) int64"""
        return randomness.permutation(self.count, self.seed, epoch)

    def _batch(self, images: Images, index: Tensor, epoch: int) -> Batch:
        index = index.to(self.device)
        rendered, params = views_of(images, self.views, self.seed, epoch, index, self.quality)
        return Batch(rendered, index, params if self.keep_params else None)

    @abstractmethod
    def _decoded(self, order: Tensor, epoch: int) -> Generator[tuple[Images, Tensor], None, None]:
        """The readable images of each row of `order` (B, N), on the device, with their indices."""
