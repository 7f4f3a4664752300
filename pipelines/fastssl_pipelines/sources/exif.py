"""The EXIF orientation of an image, read and applied in one way by every engine.

Shapes: H and W pixels as stored.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastssl_pipelines.sources.pillow import open_image

ORIENTATION = 0x0112  # the EXIF tag
# orientation: (transposed, rows reversed, columns reversed), applied in this order
TURNS = {
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}


def exif_orientation(data: NDArray[np.uint8]) -> int:
    """1 (upright) to 8, as EXIF counts; 1 where no such tag can be read.

    Read by Pillow from EXIF or XMP, in any integer type: cameras write SHORT, some tools BYTE or
    LONG.
    """
    try:
        with open_image(data) as image:
            return orientation_of(image)
    except Exception:  # Pillow's plug-ins raise any exception on a corrupt file
        return 1


def orientation_of(image: Any) -> int:
    """The orientation of an image that Pillow has opened."""
    try:
        value = image.getexif().get(ORIENTATION, 1)
    except Exception:  # a damaged EXIF block does not make the pixels unreadable
        return 1
    if isinstance(value, bytes):  # of type BYTE
        value = int.from_bytes(value[:1])
    return value if value in TURNS else 1


def upright(pixels: Any, orientation: int) -> Any:
    """`pixels` (H, W, 3), an array or a tensor, turned as `orientation` says; contiguous."""
    if orientation not in TURNS:
        return pixels
    transposed, rows, columns = TURNS[orientation]
    turned = pixels.swapaxes(0, 1) if transposed else pixels
    axes = tuple(axis for axis, is_reversed in enumerate((rows, columns)) if is_reversed)
    if isinstance(turned, np.ndarray):
        return np.ascontiguousarray(np.flip(turned, axes))
    return turned.flip(axes).contiguous()
