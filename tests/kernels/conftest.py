"""Which implementations of an op the kernel tests run."""

from contextlib import nullcontext

import pytest

from fastssl_kernels._dispatch import interpreted
from tests.helpers.triton_mode import Context


@pytest.fixture(params=["torch", "triton"])
def path(request: pytest.FixtureRequest, device: str) -> Context:
    """The torch path, then the kernels: on a GPU as they run there, else in the interpreter."""
    if device == "cuda" and request.param == "torch":
        pytest.skip("a GPU runs the kernels; the torch path is for float64")
    return interpreted if device == "cpu" and request.param == "triton" else nullcontext
