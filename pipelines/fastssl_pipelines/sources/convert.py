"""Convert images into the format that an engine reads fastest: .npy (resident), .beton (ffcv) or
tar shards.

Every image is decoded once, so that unreadable ones are found here and not in training. JPEGs that
need no change are copied byte for byte. Files are written to TARGET.part, which is renamed at the
end; the same command resumes after an interruption.

Shapes: M data set, S pixels per side.
"""

import io
import json
import os
import shutil
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from fastssl_pipelines.prefetch import prefetch
from fastssl_pipelines.sources.beton import Beton, importing_ffcv
from fastssl_pipelines.sources.decoding import Bytes, Decoding, center_square, decode_checked
from fastssl_pipelines.sources.exif import exif_orientation
from fastssl_pipelines.sources.image_files import Encoded, class_numbers, open_encoded
from fastssl_pipelines.sources.jpeg import plain_jpeg
from fastssl_pipelines.sources.layout import Layout
from fastssl_pipelines.sources.unreadable import (
    QUOTA,
    OnCorrupt,
    OnDamage,
    UnreadableError,
    UnreadableImages,
    describe,
)

HEADER = 128  # bytes of an .npy header, which is written last
JPEG_SIDE = 65_500  # px, of libjpeg
SHARD_BYTES = 2**30  # of images in one tar
SMALLEST_PAGE = 2**23  # bytes; FFCV's default
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Record:
    """One converted image: the span of its bytes in the staging file, or why it was left out."""

    name: str
    offset: int = 0
    length: int = 0
    height: int = 0
    width: int = 0
    crc: int = 0
    class_name: str = ""
    damage: str = ""
    reason: str | None = None  # why it is left out


@dataclass(frozen=True)
class Report:
    """`written` images are in `target`; `skipped` maps the names of the others to the reasons;
    `damaged` are those written as they could be decoded, encoded anew."""

    target: Path
    written: int
    skipped: dict[str, str]
    damaged: dict[str, str]


def convert(
    source: Any,
    target: str | Path,
    *,
    size: int | None = None,
    quality: int = 90,
    workers: int | None = None,
    decoding: Decoding | None = None,
    image_key: str = "",
    part: str = "",
    on_corrupt: OnCorrupt = "skip",
    on_damage: OnDamage = "keep",
    quota: float = QUOTA,
    progress: Progress = lambda done, total: None,
) -> Report:
    """Write the images of `source` to `target`, verify what was written, report what was skipped.

    source: what `open_encoded` takes, or an .npz with `x_train` (M, S, S, 3) uint8. target:
    NAME.npy for squares of `size` px in one array; NAME.beton for FFCV; NAME without a suffix for a
    folder of webdataset shards. size: the shorter side of larger images is reduced to it; None
    changes none. quality: of the JPEGs that have to be encoded. decoding: images that its
    orientation turns are encoded anew. image_key: see `open_encoded`. part: the part to write,
    train, val or test, where the source has parts. No target exists after a ValueError or an
    OSError. One process at a time writes a target.
    """
    how = decoding or Decoding()
    target = Path(target).expanduser()
    for name, value, low, high in (
        ("size", size, 2, 65_535),
        ("quality", quality, 1, 100),
        ("workers", workers, 1, 1024),
    ):
        if value is not None and not low <= value <= high:
            raise ValueError(f"{name} is {value}: it must lie in [{low}, {high}]")
    whole = _open_source(source, image_key)
    images = _part(whole, part)
    kind = _kind(target, size, images)
    if target.exists():
        raise ValueError(f"{target} exists; remove it, or choose another target")
    total = len(images) + len(whole.lost)
    unreadable = UnreadableImages(total, on_corrupt, quota, on_damage, whole.lost)
    encoder = _Encoder(images, kind, size, quality, how)
    settings = [kind, size, quality, asdict(how), on_damage, part, images.fingerprint()]
    with _locked(target), _staging(target, settings) as folder:
        records = _stage(encoder, folder, workers or os.cpu_count() or 1, unreadable, progress)
        good = [record for record in records if record.name not in unreadable.reasons]
        if not good:
            raise ValueError(f"no image of {source} can be read; `fastssl doctor` says why")
        packed = _pack(kind, folder, good)
        _verify(kind, packed, good)
        os.replace(packed, target)
    return Report(target, len(good), unreadable.reasons, unreadable.damaged)


