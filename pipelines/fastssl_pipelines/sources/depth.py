"""Values of more than 8 bits as 8 bits, by a stated rule or not at all."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastssl_pipelines.sources.unreadable import UnreadableError

Bytes = NDArray[np.uint8]

DEPTH_HELP = "--depth type (the range of the type), data (of each image) or LOW:HIGH"


def parse_range(text: str) -> tuple[float, float]:
    """(low, high) of "LOW:HIGH"; ValueError for anything else."""
    try:
        low, high = (float(part) for part in text.split(":"))
    except ValueError:
        low = high = float("nan")
    if not low < high:
        raise ValueError(f"depth is {text!r}: choose type, data or LOW:HIGH, such as 0:4095")
    return low, high


def to_uint8(values: NDArray[Any], depth: str) -> Bytes:
    """Values of any type in 8 bits, see `Decoding.depth`; UnreadableError where it is not given and
    the range is ambiguous, and for NaN and infinity."""
    if values.dtype == np.uint8 and not depth:
        return values
    if values.dtype == bool:
        return values.astype(np.uint8) * 255
    low, high = values.min(), values.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        raise UnreadableError("it holds NaN or infinity")
    if not depth and not _uses_type_range(values.dtype, low, high):
        raise UnreadableError(
            f"{values.dtype} values from {low:g} to {high:g} have no one 8-bit range: choose "
            + DEPTH_HELP
        )
    if depth in ("", "type"):
        return _by_type(values)
    if depth != "data":
        low, high = parse_range(depth)
    scale = 255 / (float(high) - float(low) or 1.0)
    scaled = (values.astype(np.float64) - float(low)) * scale
    return np.rint(scaled).clip(0, 255).astype(np.uint8)


def _uses_type_range(dtype: np.dtype[Any], low: Any, high: Any) -> bool:
    if np.issubdtype(dtype, np.floating):
        return bool(low >= 0 and high <= 1)
    return bool(np.issubdtype(dtype, np.unsignedinteger) and high > np.iinfo(dtype).max // 2)


def _by_type(values: NDArray[Any]) -> Bytes:
    """The high byte of integers, counted from the lowest of their type; floats times 255."""
    if np.issubdtype(values.dtype, np.floating):
        return np.rint(values.clip(0, 1) * 255).astype(np.uint8)
    info = np.iinfo(values.dtype)
    return ((values.astype(np.int64) - info.min) >> (info.bits - 8)).astype(np.uint8)
