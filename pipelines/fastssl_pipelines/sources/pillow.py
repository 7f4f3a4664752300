"""Opening encoded bytes with Pillow, without its warnings and log lines."""

import io
import logging
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_PIXELS = 178_956_970  # of one image; above it Pillow suspects a decompression bomb


def open_image(data: NDArray[np.uint8], max_pixels: int = MAX_PIXELS) -> Any:
    """An image whose pixels are not decoded yet. Raises what Pillow raises.

    Pillow's limit of pixels is raised to `max_pixels`, above which the callers refuse an image
    themselves; its log of TIFFs that it cannot read is silenced, since tifffile reads these.
    """
    from PIL import Image

    if Image.MAX_IMAGE_PIXELS is not None and Image.MAX_IMAGE_PIXELS < max_pixels:
        Image.MAX_IMAGE_PIXELS = max_pixels
    logging.getLogger("PIL.TiffImagePlugin").setLevel(logging.CRITICAL)
    return Image.open(io.BytesIO(data.data))