def _part(images: Encoded, part: str) -> Encoded:
    """The images of one part; ValueError where the source has parts and none of them is chosen."""
    parts = images.layout.parts
    if part not in parts:
        names = ", ".join(sorted(parts))
        if not part:
            raise ValueError(
                f"{images.source} has the parts {names}: convert each by itself, with --part"
            )
        raise ValueError(f"{images.source} has no part {part}; it has {names or 'none'}")
    return images if len(parts[part]) == len(images) else images.select(parts[part])


class _Arrays(Encoded):
    """The images of an .npz, with pixels in place of encoded bytes."""

    def __init__(self, path: Path) -> None:
        with np.load(path, allow_pickle=False) as arrays:
            if "x_train" not in arrays.files:
                raise ValueError(f"{path} has no array x_train; it holds {arrays.files}")
            self.pixels = arrays["x_train"]
        shape, dtype = self.pixels.shape, self.pixels.dtype
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or shape[0] == 0:
            raise ValueError(f"{path}: x_train is {dtype} {shape}; wanted uint8 (M, S, S, 3)")
        super().__init__([], str(path))
        self.names = [f"{path}: image {i}" for i in range(shape[0])]
        self._path = path

    def __len__(self) -> int:
        return len(self.pixels)

    @cached_property
    def classes(self) -> list[str]:
        return [""] * len(self)

    @cached_property
    def layout(self) -> Layout:
        return Layout({"": list(range(len(self)))}, self.classes)

    def fingerprint(self) -> list[Any]:
        return [str(self._path), self._path.stat().st_mtime_ns]


def _open_source(source: Any, image_key: str) -> Encoded:
    if isinstance(source, str | os.PathLike) and Path(source).suffix == ".npz":
        return _Arrays(Path(source).expanduser())
    return open_encoded(source, image_key=image_key)


def _kind(target: Path, size: int | None, images: Encoded) -> str:
    if target.suffix not in (".npy", ".beton", ""):
        raise ValueError(
            f"target {target} ends in {target.suffix}; wanted .npy (resident), .beton (ffcv), "
            "or no suffix for a folder of tar shards"
        )
    if target.suffix == ".npy" and size is None and not isinstance(images, _Arrays):
        raise ValueError("an .npy holds squares of one size: give it, such as --size 256")
    return target.suffix.removeprefix(".") or "tar"


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    """One process at a time converts to `target`."""
    lock = FileLock(target.with_name(target.name + ".lock"), timeout=0)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise ValueError(f"another process is converting to {target}; wait for it") from None
    except OSError as error:
        raise OSError(f"{target} could not be written ({error}); nothing was left") from error
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


@contextmanager
def _staging(target: Path, settings: list[Any]) -> Iterator[Path]:
    """The folder TARGET.part. It remains after an interruption, so that a run with the same
    settings resumes."""
    part = target.with_name(target.name + ".part")
    stamp = json.dumps(settings)
    if part.exists() and (not (f := part / "settings").is_file() or f.read_text() != stamp):
        shutil.rmtree(part)
    try:
        part.mkdir(parents=True, exist_ok=True)
        (part / "settings").write_text(stamp)
        yield part
    except (OSError, ValueError) as error:
        shutil.rmtree(part, ignore_errors=True)
        if isinstance(error, OSError):
            raise OSError(f"{target} could not be written ({error}); nothing was left") from error
        raise
    shutil.rmtree(part)


def _stage(
    encoder: "_Encoder",
    part: Path,
    workers: int,
    unreadable: UnreadableImages,
    progress: Progress,
) -> list[Record]:
    """Write the bytes of all images to `part`/data. -> their records"""
    records, total = _recorded(part), len(encoder.images)
    for record in records:
        _note(record, unreadable)
    end = max([HEADER if encoder.kind == "npy" else 0, *(r.offset + r.length for r in records)])
    data_path = part / "data"
    data_path.touch()
    with (
        open(data_path, "r+b") as data,
        open(part / "records", "a") as ledger,
        ThreadPoolExecutor(workers, thread_name_prefix="fastssl-convert") as pool,
    ):
        data.truncate(end)
        data.seek(end)
        todo = range(len(records), total)
        converted = prefetch(
            todo,
            lambda i: pool.submit(encoder.encode, i),
            lambda future: future.result(),
            4 * workers,
        )
        for record, stored in converted:
            used = _note(record, unreadable)
            records.append(replace(record, offset=data.tell(), length=len(stored) if used else 0))
            if used:
                data.write(stored)
                data.flush()
            ledger.write(json.dumps(asdict(records[-1])) + "\n")
            ledger.flush()
            progress(len(records), total)
    return records


