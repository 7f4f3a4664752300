"""When to run Triton, and on which kind of device.

Triton kernels run on CUDA tensors. On a CPU they run only when asked, in Triton's interpreter:
tests set TRITON_INTERPRET=1 before the first import and enter `interpreted()`. Everything else
takes the lean torch path.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

_INTERPRETED: ContextVar[bool] = ContextVar("fastssl_interpreted", default=False)


@contextmanager
def interpreted() -> Iterator[None]:
    """Run the Triton kernels on CPU tensors too, in the interpreter (fp32 and fp16 only)."""
    assert os.environ.get("TRITON_INTERPRET") == "1", (
        "set TRITON_INTERPRET=1 before the first import"
    )
    token = _INTERPRETED.set(True)
    try:
        yield
    finally:
        _INTERPRETED.reset(token)


def use_triton(x: Tensor) -> bool:
    """Whether an op on `x` runs its Triton kernels. fp64 always runs in torch, being exact."""
    return x.dtype != torch.float64 and (x.is_cuda or _INTERPRETED.get())


def architecture(x: Tensor) -> int:
    """Compute capability of x's device as 80, 90, 100; 90 in the interpreter."""
    if not x.is_cuda:
        return 90
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor
