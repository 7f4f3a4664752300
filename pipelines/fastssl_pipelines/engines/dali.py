"""JPEGs decoded by NVIDIA DALI: on the GPU (nvJPEG, its hardware engine where there is one) or the
CPU.

fastssl determines the order of an epoch: images are indexed once (`image_files.py`), read ahead by
threads, and passed to DALI as bytes. DALI decodes each once; all views are rendered from those
pixels, by fastssl or by DALI's operators (`dali_operators.py`).

Only plain JPEGs are decoded by DALI. Pillow decodes the others (CMYK, PNG, 16 bits, truncated
files) or reports why it cannot, and, on a CPU, the JPEGs that may be decoded smaller: libjpeg
scales while it decodes, DALI's decoders do not.

Shapes: N batch, H and W pixels.
"""

import logging
import math
import os
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastssl_pipelines.augment import Images, Params
from fastssl_pipelines.augment.image_batch import layout_of
from fastssl_pipelines.engines.base import EngineSettings
from fastssl_pipelines.engines.dali_operators import APPROXIMATIONS, DaliRender, empty_pipeline
from fastssl_pipelines.engines.streaming import (
    Buffer,
    StreamingPipeline,
    smallest_side,
    to_device,
)
from fastssl_pipelines.prefetch import in_chunks, prefetch, results
from fastssl_pipelines.sources.decoding import (
    Decoded,
    Decoding,
    decode,
    decode_checked,
    require_size,
)
from fastssl_pipelines.sources.exif import exif_orientation, upright
from fastssl_pipelines.sources.image_files import open_encoded
from fastssl_pipelines.sources.jpeg import jpeg_damage, plain_jpeg
from fastssl_pipelines.sources.pillow import MAX_PIXELS
from fastssl_pipelines.sources.unreadable import UnreadableError
from fastssl_pipelines.spec import Batch, View

log = logging.getLogger("fastssl_pipelines")

Render = Literal["fastssl", "dali"]
MAX_IN_FLIGHT = 8  # batches scheduled in DALI


class Jpeg(NamedTuple):
    """A plain JPEG, its size in px once upright, its EXIF orientation (1 where it is ignored), the
    smallest side that its views allow, and the divisor of its size at which to decode it."""

    data: NDArray[np.uint8]
    height: int
    width: int
    orientation: int
    smallest: int
    damage: str
    shrink: int = 1


Pixels = Decoded | UnreadableError  # or the reason why not
Chunks = list[Future[list[Pixels | Jpeg]]]


@dataclass
class InFlightBatch:
    """A batch being decoded: `loaded[n]` holds the pixels of image `index[n]`, or its JPEG."""

    index: Tensor  # (N,)
    loaded: list[Pixels | Jpeg]
    shrunk: list[Future[list[Pixels]]]  # the JPEGs decoded smaller, by Pillow
    full: list[Jpeg]  # the other JPEGs, by DALI
    dali: "_Dali"
    decoded: list[Any] | None  # filled in by DALI; None where `full` is empty


class DaliPipeline(StreamingPipeline):
    """A `Pipeline` over encoded images; see `open_pipeline`. Needs `pip install
    fastssl-torch[dali]`.

    source: what `open_encoded` takes. threads: of DALI and of the readers, each; by default one per
    core. oriented, depth, bands, max_pixels: see `Decoding`. scaled, on_corrupt, quota, on_damage:
    see `StreamingPipeline`; on a GPU `scaled` has no effect. A JPEG is checked for damage when it
    is first read, at about three quarters of the time of decoding it. render:
    "fastssl" renders the views as every engine does; "dali" uses DALI's operators, which
    approximate (see `dali_operators.py`), and logs that once.
    """

    def __init__(
        self,
        source: Any,
        settings: EngineSettings,
        *,
        threads: int | None = None,
        oriented: bool = False,
        depth: str = "",
        bands: tuple[int, int, int] | None = None,
        max_pixels: int = MAX_PIXELS,
        render: Render = "fastssl",
        **options: Any,
    ) -> None:
        if render not in ("fastssl", "dali"):
            raise ValueError(f"render is {render!r}: choose 'fastssl' or 'dali'")
        self.encoded = open_encoded(source)
        super().__init__(len(self.encoded), settings, lost=self.encoded.lost, **options)
        self.threads = threads or os.cpu_count() or 1
        self.decoding = Decoding(oriented, depth, bands, max_pixels)
        self._checked = np.zeros(len(self.encoded), dtype=bool)  # for damage, in this process
        self.scaled = self.scaled and self.device.type == "cpu"  # nvJPEG does not scale
        self._dali = self._build()
        self._render = self._build_render(settings.views) if render == "dali" else None
        if self._render is not None:
            log.warning(APPROXIMATIONS)

    def _build(self) -> "_Dali":
        return _Dali(self.settings.batch_size, self.threads, self.device)

    def _build_render(self, views: Sequence[View]) -> DaliRender:
        return DaliRender(
            views,
            self.settings.quality,
            batch_size=self.settings.batch_size,
            threads=self.threads,
            device=self.device,
        )

    def _batch(self, images: Images, index: Tensor, epoch: int, views: Sequence[View]) -> Batch:
        if self._render is None:
            return super()._batch(images, index, epoch, views)
        if self._render.views != tuple(views):  # an epoch with other views
            self._render = self._build_render(views)
        rendered, params = self._render.views_of(images, self.settings.seed, epoch, index)
        on_device = tuple(Params(p.table.to(self.device)) for p in params)
        batch_params = on_device if self.settings.keep_params else None
        return Batch(rendered, to_device(index, self.device), batch_params)

    def _decoded(
        self, order: list[Tensor], epoch: int, views: Sequence[View]
    ) -> Generator[tuple[Images, Tensor], None, None]:
        buffer, smallest = Buffer(self.device), smallest_side(views)
        readers = ThreadPoolExecutor(self.threads, thread_name_prefix="fastssl-read")

        def load(i: int) -> Pixels | Jpeg:
            return self._load(i, smallest)

        def read(index: Tensor) -> tuple[Tensor, Chunks]:
            return index, in_chunks(readers, self.threads, load, index.tolist())

        def start(batch: tuple[Tensor, Chunks]) -> InFlightBatch:
            index, chunks = batch
            loaded = self._planned(results(chunks), index, epoch, views)
            return self._start(index, loaded, readers)

        def collect(batch: InFlightBatch) -> tuple[Images, Tensor]:
            return self._collect(batch, buffer)

        try:
            yield from prefetch(prefetch(order, read, lambda x: x, 1), start, collect, 1)
        finally:
            readers.shutdown(cancel_futures=True)

    def _planned(
        self, loaded: list[Pixels | Jpeg], index: Tensor, epoch: int, views: Sequence[View]
    ) -> list[Pixels | Jpeg]:
        """`loaded`, of the images at `index` (N,), with `shrink` set for each JPEG."""
        sizes = [(x.height, x.width) if isinstance(x, Jpeg) else (1, 1) for x in loaded]
        shrinks = self._shrinks(index, epoch, torch.tensor(sizes), views).tolist()
        return [
            x._replace(shrink=shrink) if isinstance(x, Jpeg) else x
            for x, shrink in zip(loaded, shrinks, strict=True)
        ]

    def _start(
        self, index: Tensor, loaded: list[Pixels | Jpeg], readers: Executor
    ) -> InFlightBatch:
        """Start decoding the JPEGs of a batch, those decoded smaller on `readers`."""
        jpegs = [x for x in loaded if isinstance(x, Jpeg)]
        smaller = [x for x in jpegs if x.shrink > 1]
        full = [x for x in jpegs if x.shrink == 1]
        shrunk = in_chunks(readers, self.threads, self._by_pillow, smaller)
        scheduled = self._schedule([x.data for x in full]) if full else None
        return InFlightBatch(index, loaded, shrunk, full, self._dali, scheduled)

    def _schedule(self, jpegs: list[Any]) -> list[Any]:
        try:
            return self._dali.schedule(jpegs)
        except RuntimeError:  # it failed on a batch that an unfinished epoch left in it
            self._dali = self._build()
            return self._dali.schedule(jpegs)

    def _load(self, i: int, smallest: int) -> Pixels | Jpeg:
        """Image i: a JPEG to be decoded, its pixels, or the reason why it cannot be read."""
        try:
            data = self.encoded.read(i)
            size = plain_jpeg(data)
            if size is None:
                return decode_checked(data, self.decoding, smallest=smallest)
            require_size(*size, smallest, self.decoding.max_pixels)
        except UnreadableError as error:
            return error
        damage = "" if self._checked[i] else jpeg_damage(data)
        self._checked[i] = True
        orientation = exif_orientation(data) if self.decoding.oriented else 1
        height, width = size[::-1] if orientation > 4 else size
        return Jpeg(data, height, width, orientation, smallest, damage)

    def _collect(self, batch: InFlightBatch, buffer: Buffer) -> tuple[Images, Tensor]:
        """The readable images of a batch on the device, and their indices."""
        full: list[Any] = []
        flat: Tensor | None = None
        if batch.decoded is not None:
            try:
                decoded = batch.dali.collect(batch.decoded)
                full = [
                    Decoded(upright(x, jpeg.orientation), jpeg.damage)
                    for x, jpeg in zip(decoded, batch.full, strict=True)
                ]
                if all(jpeg.orientation == 1 for jpeg in batch.full):
                    flat = batch.dali.flat(batch.decoded)
            except RuntimeError:  # one bad image ends a DALI pipeline and all batches in it
                if batch.dali is self._dali:
                    self._dali = self._build()
                full = [self._by_pillow(x) for x in batch.full]
        from_dali, from_pillow = iter(full), iter(results(batch.shrunk))
        images, readable = [], []
        for i, x in zip(batch.index.tolist(), batch.loaded, strict=True):
            if isinstance(x, Jpeg):
                x = next(from_dali if x.shrink == 1 else from_pillow)
            if isinstance(x, UnreadableError):
                self.unreadable.add(self.encoded.names[i], str(x))
            elif self.unreadable.keeps(self.encoded.names[i], x.damage):
                images.append(x.pixels)
                readable.append(i)
        index = torch.tensor(readable, dtype=torch.int64)
        in_place = len(images) == len(full) and all(
            image is x.pixels for image, x in zip(images, full, strict=True)
        )
        return _packed(images, buffer, flat if in_place else None), index

    def _by_pillow(self, jpeg: Jpeg) -> Pixels:
        try:
            pixels = decode(jpeg.data, self.decoding, smallest=jpeg.smallest, shrink=jpeg.shrink)
        except UnreadableError as error:
            return error
        return Decoded(pixels, jpeg.damage)


