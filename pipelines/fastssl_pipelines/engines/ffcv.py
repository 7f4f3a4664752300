"""Images of a .beton file, decoded by FFCV's decoder: for data sets that were converted once.

FFCV's loader decodes an image once per view, cannot resume, and samples its augmentations without a
seed. Here its reader and decoder run on threads of this engine, in the order of this engine: each
image is decoded once for all its views.

Shapes: N batch, M data set, H and W pixels.
"""

import os
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fastssl_pipelines import rng
from fastssl_pipelines.augment import Images
from fastssl_pipelines.augment.image_batch import layout_of
from fastssl_pipelines.engines.base import EngineSettings
from fastssl_pipelines.engines.streaming import (
    Buffer,
    StreamingPipeline,
    smallest_side,
)
from fastssl_pipelines.prefetch import in_chunks, prefetch, results
from fastssl_pipelines.sources.beton import Beton
from fastssl_pipelines.sources.unreadable import UnreadableError
from fastssl_pipelines.spec import View

Order = Literal["random", "quasi_random"]
WINDOW = 16  # pages that "quasi_random" shuffles together


@dataclass
class InFlightBatch:
    """A batch that threads are decoding: image `index[n]` into `flat` at `layout[n]`."""

    index: Tensor  # (N,)
    buffer: Buffer
    flat: Tensor
    layout: Tensor  # (N, 3)
    chunks: list[Future[list[str | UnreadableError]]]  # the damage of each image


class FfcvPipeline(StreamingPipeline):
    """A `Pipeline` over a .beton file; see `open_pipeline`. Needs `pip install
    fastssl-torch[ffcv]`.

    source: a `Beton`, or the path of a file with an RGBImageField; other fields are not read,
    except that an IntField named "index" numbers the images where it is a permutation of range(M).
    Otherwise images are numbered by position.

    order: "quasi_random" shuffles pages, and images within windows of WINDOW pages, for files that
    do not fit in memory: reading stays nearly sequential, and class-sorted files mix less.
    os_cache: True reads through the page cache, False drops what was read from it. scaled,
    on_corrupt, quota: see `StreamingPipeline`; images stored as pixels are not scaled.
    """

    def __init__(
        self,
        source: Any,
        settings: EngineSettings,
        *,
        threads: int | None = None,
        order: Order = "random",
        os_cache: bool = True,
        **options: Any,
    ) -> None:
        if order not in ("random", "quasi_random"):
            raise ValueError(f"order is {order!r}: choose 'random' or 'quasi_random'")
        self.beton = source if isinstance(source, Beton) else Beton(source, os_cache)
        super().__init__(len(self.beton), settings, **options)
        self.threads, self.order_kind = threads or os.cpu_count() or 1, order
        self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="fastssl-ffcv")

    def _shuffled(self, epoch: int) -> Tensor:
        shuffled = super()._shuffled(epoch)
        if self.order_kind == "random":
            return shuffled
        pages = self.beton.page[self.beton.row]
        rank = rng.permutation(int(pages.max()) + 1, self.settings.seed, epoch).argsort()
        window = rank[pages] // WINDOW  # (M,): of the page of each image
        return shuffled[window[shuffled].argsort(stable=True)]

    def _decoded(
        self, order: list[Tensor], epoch: int, views: Sequence[View]
    ) -> Generator[tuple[Images, Tensor], None, None]:
        buffers = [Buffer(self.device), Buffer(self.device)]

        def start(index: Tensor) -> InFlightBatch:
            buffers.reverse()
            return self._start(index, epoch, views, buffers[0])

        yield from prefetch(order, start, self._finish, 1)

    def _start(
        self, index: Tensor, epoch: int, views: Sequence[View], buffer: Buffer
    ) -> InFlightBatch:
        """Start decoding the images at `index` (N,) into `buffer`."""
        rows, smallest = self.beton.row[index], smallest_side(views)
        size = self.beton.size[rows]  # (N, 2)
        shrink = self._shrinks(index, epoch, size, views)
        shrink[self.beton.raw[rows]] = 1
        layout = layout_of(-(-size // shrink[:, None]))
        flat = buffer.reserve(layout)
        jobs = list(zip(rows.tolist(), shrink.tolist(), layout[:, 0].tolist(), strict=True))
        pixels = flat.numpy()

        def decode(job: tuple[int, int, int]) -> str | UnreadableError:
            row, factor, offset = job
            try:
                return self.beton.decode(row, factor, pixels[offset:], smallest)
            except UnreadableError as error:
                return error

        chunks = in_chunks(self._pool, self.threads, decode, jobs)
        return InFlightBatch(index, buffer, flat, layout, chunks)

    def _finish(self, batch: InFlightBatch) -> tuple[Images, Tensor]:
        """The readable images of a batch on the device, and their indices."""
        outcomes = zip(batch.index.tolist(), results(batch.chunks), strict=True)
        readable = torch.tensor([self._is_used(i, outcome) for i, outcome in outcomes])
        images = batch.buffer.images(batch.flat, batch.layout[readable])
        return images, batch.index[readable]

    def _is_used(self, i: int, outcome: str | UnreadableError) -> bool:
        """Whether image i is used; the damaged and the unreadable ones are recorded."""
        if isinstance(outcome, str):
            return self.unreadable.keeps(self.beton.names[i], outcome)
        self.unreadable.add(self.beton.names[i], str(outcome))
        return False
