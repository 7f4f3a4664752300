"""Images and labels that are arrays in a .npz, a .npy or MNIST's idx files, read in one pass.

An array is read in chunks and only the wanted rows are kept, as uint8 RGB, so that loading takes
the memory of the result. Nothing is unpickled.

Shapes: M images of a file, H and W pixels, K classes.
"""

import gzip
import io
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from fastssl_pipelines.memory import require_memory
from fastssl_pipelines.sources.unreadable import describe

Images = NDArray[np.uint8]
Labels = NDArray[np.int64]

CHUNK_BYTES = 2**20
# The arrays of an .npz that hold images, with those that hold their labels, by part
TRAIN_KEYS = {
    "x_train": "y_train",
    "X_train": "y_train",
    "train_images": "train_labels",
    "x": "y",
    "images": "labels",
    "data": "labels",
    "arr_0": "arr_1",
}
TEST_KEYS = {
    "x_test": "y_test",
    "X_test": "y_test",
    "test_images": "test_labels",
    "val_images": "val_labels",
}
IDX_NAMES = {"train": "train", "test": "t10k"}
DAMAGE = (
    OSError,
    EOFError,
    ValueError,
    KeyError,
    zipfile.BadZipFile,
    zlib.error,
    NotImplementedError,
)


def is_idx(path: Path) -> bool:
    """Whether a folder holds MNIST's idx files."""
    return path.is_dir() and _idx_file(path, "train", "images") is not None


@dataclass(frozen=True)
class ArraySource:
    """One array in a file, of which rows are read in order."""

    path: Path
    key: str  # of the .npz; "" elsewhere

    @property
    def name(self) -> str:
        return f"{self.path}: {self.key}" if self.key else str(self.path)

    @contextmanager
    def opened(self) -> Iterator[tuple[IO[bytes], tuple[int, ...], np.dtype[Any]]]:
        """(a file at the first row, shape, dtype). ValueError where it cannot be read."""
        try:
            with self._stream() as file:
                shape, dtype = _header(file)
                yield file, shape, dtype
        except DAMAGE as error:
            if isinstance(error, ValueError) and str(error).startswith(self.name):
                raise
            raise ValueError(
                f"{self.name} cannot be read ({describe(error)}); make or copy it again"
            ) from error

    @contextmanager
    def _stream(self) -> Iterator[IO[bytes]]:
        if self.key:
            with zipfile.ZipFile(self.path) as archive, archive.open(f"{self.key}.npy") as file:
                yield file
        elif self.path.suffix == ".gz":
            with gzip.open(self.path) as file:
                yield file  # type: ignore[misc]  # a GzipFile reads bytes
        else:
            with open(self.path, "rb") as file:
                yield file


@dataclass(frozen=True)
class ArrayPart:
    """The images of one part, and their labels where it has some."""

    images: ArraySource
    labels: ArraySource | None


def find_part(path: Path, part: str) -> ArrayPart | None:
    """One part, "train" or "test", of a file or of MNIST's folder; None where it has none.

    ValueError where it has no training images.
    """
    if path.is_dir():
        images, labels = (_idx_file(path, part, kind) for kind in ("images", "labels"))
        if images is None:
            return None
        return ArrayPart(ArraySource(images, ""), ArraySource(labels, "") if labels else None)
    if path.suffix == ".npy":
        return ArrayPart(ArraySource(path, ""), None) if part == "train" else None
    keys = npz_keys(path)
    for images_key, labels_key in (TRAIN_KEYS if part == "train" else TEST_KEYS).items():
        if images_key in keys:
            labels_source = ArraySource(path, labels_key) if labels_key in keys else None
            return ArrayPart(ArraySource(path, images_key), labels_source)
    if part == "train":
        raise ValueError(
            f"{path} has no images: it holds {', '.join(keys) or 'no arrays'}; it needs x_train "
            "(M, S, S, 3), for evaluation y_train"
        )
    return None


def npz_keys(path: Path) -> list[str]:
    """The names of the arrays of an .npz. ValueError where it is none."""
    try:
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()]
    except DAMAGE as error:
        raise ValueError(
            f"{path} is no readable .npz ({describe(error)}); make or copy it again"
        ) from error


