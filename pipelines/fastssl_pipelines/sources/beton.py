"""Images of a .beton file, in FFCV's format: its reader and its decoder, without its loader.

Shapes: M data set, H and W pixels.
"""

import copy
import os
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastssl_pipelines.sources.decoding import (
    SMALLEST,
    Bytes,
    Decoding,
    decode_checked,
    require_size,
)
from fastssl_pipelines.sources.image_files import Encoded
from fastssl_pipelines.sources.layout import Layout
from fastssl_pipelines.sources.unreadable import UnreadableError

RAW = 1  # the mode of an image stored as pixels


class Beton(Encoded):
    """A .beton file: M images in FFCV's format, version 2.

    row (M,): the row of image i; size (rows, 2): height and width of each row; raw (rows,): whether
    it is stored as pixels; page (rows,): the page that holds it. ValueError where the file is not
    one, or is truncated.
    """

    def __init__(self, source: Any, os_cache: bool = True) -> None:
        self.path = _existing(source)
        imdecode, reader, image, number, label = _open(self.path)
        self._imdecode = imdecode
        table = np.sort(reader.alloc_table, order="ptr")
        if not np.isin(image["data_ptr"], table["ptr"]).all():
            raise ValueError(f"{self.path} breaks off: copy or convert it again")
        start = image["data_ptr"].astype(np.int64)
        length = table["size"][np.searchsorted(table["ptr"], image["data_ptr"])]
        self._start, self._length = start.tolist(), length.tolist()
        size = np.stack([image["height"], image["width"]], axis=1).astype(np.int64)
        self.size = torch.from_numpy(size)
        self.raw = torch.from_numpy(image["mode"] == RAW)
        self.page = torch.from_numpy(start // int(reader.page_size))
        self.row = _rows(number, len(start))
        self._label = label  # (rows,)
        super().__init__([], str(self.path))
        self.names = [f"{self.path}: image {i}" for i in range(len(start))]
        self._file = os.open(self.path, os.O_RDONLY)
        self._close = weakref.finalize(self, os.close, self._file)
        self._mapped = np.memmap(self.path, np.uint8, "r") if os_cache else None

    def select(self, chosen: Sequence[int]) -> "Beton":
        """The images at positions `chosen`, renumbered from 0."""
        part = copy.copy(self)
        for name in ("classes", "layout"):
            part.__dict__.pop(name, None)
        part.class_numbers = self.class_numbers
        part.names = [self.names[i] for i in chosen]
        part.row = self.row[torch.as_tensor(chosen, dtype=torch.int64)]
        part._file_owner = self  # type: ignore[attr-defined]  # it closes the file
        return part

    def read(self, i: int) -> Bytes:
        """Image i as a file: the JPEG, or the pixels with a .ppm header."""
        row = int(self.row[i])
        stored = self.stored(row)
        if not self.raw[row]:
            return stored
        height, width = self.size[row].tolist()
        header = f"P6 {width} {height} 255\n".encode()
        return np.concatenate([np.frombuffer(header, np.uint8), stored])

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def classes(self) -> list[str]:
        """The number in the field "label" of each image, "" where there is no such field."""
        if self._label is None:
            return [""] * len(self)
        return [str(label) for label in self._label[self.row.numpy()]]

    @cached_property
    def layout(self) -> Layout:
        return Layout({"": list(range(len(self)))}, self.classes)

    def fingerprint(self) -> list[Any]:
        stat = self.path.stat()
        return [str(self.path), stat.st_size, stat.st_mtime_ns]

    def stored(self, row: int) -> Bytes:
        """The bytes of one image: a JPEG, or its pixels. UnreadableError where the file was cut."""
        start, length = self._start[row], self._length[row]
        if os.fstat(self._file).st_size < start + length:  # reading a mapping would end the process
            raise UnreadableError(f"{self.path} was cut since it was opened")
        if self._mapped is not None:
            return self._mapped[start : start + length]
        data = os.pread(self._file, length, start)
        os.posix_fadvise(self._file, start, length, os.POSIX_FADV_DONTNEED)
        return np.frombuffer(data, np.uint8)

    def decode(self, row: int, shrink: int, out: Bytes, smallest: int = SMALLEST) -> str:
        """Fill `out` with the pixels of one image at 1 / `shrink`. -> its damage, "" for a clean
        one; UnreadableError where there are no pixels."""
        height, width = self.size[row].tolist()
        require_size(height, width, smallest)
        data = self.stored(row)
        if self.raw[row]:
            if len(data) != 3 * height * width:
                raise UnreadableError(f"it holds {len(data)} bytes for {width} x {height} pixels")
            out[: len(data)] = data
            return ""
        full = (height, width, 0, 0, 1, shrink, False, False)
        source, target = data.ctypes.data, out.ctypes.data
        if not self._imdecode(source, len(data), height, width, target, *full):
            return ""
        # FFCV's decoder fails on whatever libjpeg warns of
        found = decode_checked(data, Decoding(), smallest=smallest, shrink=shrink)
        if found.pixels.shape[:2] != (-(-height // shrink), -(-width // shrink)):
            raise UnreadableError("its size is not that in the index: convert it again")
        out[: found.pixels.size] = found.pixels.reshape(-1)
        return found.damage


def _rows(number: NDArray[np.int64] | None, count: int) -> Tensor:
    """The row of each image (M,): by the index field where it is a permutation of range(M)."""
    if number is None or not np.array_equal(np.sort(number), np.arange(count)):
        return torch.arange(count)
    return torch.from_numpy(number.astype(np.int64)).argsort()


@contextmanager
def importing_ffcv() -> Iterator[None]:
    """Context for imports from ffcv: ignores its distutils warning; ValueError where it is not
    installed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The distutils package", DeprecationWarning)
        try:
            yield
        except ModuleNotFoundError as error:
            raise ValueError(
                f"FFCV cannot be imported ({error}): pip install 'fastssl-torch[ffcv]'; where "
                "distutils is missing (Python 3.12 dropped it), pip install setuptools"
            ) from error


def _existing(source: Any) -> Path:
    path = Path(source).expanduser() if isinstance(source, str | os.PathLike) else None
    if path is None or path.suffix != ".beton":
        raise ValueError(
            f"source is {source!r:.80}; engine ffcv reads a .beton: `fastssl convert` makes one"
        )
    if not path.is_file():
        raise ValueError(f"{path} does not exist; `fastssl convert SOURCE {path}` makes it")
    return path


def _open(path: Path) -> tuple[Any, Any, Any, NDArray[np.int64] | None, NDArray[np.int64] | None]:
    """(FFCV's decoder, its reader of the file, the rows of the image field, the index field, the
    label field)."""
    with importing_ffcv():
        from ffcv.fields import RGBImageField
        from ffcv.libffcv import ctypes_imdecode
        from ffcv.reader import Reader
    try:
        reader = Reader(str(path))
    except (AssertionError, ValueError, IndexError, KeyError) as error:
        raise ValueError(f"{path} is no .beton file of version 2, or breaks off") from error
    kinds = [isinstance(handler, RGBImageField) for handler in reader.handlers.values()]
    if not any(kinds) or reader.num_samples == 0:
        raise ValueError(f"{path} holds no images; its fields are {reader.field_names}")
    image = reader.metadata[f"f{kinds.index(True)}"]
    number, label = _int_field(reader, "index"), _int_field(reader, "label")
    return ctypes_imdecode, reader, image, number, label


def _int_field(reader: Any, name: str) -> NDArray[np.int64] | None:
    """One IntField in the order of the rows, None where there is no such field."""
    with importing_ffcv():
        from ffcv.fields import IntField
    for k, (known, handler) in enumerate(reader.handlers.items()):
        if known == name and isinstance(handler, IntField):
            return np.asarray(reader.metadata[f"f{k}"], dtype=np.int64)
    return None
