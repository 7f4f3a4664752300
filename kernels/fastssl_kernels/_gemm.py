"""Matrix products of blocks, accumulated and returned in float32 (float64 for float64).

On x86 CPUs float32 goes to oneDNN, whose code uses every vector width the processor has; the BLAS
behind torch.mm ran at half its rate on an AVX-512 AMD EPYC (190 against 440 GFLOP/s on two cores).
"""

from functools import cache

import torch
from torch import Tensor


@cache
def _onednn() -> bool:
    """Whether torch was built with oneDNN and still has the operator that its compiler emits."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def matmul_t(a: Tensor, b: Tensor) -> Tensor:
    """a @ b.T. (A, B), (C, B) -> (A, C), float32, or float64 for float64."""
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