def count(source: ArraySource) -> int:
    """The number of rows."""
    with source.opened() as (_, shape, _):
        return shape[0] if shape else 0


def size(source: ArraySource) -> tuple[int, int]:
    """(H, W) of its images."""
    with source.opened() as (_, shape, _):
        height, width = _layout(source, shape)[1]
    return height, width


def read_images(source: ArraySource, rows: NDArray[np.int64]) -> Images:
    """The images at `rows`, ascending: (len(rows), H, W, 3) uint8.

    (M, H, W), (M, H, W, 1) and (M, 1, H, W) are repeated, of four channels the first three are
    taken, (M, 3, H, W) is transposed; floats in [0, 1] are scaled. ValueError for anything else.
    """
    with source.opened() as (_, shape, dtype):
        axes, (height, width) = _layout(source, shape)
    if dtype != np.uint8 and not np.issubdtype(dtype, np.floating):
        raise ValueError(f"{source.name} is {dtype}; wanted uint8, or floats in [0, 1]")
    total = (len(rows), height, width, 3)
    require_memory(
        int(np.prod(total)),
        f"holding {len(rows)} images of {width} x {height} px",
        "pass a folder of images and --engine dali or ffcv, which stream",
    )
    with source.opened() as (file, shape, dtype):
        images = np.empty(total, np.uint8)
        filled = 0
        for start, chunk in _chunks(file, shape, dtype):
            stop = start + len(chunk)
            low, high = np.searchsorted(rows, [start, stop])
            chosen = chunk[rows[low:high] - start]
            if dtype != np.uint8:
                chosen = _to_uint8(chosen, source.name, rows[low]) if len(chosen) else chosen
            images[filled : filled + len(chosen)] = _to_rgb(chosen, axes)
            filled += len(chosen)
    return images


def read_labels(source: ArraySource) -> NDArray[Any]:
    """The label of every row: (M,) int64, or strings. One-hot rows are their classes. ValueError
    where they are no labels."""
    with source.opened() as (file, shape, dtype):
        chunks = [chunk for _, chunk in _chunks(file, shape, dtype)]
    labels = np.concatenate(chunks) if chunks else np.empty(shape, dtype)
    labels = labels.reshape(len(labels), -1)
    if labels.shape[1] > 1:
        labels = _classes_of_one_hot(labels, source.name)
    labels = labels.reshape(-1)
    if labels.dtype.kind in "US":
        return labels.astype(str)
    if labels.dtype.kind == "f":
        bad = ~np.isfinite(labels) | (labels != np.round(labels))
        if bad.any():
            raise ValueError(
                f"{source.name} holds {labels[bad.argmax()]} at {bad.argmax()}: labels are whole "
                "numbers, or names"
            )
    if labels.dtype.kind not in "iufb":
        raise ValueError(f"{source.name} is {labels.dtype}; wanted whole numbers, or names")
    if len(labels) and labels.min() < 0:
        raise ValueError(
            f"{source.name} holds {labels.min()} at {labels.argmin()}: labels are not negative; "
            "leave unlabelled images out of the labelled part"
        )
    return labels.astype(np.int64)


def numbered(train: NDArray[Any], test: NDArray[Any], name: str) -> tuple[Labels, Labels]:
    """Labels as 0 to K - 1, by rank among the training part's. ValueError where the test part has
    others, and where every image has a class of its own."""
    classes = np.unique(train)
    require_known(np.setdiff1d(test, classes).tolist(), f"{name}: the test part")
    if len(classes) == len(train) > 1:
        raise ValueError(
            f"{name}: {len(train)} training images have {len(train)} different labels: these are "
            "ids and no classes; leave the labels out, or train with --no-eval"
        )
    return np.searchsorted(classes, train), np.searchsorted(classes, test)


def require_known(unknown: Sequence[Any], what: str) -> None:
    """ValueError where a part has classes that the training part lacks. what: names the part."""
    if unknown:
        some = ", ".join(map(str, unknown[:5]))
        raise ValueError(f"{what} has classes the training part lacks: {some}")


