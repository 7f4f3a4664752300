"""The optimizer step of a class weight inside the backward of its softmax: dW is never allocated.

Each block of classes gets its gradient G^T x and its update in one pass, equal to
torch.optim.AdamW (decoupled decay, bias correction) or torch.optim.SGD (momentum, coupled decay) on
the dense gradient: on CUDA a tile product with the optimizer in its epilogue, elsewhere a product
that stays in cache and torch's own fused step on the block. A step whose incoming gradient is not
finite changes nothing. Classes that were not sampled have the gradient 0: they still decay, and
still move by their momentum. Were they left as they are, a class's step would come in bursts, and
the second moment of one that is sampled in a share r of the steps would be 1 / r of the dense one.

Shapes: N batch, D embedding, K classes, C classes in a block, S sampled classes.
"""

# mypy: allow-untyped-defs
# (Triton kernels and autograd callbacks carry no types.)

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastssl_kernels._class_softmax import (
    Saved,
    Statistics,
    block_classes,
    blocks,
    class_statistics,
    gradient_blocks,
    or_zeros,
    work_dtype,
)
from fastssl_kernels._dispatch import use_triton
from fastssl_kernels._gemm import matmul_t
from fastssl_kernels._triton.class_softmax import dot_precision

STALE = (
    "DIETHead: the weight was updated after this forward, so this backward would meet other logits "
    "than the forward saw. A head with a fused optimizer takes one backward() for each forward; "
    "losses of several forwards in one backward, and gradient accumulation, need "
    "DIETHead(optimizer=None) and an optimizer of your own"
)


def update_tile(x: Tensor) -> dict[str, int]:
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
    w_ptr,  # (K, D), and so m and v
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


class _Step(NamedTuple):
    """One optimizer step: the rule's name and numbers, and what is known on the device only."""

    rule: str  # "adamw" | "sgd"
    first: float  # AdamW: beta1; SGD: momentum
    second: float  # AdamW: beta2
    eps: float
    weight_decay: float
    number: Tensor  # (), counted from 1
    lr: Tensor  # () float64
    skip: Tensor  # () float32, 1 to change nothing
    hyper: Tensor  # (4,) float32, what the kernel reads


def _update(
    g: Tensor,
    x: Tensor,
    parts: tuple[Tensor, ...],
    unscale: Tensor,
    start: int,
    stop: int,
    by: _Step,
) -> None:
    """Updates w, m, v = parts in [start, stop) in place with the gradient unscale * g.T @ x."""
    (_triton_update if use_triton(x) else _torch_update)(g, x, parts, unscale, start, stop, by)


def _triton_update(
    g: Tensor,
    x: Tensor,
    parts: tuple[Tensor, ...],
    unscale: Tensor,
    start: int,
    stop: int,
    by: _Step,
) -> None:
    config = update_tile(x)
    programs = triton.cdiv(stop - start, config["BLOCK_C"])
    programs *= triton.cdiv(x.shape[1], config["BLOCK_D"])
    b = by.second if by.rule == "adamw" else by.weight_decay
    _update_kernel[(programs,)](
        g,
        x,
        *parts,
        by.hyper,
        unscale,
        start,
        stop,
        len(x),
        x.shape[1],
        g.stride(0),
        by.first,
        1 - by.first,
        b,
        1 - b,
        by.eps,
        ADAMW=by.rule == "adamw",
        PRECISION=dot_precision(x),
        **config,
    )


def _torch_update(
    g: Tensor,
    x: Tensor,
    parts: tuple[Tensor, ...],
    unscale: Tensor,
    start: int,
    stop: int,
    by: _Step,
) -> None:
    """With torch's fused optimizers; g was not scaled."""
    w, m, v = ([part[start:stop]] if len(part) else [] for part in parts)
    dw = matmul_t(g.T, x.T).to(w[0].dtype) if len(x) else torch.zeros_like(w[0])  # (C, D)
    if by.rule == "adamw":
        torch._fused_adamw_(
            w,
            [dw],
            m,
            v,
            [],
            [by.number],
            lr=by.lr,
            beta1=by.first,
            beta2=by.second,
            weight_decay=by.weight_decay,
            eps=by.eps,
            amsgrad=False,
            maximize=False,
            found_inf=by.skip,
        )
    else:
        torch._fused_sgd_(
            w,
            [dw],
            m,
            lr=by.lr,
            momentum=by.first,
            weight_decay=by.weight_decay,
            dampening=0.0,
            nesterov=False,
            maximize=False,
            is_first_step=False,  # the buffer starts at zero, which comes to the same
            found_inf=by.skip,
        )


