"""The base of the engines that decode during training: order, views and unreadable images.

An engine adds how the images of a batch are decoded, one batch ahead.

Shapes: N batch, M data set, V views.
"""

from abc import abstractmethod
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing

import torch
from torch import Tensor

from fastssl_pipelines.augment import Images, draw
from fastssl_pipelines.augment.image_batch import is_one_size, require_layout
from fastssl_pipelines.engines.base import EngineSettings, ShuffledEpochs
from fastssl_pipelines.sources.decoding import SMALLEST
from fastssl_pipelines.sources.unreadable import (
    QUOTA,
    OnCorrupt,
    OnDamage,
    UnreadableDataError,
    UnreadableImages,
)
from fastssl_pipelines.spec import Batch, View

SHRINKS = (2, 4, 8)  # the divisors of libjpeg's DCT scaling


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """x on `device`; a host tensor is copied to a GPU without blocking the host."""
    if device.type == "cpu" or x.is_cuda:
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


class Buffer:
    """Host memory for the pixels of a batch, reused for every batch; it grows to the largest.

    For a GPU it is pinned, and reused only when the copy to the GPU is complete.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._copied: torch.cuda.Event | None = None

    def reserve(self, layout: Tensor) -> Tensor:
        """Memory for the images of `layout` (N, 3), uninitialised: (bytes,) uint8."""
        size = int(3 * layout[:, 1:].prod(1).sum())
        if self._copied is not None:
            self._copied.synchronize()
        if len(self._memory) < size:
            pin = self.device.type == "cuda"
            self._memory = torch.empty(size + size // 4, dtype=torch.uint8, pin_memory=pin)
        return self._memory[:size]

    def images(self, flat: Tensor, layout: Tensor) -> Images:
        """The images that `flat` holds at `layout` (N, 3), on the device."""
        require_layout(layout, len(flat), same_size=False)
        on_device = to_device(flat, self.device), to_device(layout, self.device)
        images = Images(*on_device, same_size=is_one_size(layout), checked=True)
        if self.device.type == "cuda":
            self._copied = torch.cuda.current_stream(self.device).record_event()
        return images


class StreamingPipeline(ShuffledEpochs):
    """A `Pipeline` that decodes the next batch while the current one is in use.

    An unreadable image is left out of its batch, which is then shorter; it is never replaced. So
    the stream depends on (seed, epoch) and the data alone.

    scaled: decode a JPEG at 1/2, 1/4 or 1/8 (libjpeg's DCT scaling) where every crop of it still
    has a pixel for each pixel of its view; crops are then sampled on the smaller image. on_corrupt,
    quota, on_damage, lost: see `UnreadableImages`.
    """

    def __init__(
        self,
        count: int,
        settings: EngineSettings,
        *,
        scaled: bool = True,
        on_corrupt: OnCorrupt = "skip",
        quota: float = QUOTA,
        on_damage: OnDamage = "keep",
        lost: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(count, settings)
        self.device, self.scaled = settings.device, scaled
        total = count + len(lost or {})
        self.unreadable = UnreadableImages(total, on_corrupt, quota, on_damage, lost)

    def epoch(
        self, epoch: int, skip: int = 0, views: Sequence[View] | None = None
    ) -> Iterator[Batch]:
        """Batches `skip` to the last of epoch `epoch`."""
        return self._batches(self._rest(epoch, skip), epoch, self._views_or(views))

    def _batches(self, order: list[Tensor], epoch: int, views: Sequence[View]) -> Iterator[Batch]:
        with closing(self._decoded(order, epoch, views)) as decoded:
            for images, index in decoded:
                if len(index) == 0:
                    raise UnreadableDataError(
                        "a whole batch is unreadable; `fastssl doctor` says why"
                    )
                yield self._batch(images, index, epoch, views)

    def _batch(self, images: Images, index: Tensor, epoch: int, views: Sequence[View]) -> Batch:
        return self._rendered(images, to_device(index, self.device), epoch, views)

    def _shrinks(self, index: Tensor, epoch: int, size: Tensor, views: Sequence[View]) -> Tensor:
        """The largest divisor 1, 2, 4 or 8 at which each image may be decoded for these views.

        index (N,), size (N, 2): height and width. -> (N,)
        """
        if not self.scaled or any(view.patch for view in views):
            return torch.ones_like(index)
        shrinks = torch.tensor(SHRINKS)[:, None]
        small = -(-size // shrinks[..., None])  # (3, N, 2)
        needed = torch.tensor([view.shape for view in views]).amax(0).clamp(min=SMALLEST)
        covers = (small >= needed).all(2)  # (3, N)
        sizes = small[covers].unbind(1)
        large_enough = torch.ones(len(sizes[0]), dtype=torch.bool)
        for v, view in enumerate(views if len(large_enough) else ()):
            crop = draw(view, self.settings.seed, epoch, index.expand(3, -1)[covers], v, *sizes)
            height, width = view.shape
            large_enough &= (crop["height"] >= height) & (crop["width"] >= width)
        covers[covers.clone()] = large_enough
        return torch.where(covers, shrinks, 1).amax(0)

    @abstractmethod
    def _decoded(
        self, order: list[Tensor], epoch: int, views: Sequence[View]
    ) -> Generator[tuple[Images, Tensor], None, None]:
        """For each batch `order[b]` (N,): its readable images on the device, and their indices."""


def smallest_side(views: Sequence[View]) -> int:
    """The smallest side, in px, of an image that these views can be rendered from."""
    return max([SMALLEST, *(view.patch or 1 for view in views)])
