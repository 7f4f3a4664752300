"""The data set as uint8 in memory, on a GPU or a CPU; batches are rendered ahead.

Shapes: N batch, M data set, V views.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastssl_pipelines.augment import as_images
from fastssl_pipelines.engines.base import EngineSettings, ShuffledEpochs
from fastssl_pipelines.memory import require_memory
from fastssl_pipelines.prefetch import prefetch
from fastssl_pipelines.sources.decoded_files import decoded_files
from fastssl_pipelines.sources.decoding import Bytes, Decoding
from fastssl_pipelines.sources.image_files import Encoded, is_encoded, open_encoded
from fastssl_pipelines.sources.unreadable import (
    QUOTA,
    OnCorrupt,
    OnDamage,
    UnreadableError,
    UnreadableImages,
)
from fastssl_pipelines.spec import Batch, View

PREFETCHED = 2  # batches rendered ahead

Render = Callable[[Tensor], Batch]


class ResidentPipeline(ShuffledEpochs):
    """A `Pipeline` over images held in memory; see `open_pipeline`.

    source: what `as_images` takes, a .npy of such an array, or what `open_encoded` takes: a folder
    of images, .tar shards, files, or bytes. Files are decoded once, when the pipeline is opened;
    `unreadable.reasons` names those that cannot be, and `names` the others, in the order of
    `Batch.index`. Needs Pillow for files.

    load_size: px; files become squares of this side (the shorter side resized to it, the centre
    cropped); by default they keep their own sizes. threads: of the decoder, by default one per
    core. oriented, depth, bands, max_pixels: see `Decoding`. on_corrupt, quota, on_damage: see
    `UnreadableImages`. All of these are of files alone.
    """

    def __init__(
        self,
        source: Any,
        settings: EngineSettings,
        *,
        load_size: int | None = None,
        threads: int | None = None,
        on_corrupt: OnCorrupt = "skip",
        quota: float = QUOTA,
        on_damage: OnDamage = "keep",
        **decoding: Any,
    ) -> None:
        if load_size is not None and load_size < 2:
            raise ValueError(f"load_size is {load_size}: give at least 2 px, or None")
        self.names: Sequence[str] | None = None  # of the images, where they have been files
        self.unreadable: UnreadableImages | None = None
        if _is_npy(source):
            source = _read_npy(Path(source))
        elif is_encoded(source):
            encoded = open_encoded(source)
            total, how = len(encoded) + len(encoded.lost), Decoding(**decoding)
            self.unreadable = UnreadableImages(total, on_corrupt, quota, on_damage, encoded.lost)
            source, self.names = _decoded(encoded, load_size, threads, how, self.unreadable)
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

    def _on_threads(self, order: list[Tensor], render: Render) -> Iterator[Batch]:
        """One thread per batch ahead: while one prepares its batch in Python, another renders.

        The threads end with the iterator, whether it is exhausted or dropped.
        """

        def start(index: Tensor) -> Future[Batch]:
            return threads.submit(render, index)

        count = min(PREFETCHED, torch.get_num_threads())
        with ThreadPoolExecutor(count, thread_name_prefix="fastssl-ahead") as threads:
            yield from prefetch(order, start, lambda batch: batch.result(), PREFETCHED)

    def _on_stream(self, order: list[Tensor], render: Render) -> Iterator[Batch]:
        """A side stream renders the next batch while the current stream uses this one."""
        side = self._side = self._side or torch.cuda.Stream(self.images.flat.device)
        side.wait_stream(torch.cuda.current_stream(side.device))  # `order` comes from there
        for index in order:
            index.record_stream(side)

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


def _is_npy(source: Any) -> bool:
    return isinstance(source, str | os.PathLike) and Path(source).suffix == ".npy"


def _read_npy(path: Path) -> Any:
    """The array of a .npy, which `fastssl convert` writes. ValueError where it cannot be read."""
    try:
        return np.load(path.expanduser(), allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as an array: {error}") from None


def _decoded(
    encoded: Encoded,
    load_size: int | None,
    threads: int | None,
    how: Decoding,
    unreadable: UnreadableImages,
) -> tuple[list[Bytes], list[str]]:
    """The readable images of `encoded`, and their names."""
    images: list[Bytes] = []
    names: list[str] = []
    decoded = decoded_files(encoded, range(len(encoded)), how, load_size, threads)
    with closing(decoded):
        for name, image in zip(encoded.names, decoded, strict=True):
            if isinstance(image, UnreadableError):
                unreadable.add(name, str(image))
            elif unreadable.keeps(name, image.damage):
                if not images:
                    _require_room(len(encoded), image.pixels.nbytes)
                images.append(image.pixels)
                names.append(name)
    if not images:
        raise ValueError(f"none of {len(encoded)} images can be read; `fastssl doctor` says why")
    return images, names


def _require_room(count: int, each: int) -> None:
    """As far as the first image tells, and twice: decoded images are copied into one array."""
    remedy = "lower load_size, or use an engine that reads from disk (dali, ffcv)"
    require_memory(2 * count * each, f"decoding {count} images into memory", remedy)
