"""Run the Triton kernels: on a GPU where there is one, else interpreted, in poisoned memory."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from fastssl_kernels._dispatch import interpreted

Context = Callable[[], AbstractContextManager[None]]

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS wants it


def dtypes(device: str) -> list[torch.dtype]:
    """What the kernels are tested in: the interpreter multiplies bf16 wrongly before Triton 3.9."""
    return [torch.float32, torch.bfloat16 if device == "cuda" else torch.float16]


@contextmanager
def fused(device: str) -> Iterator[None]:
    """Ops on `device` run their kernels, and what `torch.empty` returns is NaN."""
    torch.use_deterministic_algorithms(True)  # which fills uninitialised memory
    try:
        with interpreted() if device == "cpu" else nullcontext():
            yield
    finally:
        torch.use_deterministic_algorithms(False)
