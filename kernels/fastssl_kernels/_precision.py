"""Accumulation dtypes, compensated sums, and scales for float16.

A log-sum-exp is kept as two floats, lse + lse_lo: the rounded value and its rounding error, so that
lse - target stays accurate where the loss is far smaller than lse.

Shapes: any.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from fastssl_kernels._dispatch import use_triton


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """What sums over x and results are kept in: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def without_autocast(x: Tensor) -> AbstractContextManager[None]:
    """A context in which operations on x's device compute in the dtypes of their inputs."""
    device = x.device.type
    if not torch.amp.is_autocast_available(device):  # meta
        return nullcontext()
    return torch.autocast(device, enabled=False)


def operand_dtype(z: Tensor, *, standardized: bool) -> torch.dtype:
    """What matrix products of embeddings read: the accumulation dtype, or in Triton z's own.

    Not float16 unless the columns are standardized: x x^T could overflow.
    """
    if not use_triton(z) or (z.dtype == torch.float16 and not standardized):
        return accumulation_dtype(z)
    return z.dtype


def two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """a + b rounded, and its rounding error (Knuth); 0 where the sum is infinite."""
    total = a + b
    part = total - a
    return total, ((a - (total - part)) + (b - part)).nan_to_num(0.0, 0.0, 0.0)


def log_sum(maxima: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    """log sum_b sums_b exp(maxima_b) as (lse, lse_lo). (B, N), (B, N) -> (N,), (N,)"""
    top = maxima.amax(0)
    log = (sums * (maxima - top).exp()).sum(0).log()
    return two_sum(top, log)


def power_of_two_scale(bound: Tensor, exponent: int) -> Tensor:
    """The power of two that brings `bound` () near 2^exponent, for gradients in float16."""
    return torch.exp2(torch.floor(exponent - torch.log2(bound.clamp(min=1e-30))))