def _update_others(x: Tensor, whole: tuple[Tensor, ...], by: _Step) -> None:
    """A step with the gradient 0, for all classes: the sampled ones' is written over it."""
    for _, start, stop in blocks(len(whole[0]), block_classes(x)):
        nothing = x.new_empty(0, stop - start)  # the gradient from no rows
        _update(nothing, x[:0], whole, torch.ones_like(by.skip), start, stop, by)


def _step(
    healthy: Tensor,
    number: Tensor,
    lr: Tensor,
    rule: str,
    first: float,
    second: float,
    eps: float,
    weight_decay: float,
) -> _Step:
    """The step, its numbers formed in float64 without a host sync."""
    rate, t = lr.double(), number.double()
    if rule == "sgd":
        numbers = [healthy.double(), rate, rate, rate]
    else:
        root = (1 - second**t).rsqrt()
        numbers = [healthy.double(), 1 - rate * weight_decay, rate / (1 - first**t), root]
    skip, hyper = healthy.logical_not().float(), torch.stack(numbers).float()
    return _Step(rule, first, second, eps, weight_decay, number, lr, skip, hyper)


@torch.library.custom_op("fastssl::class_update", mutates_args=("w", "m", "v", "step"))
def class_update(
    g_lse: Tensor,
    g_target: Tensor,
    g_sum: Tensor,
    x: Tensor,
    copy: Tensor | None,
    labels: Tensor,
    lse: Tensor,
    target: Tensor,
    low: Tensor,
    exponentials: Tensor,
    references: Tensor,
    rows: Tensor | None,
    w: Tensor,
    m: Tensor,
    v: Tensor,
    step: Tensor,
    lr: Tensor,
    rule: str,
    first: float,
    second: float,
    eps: float,
    weight_decay: float,
) -> Tensor:
    """Updates w, m, v (K, D) and step () in place and returns dx (N, D).

    copy: what the forward multiplied by, where that was not w: another dtype, or w[rows].
    rows: (S,) the sampled classes, in whose order `copy` and `labels` count; None for all.
    """
    x, labels = x.contiguous(), labels.contiguous()
    weight = w if copy is None else copy
    s = Saved(x, weight, None, labels, lse, target, low, exponentials, references)
    dx = torch.zeros_like(x, dtype=work_dtype(x))
    healthy = g_lse.isfinite().all()
    step += healthy
    by = _step(healthy, step, lr, rule, first, second, eps, weight_decay)
    whole: tuple[Tensor, ...] = (w, m, v)
    parts = whole
    if rows is not None:
        parts = tuple(t.index_select(0, rows) if len(t) else t for t in whole)
    with torch.autocast(x.device.type, enabled=False):
        for start, stop, g, unscale in gradient_blocks(s, g_lse, g_target, g_sum, dx):
            _update(g, x, parts, unscale, start, stop, by)
        if rows is not None:
            _update_others(x, whole, by)
            for t, part in zip(whole, parts, strict=True):
                if len(t):
                    t.index_copy_(0, rows, part)
    return dx.to(x.dtype)


@class_update.register_fake
def _(g_lse, g_target, g_sum, x, *_):
    return torch.empty_like(x)


@torch.library.custom_op("fastssl::class_statistics_updating", mutates_args=())
def class_statistics_updating(
    x: Tensor,
    copy: Tensor | None,
    labels: Tensor,
    save: bool,
    rows: Tensor | None,
    w: Tensor,
    m: Tensor,
    v: Tensor,
    step: Tensor,
    lr: Tensor,
    rule: str,
    first: float,
    second: float,
    eps: float,
    weight_decay: float,
) -> Statistics:
    """class_statistics(x, copy or w) whose backward is class_update: w is updated there."""
    return class_statistics(x, w if copy is None else copy, None, labels, save)


@class_statistics_updating.register_fake
def _(x, copy, labels, save, rows, w, *_):
    return class_statistics(x, w if copy is None else copy, None, labels, save)


def _setup_context(ctx, inputs, output) -> None:
    x, copy, labels, _, rows, w, m, v, step, lr, *ctx.rule = inputs
    lse, target, _, low, exponentials, references = output
    ctx.mark_non_differentiable(low, exponentials, references)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        *(x, copy, labels, lse, target, low, exponentials, references),
        *(rows, w, m, v, step, lr),
    )


def _backward(ctx, g_lse, g_target, g_sum, *_):
    try:
        saved = ctx.saved_tensors
    except RuntimeError as error:
        if "inplace" not in str(error):
            raise
        raise ValueError(STALE) from error
    grads = or_zeros((g_lse, g_target, g_sum), saved[3])
    dx = class_update(*grads, *saved, *ctx.rule)
    return dx, *[None] * 14


class_statistics_updating.register_autograd(_backward, setup_context=_setup_context)
