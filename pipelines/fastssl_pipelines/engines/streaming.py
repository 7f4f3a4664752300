"""What the engines that decode as they go share: the order, the views, the unreadable images.

An engine adds one thing: how the images of a batch become pixels, one batch ahead.

Shapes: N batch, M data set, V views.
"""

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing

import torch
from torch import Tensor

from fastssl_pipelines.augment import Images, draw
from fastssl_pipelines.augment.image_batch import is_one_size
from fastssl_pipelines.engines.base import EngineSettings, ShuffledEpochs
from fastssl_pipelines.sources.image_files import SMALLEST
from fastssl_pipelines.sources.unreadable import (
    QUOTA,
    OnCorrupt,
    UnreadableDataError,
    UnreadableImages,
)
from fastssl_pipelines.spec import Batch, View

SHRINKS = (2, 4, 8)  # what libjpeg's DCT scaling divides sides by


def uploaded(x: Tensor, device: torch.device) -> Tensor:
    """x on `device`; a small tensor of the host goes to a GPU without the host waiting for it."""
    if device.type == "cpu" or x.is_cuda:
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


class Buffer:
    """Host memory for the pixels of a batch: grows to the largest, and is used again and again.

    For a GPU it is pinned, and written again only when its copy there is complete.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._copied: torch.cuda.Event | None = None

    def reserve(self, layout: Tensor) -> Tensor:
        """Room for the pixels of images laid out so (N, 3), to be filled: (bytes,) uint8."""
        size = int(3 * layout[:, 1:].prod(1).sum())
        if self._copied is not None:
            self._copied.synchronize()
        if len(self._memory) < size:
            pin = self.device.type == "cuda"
            self._memory = torch.empty(size + size // 4, dtype=torch.uint8, pin_memory=pin)
        return self._memory[:size]

    def images(self, flat: Tensor, layout: Tensor) -> Images:
        """The images that lie in `flat` so, on the device. layout: (N, 3) offset, height, width"""
        on_device = uploaded(flat, self.device), uploaded(layout, self.device)
        images = Images(*on_device, same_size=is_one_size(layout))
        if self.device.type == "cuda":
            self._copied = torch.cuda.current_stream(self.device).record_event()
        return images


class StreamingPipeline(ShuffledEpochs, ABC):
    """A `Pipeline` whose batches are decoded while their predecessors are in use.

    An unreadable image is left out of its batch, which is then shorter; it is never replaced. So
    the stream depends on (seed, epoch) and the data alone.

    scaled: decode a JPEG at 1/2, 1/4 or 1/8 (libjpeg's DCT scaling) where every crop of it still
    has a pixel for each of its view's; crops are then drawn on the smaller image.
    """

    def __init__(
        self,
        count: int,
        settings: EngineSettings,
        *,
        scaled: bool = True,
        on_corrupt: OnCorrupt = "skip",
        quota: float = QUOTA,
    ) -> None:
        super().__init__(count, settings)
        self.device, self.scaled = settings.device, scaled
        self.unreadable = UnreadableImages(count, on_corrupt, quota)

    def epoch(
        self, epoch: int, skip: int = 0, views: Sequence[View] | None = None
    ) -> Iterator[Batch]:
        """Batches `skip` to the last of epoch `epoch`."""
        return self._batches(self._rest(epoch, skip), epoch, self._views_or(views))

    def _batches(self, order: Tensor, epoch: int, views: Sequence[View]) -> Iterator[Batch]:
        with closing(self._decoded(order, epoch, views)) as decoded:
            for images, index in decoded:
                if len(index) == 0:
                    raise UnreadableDataError(
                        "a whole batch is unreadable; `fastssl doctor` says why"
                    )
                yield self._batch(images, index, epoch, views)

    def _batch(self, images: Images, index: Tensor, epoch: int, views: Sequence[View]) -> Batch:
        return self._rendered(images, uploaded(index, self.device), epoch, views)

    def _shrinks(self, index: Tensor, epoch: int, size: Tensor, views: Sequence[View]) -> Tensor:
        """1, 2, 4 or 8: how much smaller each image may be decoded. index (N,), size (N, 2) ->
        (N,)"""
        if not self.scaled or any(view.patch for view in views):
            return torch.ones_like(index)
        shrinks = torch.tensor(SHRINKS)[:, None]
        small = -(-size // shrinks[..., None])  # (3, N, 2)
        covers = small.amin(2) >= max(SMALLEST, *(view.size for view in views))  # (3, N)
        sizes = small[covers].unbind(1)
        kept = torch.ones(len(sizes[0]), dtype=torch.bool)
        for v, view in enumerate(views if len(kept) else ()):
            drawn = draw(view, self.settings.seed, epoch, index.expand(3, -1)[covers], v, *sizes)
            kept &= torch.minimum(drawn["height"], drawn["width"]) >= view.size
        covers[covers.clone()] = kept
        return torch.where(covers, shrinks, 1).amax(0)

    @abstractmethod
    def _decoded(
        self, order: Tensor, epoch: int, views: Sequence[View]
    ) -> Generator[tuple[Images, Tensor], None, None]:
        """The readable images of each row of `order` (B, N), on the device, with their indices."""


def smallest_side(views: Sequence[View]) -> int:
    """The side in px that an image needs for these views."""
    return max([SMALLEST, *(view.patch or 1 for view in views)])
