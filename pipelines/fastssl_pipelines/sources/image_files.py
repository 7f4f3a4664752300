"""Encoded images of a folder, of tar shards or in memory: indexed once, read on demand.

The index gives each image a number that is the same in every run, so that an engine can determine
the order of an epoch: exact skip, disjoint shards, and a shuffle over the whole data set rather
than a window of it.

Shapes: M data set, H and W pixels.
"""

import io
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]

SUFFIXES = frozenset(".bmp .gif .jpeg .jpg .png .ppm .tif .tiff .webp".split())
WANTED = (
    "a folder of images, a .tar or a folder of .tar shards, a list of files, or a list of bytes"
)
SMALLEST = 2  # px: sides of an image that views can be rendered from
SOI, EOI, START_OF_SCAN, ADOBE = 0xD8, 0xD9, 0xDA, 0xEE
FRAMES = {0xC0, 0xC1, 0xC2}  # baseline, extended, progressive; Huffman coded
NO_FRAME = {0xC4, 0xC8, 0xCC}  # of the markers between 0xC0 and 0xCF
WITHOUT_LENGTH = {0x01, 0xFF, *range(0xD0, 0xD8)}  # not valid before the first scan
ORIENTATION = 0x0112  # the EXIF tag


class UnreadableError(ValueError):
    """One image that cannot be read, and why."""


class FileSpan(NamedTuple):
    """The bytes of one image: `size` of them from `offset` on; size -1 is the whole file."""

    file: Path
    offset: int
    size: int


