"""Which implementation runs on which device: Triton or torch, and which matrix product.

Triton kernels run on CUDA tensors. On a CPU they run only when asked, in Triton's interpreter:
tests set TRITON_INTERPRET=1 before the first import and enter `interpreted()`. Everything else
takes the memory-lean torch path.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

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


@cache
def _onednn() -> bool:
    """Whether torch was built with oneDNN and still has the operator that its compiler emits."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def matmul_t(a: Tensor, b: Tensor) -> Tensor:
    """a @ b.T, accumulated and returned in float32, float64 for float64. (A, B), (C, B) -> (A, C)

    On x86 CPUs float32 goes to oneDNN, which uses every vector width of the processor: on an
    AVX-512 AMD EPYC, two cores, 440 GFLOP/s against 190 of the BLAS behind torch.mm.
    """
    if a.dtype == torch.float64:
        return a @ b.T
    if not a.is_cuda:
        a, b = a.float(), b.float()
        if _onednn():
            return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
        return a @ b.T
    if a.dtype == torch.float32:
        return a @ b.T
    return torch.mm(a, b.T, out_dtype=torch.float32)  # low-precision inputs, float32 result
