"""Encoded bytes to pixels, the same for every engine: clean, readable with damage, or unreadable.

libjpeg reports damage in a JPEG as a warning and goes on with whatever pixels it has. Pillow, DALI
and torchvision drop that warning, FFCV refuses the image; here it is the `damage` of the result.

Shapes: H and W pixels, B bands.
"""

import io
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastssl_pipelines.sources.depth import parse_range, to_uint8
from fastssl_pipelines.sources.exif import exif_orientation, orientation_of, upright
from fastssl_pipelines.sources.jpeg import decode_jpeg, jpeg_damage, plain_jpeg, warning_of
from fastssl_pipelines.sources.pillow import MAX_PIXELS, open_image
from fastssl_pipelines.sources.unreadable import UnreadableError, describe

Bytes = NDArray[np.uint8]

SMALLEST = 2  # px: sides of an image that views can be rendered from
TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


class Decoded(NamedTuple):
    """pixels (H, W, 3) uint8 RGB; what the decoder found damaged in them, "" for a clean image."""

    pixels: Bytes
    damage: str = ""


@dataclass(frozen=True)
class Decoding:
    """How images are decoded.

    oriented: apply the EXIF orientation, which torchvision and the default ignore. depth: how
    values of more than 8 bits become 8: "type" maps the range of their type (floats: [0, 1]),
    "data" that of each image, "LOW:HIGH" this range; "" maps the type's range where the image uses
    it (unsigned with values in the upper half, floats within [0, 1]) and refuses the others. bands:
    the numbers, from 1, of the three bands taken of an image with more than 4. max_pixels: of one
    image.
    """

    oriented: bool = False
    depth: str = ""
    bands: tuple[int, int, int] | None = None
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        if self.depth not in ("", "type", "data"):
            parse_range(self.depth)
        if self.bands is not None and (len(self.bands) != 3 or min(self.bands) < 1):
            raise ValueError(f"bands is {self.bands}: give three numbers from 1, such as (4, 3, 2)")
        if self.max_pixels < 1:
            raise ValueError(f"max_pixels is {self.max_pixels}: it must be positive")


def parse_bands(text: str) -> tuple[int, int, int] | None:
    """The bands of "4,3,2"; None for ""."""
    try:
        bands = tuple(int(part) for part in text.split(",")) if text else None
    except ValueError:
        bands = ()
    if bands is None or (len(bands) == 3 and min(bands) >= 1):
        return bands
    raise ValueError(f"bands is {text!r}: give three numbers from 1, such as 4,3,2")


def decode(
    data: Bytes, how: Decoding | None = None, *, smallest: int = SMALLEST, shrink: int = 1
) -> Bytes:
    """The pixels of `decode_checked`, without its check of a JPEG that is decoded smaller: an
    engine makes that once for an image, and decodes it in every epoch."""
    return _decode(data, how, smallest, shrink, checked=False).pixels


def decode_checked(
    data: Bytes, how: Decoding | None = None, *, smallest: int = SMALLEST, shrink: int = 1
) -> Decoded:
    """Any image that libjpeg-turbo, Pillow or tifffile reads, and what is damaged in it.

    UnreadableError with the reason for all others, truncated files among them. CMYK is converted,
    gray is repeated, alpha is dropped; of several frames the first is taken. shrink: 2, 4 or 8
    decodes a JPEG to ceil(H / shrink) x ceil(W / shrink) by libjpeg's DCT scaling.
    """
    return _decode(data, how, smallest, shrink, checked=True)


def _decode(
    data: Bytes, how: Decoding | None, smallest: int, shrink: int, *, checked: bool
) -> Decoded:
    how = how or Decoding()
    if len(data) == 0:
        raise UnreadableError("the file is empty")
    size = plain_jpeg(data)
    if size is not None:
        require_size(*size, smallest, how.max_pixels)
    damage = ""
    try:
        if size is not None and shrink == 1:
            try:
                pixels = decode_jpeg(data)
                return Decoded(upright(pixels, exif_orientation(data) if how.oriented else 1))
            except ValueError as error:  # a warning or an error; Pillow tells which
                damage = warning_of(error)
        elif checked and data[:2].tobytes() == b"\xff\xd8":
            damage = jpeg_damage(data)
        return Decoded(_decode_any(data, how, smallest, shrink), damage)
    except UnreadableError:
        raise
    except Exception as error:  # decoders raise any exception on a corrupt file
        raise UnreadableError(describe(error)) from error


