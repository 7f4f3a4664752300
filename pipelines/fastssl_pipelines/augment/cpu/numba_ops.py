"""`rng.py`, `sample_params.py` and `pixel_ops.py` compiled by numba, for one view or one pixel."""

# mypy: disable-error-code="no-untyped-def"
# ^ numba infers the types of what it compiles

from types import SimpleNamespace
from typing import Any

import numba
import numpy as np

from fastssl_pipelines import rng
from fastssl_pipelines.augment import pixel_ops, sample_params
from fastssl_pipelines.augment.retarget import retarget

RELAXED = {"contract", "reassoc", "arcp", "nsz", "nnan", "ninf"}  # so that loops vectorise

ZERO, HALF, ONE, TWO = (np.float32(x) for x in (0, 0.5, 1, 2))

exact = numba.njit(nogil=True, error_model="numpy")
fast = numba.njit(nogil=True, error_model="numpy", fastmath=RELAXED, forceinline=True)


@exact
def _put(row, column, value):
    row[column] = value


def _single(number: float) -> Any:
    """Floats as float32: with a Python float numba would compute in fp64."""
    return np.float32(number) if isinstance(number, float) else number


_SAMPLING = {
    "number": exact(lambda numbers, which: numbers[which]),
    "put": _put,
    "real": exact(lambda word: np.float64(word)),
    "indicator": exact(lambda condition: 1.0 if condition else 0.0),
    "any_true": exact(lambda condition: condition),
    "sqrt": exact(lambda x: np.sqrt(x)),
    "floor": exact(lambda x: np.floor(x)),
    "where": exact(lambda condition, x, y: x if condition else y),
}
_PIXEL_OPS = {
    "get": fast(lambda row, column: row[column]),
    "where": fast(lambda condition, x, y: x if condition else y),
}
of_views = SimpleNamespace(**retarget([rng, sample_params], _SAMPLING, exact, lambda x: x))
of_pixels = SimpleNamespace(**retarget([pixel_ops], _PIXEL_OPS, fast, _single))
