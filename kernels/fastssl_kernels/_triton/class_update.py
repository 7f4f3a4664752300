"""Triton kernel of _class_update.py: a gradient tile with the optimizer's step in its epilogue.

Shapes: N batch, D embedding, K classes, C classes in a block.
"""

# mypy: allow-untyped-defs
# (a Triton kernel's arguments have no Python types)

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastssl_kernels._triton.class_softmax import dot_precision

if TYPE_CHECKING:
    from fastssl_kernels._class_update import OptimizerStep


def tile(x: Tensor) -> dict[str, int]:
    """Tile sides of a gradient tile with the optimizer in its epilogue."""
    if x.dtype == torch.float32:
        sides = {"BLOCK_C": 32, "BLOCK_D": 64, "BLOCK_N": 32}
        return {**sides, "num_warps": 4, "num_stages": 3}
    sides = {"BLOCK_C": 128, "BLOCK_D": 128, "BLOCK_N": 64}
    return {**sides, "num_warps": 8, "num_stages": 3}


@triton.jit
def _update_part(
    g,  # (BLOCK_C, columns) float32, the gradient
    w_ptr,
    m_ptr,
    v_ptr,
    hyper_ptr,
    classes,
    cols,
    stop,
    D,
    a,
    a_rest,
    b,
    b_rest,
    eps,
    ADAMW: tl.constexpr,
):
    """Read, update and write one part of a tile."""
    inside = (classes < stop)[:, None] & (cols < D)[None, :]
    at = classes.to(tl.int64)[:, None] * D + cols[None, :]
    w = tl.load(w_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if ADAMW:
        m = tl.load(m_ptr + at, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(v_ptr + at, mask=inside, other=0.0).to(tl.float32)
        m = a * m + a_rest * g
        v = b * v + b_rest * g * g
        decay, step_size = tl.load(hyper_ptr + 1), tl.load(hyper_ptr + 2)
        w = decay * w - step_size * m / (tl.sqrt(v) * tl.load(hyper_ptr + 3) + eps)
        tl.store(m_ptr + at, m.to(m_ptr.dtype.element_ty), mask=inside)
        tl.store(v_ptr + at, v.to(v_ptr.dtype.element_ty), mask=inside)
    else:
        g += b * w
        if a != 0.0:
            g += a * tl.load(m_ptr + at, mask=inside, other=0.0).to(tl.float32)
            tl.store(m_ptr + at, g.to(m_ptr.dtype.element_ty), mask=inside)
        w -= tl.load(hyper_ptr + 1) * g
    tl.store(w_ptr + at, w.to(w_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _halves(acc):
    """Left and right half of a tile's columns."""
    parts = tl.reshape(acc, (acc.shape[0], 2, acc.shape[1] // 2))
    return tl.split(tl.permute(parts, (0, 2, 1)))


@triton.jit
def _update_kernel(
    g_ptr,  # (N, stride), this block's
    x_ptr,  # (N, D)
    w_ptr,  # (K, D), as are m and v
    m_ptr,
    v_ptr,
    hyper_ptr,  # (4,) float32: healthy; AdamW: 1 - lr decay, lr / bias1, 1 / sqrt(bias2); SGD: lr
    unscale_ptr,  # () float32
    first,
    stop,
    N,
    D,
    stride,
    a,  # AdamW: beta1; SGD: momentum
    a_rest,  # 1 - a, which float32 cannot form from a
    b,  # AdamW: beta2; SGD: weight decay
    b_rest,  # 1 - b
    eps,
    ADAMW: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    column_tiles = tl.cdiv(D, BLOCK_D)
    local = (tl.program_id(0) // column_tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
    left = (tl.program_id(0) % column_tiles) * BLOCK_D
    cols = left + tl.arange(0, BLOCK_D)
    acc = tl.zeros((BLOCK_C, BLOCK_D), tl.float32)
    for start in range(0, N, BLOCK_N):
        rows = (start + tl.arange(0, BLOCK_N)).to(tl.int64)
        g_mask = (local < stop - first)[:, None] & (rows < N)[None, :]
        g = tl.load(g_ptr + rows[None, :] * stride + local[:, None], mask=g_mask, other=0.0)
        x_mask = (rows < N)[:, None] & (cols < D)[None, :]
        x = tl.load(x_ptr + rows[:, None] * D + cols[None, :], mask=x_mask, other=0.0)
        acc = tl.dot(g, x, acc, input_precision=PRECISION)
    acc = acc * tl.load(unscale_ptr)
    classes = first + local
    stop = tl.where(tl.load(hyper_ptr) > 0.5, stop, first)  # nothing, if the step is to be skipped
    Q: tl.constexpr = BLOCK_D // 4  # a quarter of the tile at a time: whole, the moments spill
    quarter = left + tl.arange(0, Q)
    rule = (a, a_rest, b, b_rest, eps)
    one, two = _halves(acc)
    g0, g1 = _halves(one)
    g2, g3 = _halves(two)
    _update_part(g0, w_ptr, m_ptr, v_ptr, hyper_ptr, classes, quarter, stop, D, *rule, ADAMW)
    quarter += Q
    _update_part(g1, w_ptr, m_ptr, v_ptr, hyper_ptr, classes, quarter, stop, D, *rule, ADAMW)
    quarter += Q
    _update_part(g2, w_ptr, m_ptr, v_ptr, hyper_ptr, classes, quarter, stop, D, *rule, ADAMW)
    quarter += Q
    _update_part(g3, w_ptr, m_ptr, v_ptr, hyper_ptr, classes, quarter, stop, D, *rule, ADAMW)


def update_block(
    g: Tensor,
    x: Tensor,
    parts: tuple[Tensor, ...],
    unscale: Tensor,
    start: int,
    stop: int,
    opt: "OptimizerStep",
) -> None:
    """Updates w, m, v = parts in [start, stop) in place with the gradient unscale * g.T @ x."""
    config = tile(x)
    programs = triton.cdiv(stop - start, config["BLOCK_C"])
    programs *= triton.cdiv(x.shape[1], config["BLOCK_D"])
    b = opt.second if opt.rule == "adamw" else opt.weight_decay
    _update_kernel[(programs,)](
        g,
        x,
        *parts,
        opt.hyper,
        unscale,
        start,
        stop,
        len(x),
        x.shape[1],
        g.stride(0),
        opt.first,
        1 - opt.first,
        b,
        1 - b,
        opt.eps,
        ADAMW=opt.rule == "adamw",
        PRECISION=dot_precision(),
        **config,
    )