def _note(record: Record, unreadable: UnreadableImages) -> bool:
    """Whether the image of a record is used; the damaged and unreadable ones are recorded."""
    if record.reason is None:
        return unreadable.keeps(record.name, record.damage)
    unreadable.add(record.name, record.reason)
    return False


def _recorded(part: Path) -> list[Record]:
    """The records that an earlier run completed."""
    path = part / "records"
    if not path.is_file():
        return []
    lines = path.read_text().split("\n")[:-1]  # the last line may be truncated
    size = (part / "data").stat().st_size
    records = [Record(**json.loads(line)) for line in lines]
    complete = next((k for k, r in enumerate(records) if r.offset + r.length > size), len(records))
    path.write_text("".join(line + "\n" for line in lines[:complete]))
    return records[:complete]


@dataclass(frozen=True)
class _Encoder:
    """Images as they will be stored."""

    images: Encoded
    kind: str
    size: int | None
    quality: int
    how: Decoding

    def encode(self, i: int) -> tuple[Record, bytes]:
        """Image i, or the reason why it cannot be read or the format cannot hold it."""
        name = self.images.names[i]
        try:
            return self._encoded(i, name)
        except UnreadableError as error:
            return Record(name, reason=str(error)), b""
        except (MemoryError, ValueError) as error:
            return Record(name, reason=f"it cannot be stored: {describe(error)}"), b""

    def _encoded(self, i: int, name: str) -> tuple[Record, bytes]:
        if isinstance(self.images, _Arrays):
            data, pixels, damage = None, self.images.pixels[i], ""
        else:
            data = self.images.read(i)
            pixels, damage = decode_checked(data, self.how)
        resized = self._resized(pixels)
        if self.kind == "npy":
            stored = resized.tobytes()
        elif data is not None and resized is pixels and not damage and self._is_copied(data):
            stored = data.tobytes()
        else:
            stored = _jpeg(resized, self.quality)
        height, width = resized.shape[:2]
        crc = zlib.crc32(stored)
        class_name = self.images.classes[i]
        return Record(name, 0, len(stored), height, width, crc, class_name, damage), stored

    def _resized(self, pixels: Bytes) -> Bytes:
        if self.size is None:
            return pixels
        return (
            center_square(pixels, self.size) if self.kind == "npy" else _reduced(pixels, self.size)
        )

    def _is_copied(self, data: Bytes) -> bool:
        """Whether the bytes are a JPEG that every reader takes as it is."""
        upright = not self.how.oriented or exif_orientation(data) == 1
        return upright and plain_jpeg(data) is not None


def _reduced(pixels: Bytes, size: int) -> Bytes:
    """The shorter side reduced to `size` px; smaller images are returned as they are."""
    from PIL import Image

    height, width = pixels.shape[:2]
    if min(height, width) <= size:
        return pixels
    scale = size / min(height, width)
    smaller = (round(width * scale), round(height * scale))
    return np.asarray(Image.fromarray(pixels).resize(smaller, Image.Resampling.BILINEAR))


def _jpeg(pixels: Bytes, quality: int) -> bytes:
    from PIL import Image

    height, width = pixels.shape[:2]
    if max(height, width) > JPEG_SIDE:
        raise UnreadableError(
            f"{width} x {height} pixels: a JPEG holds at most {JPEG_SIDE} a side; pass --size"
        )
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    return file.getvalue()


def _pack(kind: str, part: Path, records: Sequence[Record]) -> Path:
    """The finished file or folder, below `part`."""
    data = np.memmap(part / "data", np.uint8, "r")
    if kind == "npy":
        return _pack_npy(part / "data", records)
    numbers = class_numbers(record.class_name for record in records)
    labels = [numbers[r.class_name] for r in records] if "" not in numbers else None
    if kind == "beton":
        return _pack_beton(part / "packed.beton", data, records, labels)
    return _pack_shards(part / "packed", data, records, labels)