def _packed(images: Sequence[Any], buffer: Buffer, flat: Tensor | None) -> Images:
    """(H, W, 3) arrays, or tensors on the GPU, stored back to back. flat: where they already are;
    nothing is copied then."""
    layout = layout_of([(x.shape[0], x.shape[1]) for x in images])
    if flat is not None:
        return buffer.images(flat, layout)
    if buffer.device.type == "cuda":
        none = torch.empty(0, dtype=torch.uint8, device=buffer.device)
        parts = [torch.as_tensor(x).to(buffer.device).reshape(-1) for x in images]
        return buffer.images(torch.cat([none, *parts]), layout)
    flat = buffer.reserve(layout)
    pixels = flat.numpy()
    for x, start in zip(images, layout[:, 0].tolist(), strict=True):
        pixels[start : start + x.size] = x.reshape(-1)
    return buffer.images(flat, layout)


class _Dali:
    """DALI's decoder: bytes in, pixels out, decoding one batch while another is in use."""

    def __init__(self, batch_size: int, threads: int, device: torch.device) -> None:
        self._device = device
        self._pipe = empty_pipeline(batch_size, threads, device)
        from nvidia.dali import fn, types

        with self._pipe:
            data = fn.external_source(name="data", dtype=types.DALIDataType.UINT8, ndim=1)
            self._pipe.set_outputs(
                fn.decoders.image(
                    data,
                    device="mixed" if device.type == "cuda" else "cpu",
                    output_type=types.DALIImageType.RGB,
                    adjust_orientation=False,  # by `upright`, in one way for all engines
                    jpeg_fancy_upsampling=True,  # chroma on the GPU as on the CPU
                )
            )
        self._pipe.build()
        self._in_flight: deque[list[Any]] = deque()  # scheduled, not yet received

    def schedule(self, data: list[Any]) -> list[Any]:
        """Start decoding these images. -> a handle for `collect`"""
        while len(self._in_flight) >= MAX_IN_FLIGHT:  # of unfinished epochs
            self._receive()
        self._pipe.feed_input("data", data)
        self._pipe.schedule_run()
        self._in_flight.append([])
        return self._in_flight[-1]

    def collect(self, scheduled: list[Any]) -> list[Any]:
        """(H, W, 3) arrays, valid as long as `scheduled` is, or tensors on the GPU.

        RuntimeError where DALI cannot decode one of them or of an earlier batch; this decoder
        cannot be used after that.
        """
        while not scheduled:
            self._receive()
        (images,) = scheduled
        cuda = self._device.type == "cuda"
        return [torch.from_dlpack(x) if cuda else np.asarray(x) for x in images]

    def flat(self, scheduled: list[Any]) -> Tensor | None:
        """All bytes of a collected batch, where DALI stores its images back to back on a CPU."""
        if self._device.type == "cuda":
            return None
        (images,) = scheduled
        size = sum(math.prod(shape) for shape in images.shape())
        try:
            return torch.from_dlpack(images.as_reshaped_tensor([size]))
        except RuntimeError:  # they are not contiguous
            return None

    def _receive(self) -> None:
        """Wait for the oldest batch and fill in its handle."""
        cuda = self._device.type == "cuda"
        stream = torch.cuda.current_stream(self._device) if cuda else None
        oldest = self._in_flight.popleft()
        oldest.extend(self._pipe.share_outputs(cuda_stream=stream))
        self._pipe.release_outputs()