def _classes_of_one_hot(labels: NDArray[Any], name: str) -> Labels:
    kind = labels.dtype.kind
    if kind in "iufb" and ((labels == 0) | (labels == 1)).all() and (labels.sum(1) == 1).all():
        return labels.argmax(1)
    raise ValueError(
        f"{name} has {labels.shape[1]} values for each image and is not one-hot: give one label"
    )


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """(shape, dtype) of a .npy or an idx file, and the file at the first value."""
    start = file.read(4)
    if start[:3] == b"\0\0\x08":  # idx of bytes
        shape = tuple(int(n) for n in np.frombuffer(file.read(4 * start[3]), ">u4"))
        return shape, np.dtype(np.uint8)
    version = npy.read_magic(io.BytesIO(start + file.read(npy.MAGIC_LEN - 4)))
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if dtype.hasobject:
        raise ValueError("it holds Python objects: save it as numbers or as strings")
    if fortran and len(shape) > 1:
        raise ValueError("it is in Fortran order: save np.ascontiguousarray of it")
    return shape, dtype


def _chunks(
    file: IO[bytes], shape: tuple[int, ...], dtype: np.dtype[Any]
) -> Iterator[tuple[int, NDArray[Any]]]:
    """(the number of the first row, rows) in order. ValueError where the file ends early."""
    row = int(np.prod(shape[1:])) * dtype.itemsize
    step = max(1, CHUNK_BYTES // max(row, 1))
    for start in range(0, shape[0], step):
        rows = min(step, shape[0] - start)
        data = file.read(rows * row)
        if len(data) < rows * row:
            raise EOFError(f"it ends within row {start + len(data) // max(row, 1)} of {shape[0]}")
        yield start, np.frombuffer(data, dtype).reshape(rows, *shape[1:])


def _layout(source: ArraySource, shape: tuple[int, ...]) -> tuple[str, tuple[int, int]]:
    """("gray", "last" or "first": where the channels are, (H, W)). ValueError for other shapes."""
    if len(shape) == 3 and min(shape) > 0:
        return "gray", (shape[1], shape[2])
    if len(shape) == 4 and min(shape) > 0:
        if shape[3] in (1, 3, 4):
            return "last", (shape[1], shape[2])
        if shape[1] in (1, 3, 4):
            return "first", (shape[2], shape[3])
    raise ValueError(
        f"{source.name} has shape {shape}; wanted (M, S, S, 3), (M, S, S) or (M, 3, S, S)"
    )


def _to_rgb(rows: Images, axes: str) -> Images:
    """Rows of a stated layout -> what broadcasts to (rows, H, W, 3)."""
    if axes == "gray":
        return rows[..., None]
    last = np.moveaxis(rows, 1, -1) if axes == "first" else rows
    return last[..., :3]


def _to_uint8(rows: NDArray[Any], name: str, first: int) -> Images:
    """Floats in [0, 1] as uint8; ValueError for anything else. first: the number of the row."""
    bad = ~np.isfinite(rows).all(axis=tuple(range(1, rows.ndim)))
    if bad.any():
        raise ValueError(
            f"{name} has NaN or Inf, the first in image {first + bad.argmax()}; repair it"
        )
    if rows.min() < 0 or rows.max() > 1:
        raise ValueError(
            f"{name} has floats from {rows.min():g} to {rows.max():g}; scale them to [0, 1]"
        )
    return np.round(rows * 255).astype(np.uint8)


def _idx_file(path: Path, part: str, kind: str) -> Path | None:
    """MNIST's file of one part, packed or not, as it is distributed or renamed by torchvision."""
    rank = 3 if kind == "images" else 1
    for folder in (path, path / "raw", path / "MNIST" / "raw"):
        for separator in ("-", "."):
            for suffix in ("", ".gz"):
                file = folder / f"{IDX_NAMES[part]}-{kind}{separator}idx{rank}-ubyte{suffix}"
                if file.is_file():
                    return file
    return None
