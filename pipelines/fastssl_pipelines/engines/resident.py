"""The data set as uint8 in memory, on a GPU or a CPU; batches are rendered ahead.

Shapes: N batch, M data set, C channels, S pixels per side, V views.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from fastssl_pipelines.augment import as_images
from fastssl_pipelines.engines.base import EngineSettings, ShuffledEpochs
from fastssl_pipelines.prefetch import prefetch
from fastssl_pipelines.spec import Batch, View

PREFETCHED = 2  # batches rendered ahead

Render = Callable[[Tensor], Batch]


class ResidentPipeline(ShuffledEpochs):
    """A `Pipeline` over images held in memory; see `open_pipeline`."""

    def __init__(self, source: Any, settings: EngineSettings) -> None:
        images = as_images(source)
        super().__init__(images.count, settings)
        self._smallest_side = int(images.layout[:, 1:].min())
        self._require_patches(settings.views)
        self.images = images.to(settings.device)
        self._side: torch.cuda.Stream | None = None  # one for all epochs: the allocator
        # reuses freed memory on the same stream only

    def epoch(
        self, epoch: int, skip: int = 0, views: Sequence[View] | None = None
    ) -> Iterator[Batch]:
        """Batches `skip` to the last of epoch `epoch`, rendered while earlier ones are in use."""
        chosen = self._views_or(views)
        self._require_patches(chosen)
        prefetched = self._on_stream if self.images.flat.is_cuda else self._on_threads
        return prefetched(self._rest(epoch, skip), lambda index: self.batch(index, epoch, chosen))

    def batch(
        self, index: Tensor, epoch: int | Tensor, views: Sequence[View] | None = None
    ) -> Batch:
        """The views of the images at `index` (N,) int64 in epoch `epoch`.

        On a GPU no value is read back, so a CUDA graph may capture it, with `index` and `epoch` (a
        tensor of one int64) refilled before each replay.
        """
        return self._rendered(self.images.select(index), index, epoch, self._views_or(views))

    def _order_device(self) -> torch.device:
        return self.images.flat.device

    def _require_patches(self, views: Sequence[View]) -> None:
        side = self._smallest_side
        for view in views:
            if view.patch is not None and view.patch > side:
                raise ValueError(
                    f"View.patch is {view.patch} px: the smallest image has side {side}"
                )

    def _on_threads(self, order: Tensor, render: Render) -> Iterator[Batch]:
        """One thread per batch ahead: while one prepares its batch in Python, another renders.

        The threads end with the iterator, whether it is exhausted or dropped.
        """

        def start(index: Tensor) -> Future[Batch]:
            return threads.submit(render, index)

        count = min(PREFETCHED, torch.get_num_threads())
        with ThreadPoolExecutor(count, thread_name_prefix="fastssl-ahead") as threads:
            yield from prefetch(order, start, lambda batch: batch.result(), PREFETCHED)

    def _on_stream(self, order: Tensor, render: Render) -> Iterator[Batch]:
        """A side stream renders the next batch while the current stream uses this one."""
        side = self._side = self._side or torch.cuda.Stream(self.images.flat.device)
        side.wait_stream(torch.cuda.current_stream(side.device))  # `order` comes from there
        order.record_stream(side)

        def start(index: Tensor) -> tuple[Batch, torch.cuda.Event]:
            with torch.cuda.stream(side):
                return render(index), side.record_event()

        yield from prefetch(order, start, lambda started: _synchronized(*started), PREFETCHED - 1)


def _synchronized(batch: Batch, rendered: torch.cuda.Event) -> Batch:
    """`batch`, safe to use on the current stream."""
    stream = torch.cuda.current_stream(batch.index.device)
    stream.wait_event(rendered)
    for tensor in (*batch.views, batch.index, *(p.table for p in batch.params or ())):
        tensor.record_stream(stream)  # its memory must not be reused before this stream is done
    return batch