def _decode_any(data: Bytes, how: Decoding, smallest: int, shrink: int) -> Bytes:
    """(H, W, 3) by Pillow, or by tifffile what Pillow does not read or reads as another type."""
    from PIL import Image

    try:
        image = open_image(data, how.max_pixels)
    except Image.UnidentifiedImageError:
        if data[:4].tobytes() in TIFF_MAGIC:
            return _oriented_tiff(data, how, smallest, orientation=1)
        start = data[:8].tobytes()
        raise UnreadableError(f"not an image: it starts with {start!r}") from None
    with image:
        require_size(image.height, image.width, smallest, how.max_pixels)
        orientation = orientation_of(image) if how.oriented else 1
        if shrink > 1:  # Pillow takes the largest divisor that still gives this size: shrink
            image.draft(None, (image.width // shrink, image.height // shrink))
        if image.format == "TIFF" and image.mode[0] in "IF":  # it drops the sign and the depth
            return _oriented_tiff(data, how, smallest, orientation)
        pixels = to_rgb(image, how.depth)
    return upright(pixels, orientation)


def to_rgb(image: Any, depth: str = "") -> Bytes:
    """A PIL image of any mode -> (H, W, 3) uint8: gray is repeated, alpha dropped, CMYK and
    palettes converted. depth: see `Decoding`; UnreadableError where it is needed."""
    if image.mode[0] in "IF":
        return _gray_to_rgb(to_uint8(np.asarray(image), depth))
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))  # which would copy


def _oriented_tiff(data: Bytes, how: Decoding, smallest: int, orientation: int) -> Bytes:
    """The first page of a TIFF, by tifffile: any type, any number of bands."""
    try:
        import tifffile
    except ModuleNotFoundError:
        raise UnreadableError(
            "a TIFF of more than 8 bits or 4 bands: pip install tifffile"
        ) from None
    with tifffile.TiffFile(io.BytesIO(data.tobytes())) as file:
        page = file.pages[0]
        values = page.asarray()  # (H, W), (H, W, B) or (B, H, W)
    if values.ndim == 3 and not page.axes.endswith("S"):
        values = np.moveaxis(values, 0, -1)
    require_size(values.shape[0], values.shape[1], smallest, how.max_pixels)
    if values.ndim == 3:
        values = _three_bands(values, how.bands)
    pixels = to_uint8(values, how.depth)
    return upright(pixels if pixels.ndim == 3 else _gray_to_rgb(pixels), orientation)


def _three_bands(values: NDArray[Any], bands: tuple[int, int, int] | None) -> NDArray[Any]:
    """(H, W, B) -> (H, W, 3); UnreadableError where nothing says which three."""
    count = values.shape[2]
    if bands is None and count <= 4:  # gray, gray and alpha, RGB, RGBA
        return values[..., [0, 0, 0] if count < 3 else [0, 1, 2]]
    if bands is None:
        raise UnreadableError(f"{count} bands: choose three with --bands, such as --bands 4,3,2")
    if max(bands) > count:
        raise UnreadableError(f"{count} bands, and --bands asks for {max(bands)}")
    return values[..., [band - 1 for band in bands]]


def _gray_to_rgb(gray: Bytes) -> Bytes:
    return np.repeat(gray[..., None], 3, axis=-1)


def require_size(height: int, width: int, smallest: int, max_pixels: int = MAX_PIXELS) -> None:
    """UnreadableError for an image too small for its views, or larger than the limit."""
    if min(height, width) < smallest:
        raise UnreadableError(
            f"{width} x {height} pixels: these views need at least {smallest} x {smallest}"
        )
    if height * width > max_pixels:
        raise UnreadableError(
            f"{width} x {height} pixels: more than --max-pixels {max_pixels}; raise it, or shrink "
            "the image"
        )


def center_square(pixels: Bytes, size: int) -> Bytes:
    """(H, W, 3) -> (size, size, 3): the shorter side resized to `size` px with antialias, the
    centre cropped."""
    from PIL import Image, ImageOps

    fitted = ImageOps.fit(Image.fromarray(pixels), (size, size), Image.Resampling.BILINEAR)
    return np.asarray(fitted)


def count_frames(data: Bytes) -> int:
    """Frames of an animation or pages of a stack, of which `decode` takes the first; 1 for one
    image and for a JPEG, whose further pictures are previews."""
    try:
        with open_image(data) as image:
            return 1 if image.format in ("JPEG", "MPO") else getattr(image, "n_frames", 1)
    except Exception:  # Pillow's plug-ins raise any exception on a corrupt file
        return 1