def _pack_npy(path: Path, records: Sequence[Record]) -> Path:
    """The staging file, with its header filled in."""
    shapes = {(record.height, record.width) for record in records}
    if len(shapes) > 1:
        raise ValueError("an .npy holds squares of one size: give it, such as --size 256")
    header = io.BytesIO()
    shape = (len(records), *shapes.pop(), 3)
    described = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, described)
    assert header.tell() == HEADER
    with open(path, "r+b") as file:
        file.write(header.getvalue())
    return path


def _pack_beton(
    path: Path, data: Bytes, records: Sequence[Record], labels: list[int] | None
) -> Path:
    """Through FFCV's writer, in this process: on an error its workers would hang."""
    with importing_ffcv():
        from ffcv.fields import IntField, RGBImageField
        from ffcv.memory_allocator import MemoryAllocator
        from ffcv.writer import DatasetWriter, handle_sample

    def store(destination: Any, record: Record, malloc: Callable[[int], Any]) -> None:
        destination["mode"], destination["height"], destination["width"] = (
            0,
            record.height,
            record.width,
        )
        destination["data_ptr"], memory = malloc(record.length)
        memory[:] = data[record.offset : record.offset + record.length]

    image = RGBImageField(write_mode="jpg")
    image.encode = store  # the field would decode and encode again
    fields = {"image": image, "index": IntField()}
    if labels is not None:
        fields["label"] = IntField()
    largest = max(record.length for record in records)
    page = max(SMALLEST_PAGE, 1 << (largest - 1).bit_length())
    writer = DatasetWriter(str(path), fields, page_size=page)
    writer.num_samples = len(records)
    writer.prepare()
    failure: OSError | None = None
    metadata = np.frombuffer(writer.metadata_sm.buf, writer.metadata_type, len(records))
    try:
        allocator = MemoryAllocator(str(path), writer.data_region_start, page)
        with allocator:
            for k, record in enumerate(records):
                sample = (record, k) if labels is None else (record, k, labels[k])
                handle_sample(sample, k, metadata.dtype.names, metadata, allocator, fields)
        writer.finalize(allocator.allocations)
    except OSError as error:
        # without its traceback, whose frames refer to the shared memory that is closed below
        failure = OSError(error.errno, error.strerror)
    finally:
        del metadata
        writer.metadata_sm.close()
        writer.metadata_sm.unlink()
    if failure is not None:
        raise failure
    return path


def _pack_shards(
    folder: Path, data: Bytes, records: Sequence[Record], labels: list[int] | None
) -> Path:
    """Tars of about SHARD_BYTES: 00000000.jpg, with labels 00000000.cls, and so on."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    starts = np.cumsum([0, *(record.length for record in records)])[:-1]
    shard_of = (starts // SHARD_BYTES).tolist()
    for shard, members in groupby(range(len(records)), key=lambda k: shard_of[k]):
        with tarfile.open(folder / f"{shard:06d}.tar", "w") as tar:
            for k in members:
                start = records[k].offset
                _add(tar, f"{k:08d}.jpg", data[start : start + records[k].length].tobytes())
                if labels is not None:
                    _add(tar, f"{k:08d}.cls", str(labels[k]).encode())
    return folder


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def _verify(kind: str, packed: Path, records: Sequence[Record]) -> None:
    """ValueError unless every image reads back, bit for bit, with the reader of its engine."""
    read: Callable[[int], Bytes]
    if kind == "npy":
        array: NDArray[np.uint8] = np.load(packed, mmap_mode="r")
        count, read = len(array), lambda k: array[k]
    elif kind == "beton":
        beton = Beton(packed)
        count, read = len(beton), beton.stored
    else:
        encoded = open_encoded(packed)
        count, read = len(encoded), encoded.read
    if count != len(records):
        raise ValueError(f"{packed} holds {count} images, not {len(records)}")
    for k, record in enumerate(records):
        if zlib.crc32(read(k).tobytes()) != record.crc:
            raise ValueError(f"{record.name} reads back changed from {packed}; check the disk")
