"""Run the Triton kernels: on a GPU where there is one, else interpreted, in poisoned memory."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

from fastssl_kernels._dispatch import interpreted

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS wants it


@contextmanager
def fused(device: str) -> Iterator[None]:
    """Ops on `device` run their kernels, and what `torch.empty` returns is NaN."""
    torch.use_deterministic_algorithms(True)  # which fills uninitialised memory
    try:
        with interpreted() if device == "cpu" else nullcontext():
            yield
    finally:
        torch.use_deterministic_algorithms(False)