class Encoded:
    """M encoded images. `names[i]` is the path of image i, prefixed with that of its tar; `read(i)`
    returns its bytes."""

    def __init__(self, names: Sequence[str], spans: Sequence[FileSpan | bytes]) -> None:
        self.names, self._spans = names, spans

    def __len__(self) -> int:
        return len(self.names)

    def read(self, i: int) -> Bytes:
        """The encoded bytes of image i. UnreadableError where its file cannot be opened."""
        span = self._spans[i]
        if isinstance(span, bytes):
            return np.frombuffer(span, np.uint8)
        try:
            return np.fromfile(span.file, np.uint8, count=span.size, offset=span.offset)
        except OSError as error:
            raise UnreadableError(f"the file cannot be opened: {error.strerror}") from error

    def select(self, chosen: Sequence[int]) -> "Encoded":
        """The images at positions `chosen`, renumbered from 0."""
        return Encoded([self.names[i] for i in chosen], [self._spans[i] for i in chosen])

    def class_name(self, i: int) -> str:
        """The name of the folder of image i, by convention its class; "" where it has none."""
        return Path(self.names[i].rpartition(":")[2]).parent.name

    def fingerprint(self) -> list[Any]:
        """Changes when the images do: the names, sizes and modification times of their files."""
        files = sorted({span.file for span in self._spans if isinstance(span, FileSpan)})
        stats = [(str(file), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files]
        return [len(self), *stats]


def is_encoded(source: Any) -> bool:
    """Whether `source` names files or holds encoded bytes, rather than pixels."""
    first = source[0] if isinstance(source, list | tuple) and source else source
    return isinstance(first, str | os.PathLike | bytes | Encoded)


def open_encoded(source: Any) -> Encoded:
    """The index of `source`: a folder of images or of tar shards, a .tar, a list of either, or a
    list of bytes.

    Images are numbered by sorted name; members of tars (webdataset shards) by their order in the
    tar. ValueError where there are none.
    """
    if isinstance(source, Encoded):
        return source
    if isinstance(source, str | os.PathLike):
        files = _files(Path(source).expanduser())
    elif isinstance(source, Sequence) and source and isinstance(source[0], bytes):
        return Encoded([f"image {i} in memory" for i in range(len(source))], list(source))
    elif isinstance(source, Sequence) and source and isinstance(source[0], str | os.PathLike):
        files = [Path(file).expanduser() for file in source]
    else:
        raise ValueError(f"source is {type(source).__name__}; wanted {WANTED}")
    shards = [file for file in files if file.suffix == ".tar"]
    if shards and len(shards) == len(files):
        return _members(shards)
    return Encoded([str(file) for file in files], [FileSpan(file, 0, -1) for file in files])


def _files(path: Path) -> list[Path]:
    """Images below a folder, else its tar shards; a file is itself."""
    if path.is_file():
        if path.suffix != ".tar":
            raise ValueError(f"{path} is a file but no .tar; wanted {WANTED}")
        return [path]
    if not path.is_dir():
        raise ValueError(f"{path} does not exist; wanted {WANTED}")
    return _scan(path, or_shards=True)


def find_images(folder: Path) -> list[Path]:
    """The image files below `folder`, at any depth, sorted. ValueError where there are none."""
    return _scan(folder, or_shards=False)


def _scan(folder: Path, or_shards: bool) -> list[Path]:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    found = [file for file in files if file.suffix.lower() in SUFFIXES]
    if not found and or_shards:
        found = [file for file in files if file.suffix == ".tar"]
    if not found:
        known = " ".join(sorted(SUFFIXES))
        raise ValueError(
            f"{folder} holds no images: fastssl reads files ending in {known}, or .tar"
        )
    return found


def _members(shards: Sequence[Path]) -> Encoded:
    """The images in uncompressed tars; only their headers are read."""
    names: list[str] = []
    spans: list[FileSpan | bytes] = []
    for shard in shards:
        try:
            with tarfile.open(shard, "r:") as tar:
                for member in tar:
                    if member.isfile() and Path(member.name).suffix.lower() in SUFFIXES:
                        names.append(f"{shard}:{member.name}")
                        spans.append(FileSpan(shard, member.offset_data, member.size))
        except tarfile.TarError as error:
            raise ValueError(
                f"{shard} cannot be read as an uncompressed tar ({error}); unpack or copy it again"
            ) from error
    if not names:
        raise ValueError(f"{shards[0]} holds no images; wanted {WANTED}")
    return Encoded(names, spans)


def plain_jpeg(data: Bytes) -> tuple[int, int] | None:
    """(height, width) of a complete 8-bit gray or YCbCr JPEG, which all decoders read alike.

    None for anything else: other formats and colour spaces, and truncated files.
    """
    if len(data) < 4 or data[0] != 0xFF or data[1] != SOI:
        return None
    if data[-2] != 0xFF or data[-1] != EOI:  # trailing padding is rare, and left to Pillow
        return None
    view, at, size = data.data, 2, None
    while at + 4 <= len(view):
        marker = view[at + 1]
        if view[at] != 0xFF or marker in WITHOUT_LENGTH:
            return None
        if marker == START_OF_SCAN:
            return size
        length = int.from_bytes(view[at + 2 : at + 4])
        body = view[at + 4 : at + 2 + length]
        if marker == ADOBE and len(body) >= 12 and body[11] == 0:
            return None  # three components may be RGB here
        if 0xC0 <= marker <= 0xCF and marker not in NO_FRAME:
            if marker not in FRAMES or len(body) < 6 or body[0] != 8 or body[5] not in (1, 3):
                return None
            size = int.from_bytes(body[1:3]), int.from_bytes(body[3:5])
        at += 2 + length
    return None


def decode(
    data: Bytes, *, oriented: bool = False, smallest: int = SMALLEST, shrink: int = 1
) -> Bytes:
    """Any image that Pillow reads -> (H, W, 3) uint8 RGB; UnreadableError with the reason for all
    others.

    CMYK is converted, 16 bits are shifted to 8, gray is repeated, alpha is dropped. oriented: apply
    the EXIF orientation, which torchvision and the default ignore. shrink: 2, 4 or 8 decodes a JPEG
    to ceil(H / shrink) x ceil(W / shrink) by libjpeg's DCT scaling.
    """
    from PIL import Image, ImageOps

    if len(data) == 0:
        raise UnreadableError("the file is empty")
    try:
        with Image.open(io.BytesIO(data.tobytes())) as image:
            if shrink > 1:  # Pillow takes the largest divisor that still gives this size: shrink
                image.draft(None, (image.width // shrink, image.height // shrink))
            upright = ImageOps.exif_transpose(image) if oriented else image
            pixels = to_rgb(upright)
    except Image.UnidentifiedImageError:
        start = data[:8].tobytes()
        raise UnreadableError(f"not an image: it starts with {start!r}") from None
    except Exception as error:  # Pillow's plug-ins raise any exception on a corrupt file
        raise UnreadableError(str(error)) from error
    require_side(pixels.shape[0], pixels.shape[1], smallest)
    return pixels


def center_square(pixels: Bytes, size: int) -> Bytes:
    """(H, W, 3) -> (size, size, 3): the shorter side resized to `size` px with antialias, the
    centre cropped."""
    from PIL import Image, ImageOps

    fitted = ImageOps.fit(Image.fromarray(pixels), (size, size), Image.Resampling.BILINEAR)
    return np.asarray(fitted)


def exif_orientation(data: Bytes) -> int:
    """1 (upright) to 8, as EXIF counts; 1 where no such tag can be read."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data.tobytes())) as image:
            value = image.getexif().get(ORIENTATION, 1)
    except Exception:  # Pillow's plug-ins raise any exception on a corrupt file
        return 1
    return value if value in range(1, 9) else 1


def require_side(height: int, width: int, smallest: int) -> None:
    """UnreadableError for an image too small for its views."""
    if min(height, width) < smallest:
        raise UnreadableError(
            f"{width} x {height} pixels: these views need at least {smallest} x {smallest}"
        )


def to_rgb(image: Any) -> Bytes:
    """A PIL image of any mode -> (H, W, 3) uint8: gray is repeated, alpha dropped, CMYK and
    palettes converted, 16 bits shifted to 8."""
    if image.mode.startswith("I"):  # 16-bit gray, which Pillow would clip at 255
        gray = np.asarray(image).astype(np.int64) >> 8
        return np.repeat(gray.clip(0, 255).astype(np.uint8)[..., None], 3, axis=-1)
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))  # which would copy
