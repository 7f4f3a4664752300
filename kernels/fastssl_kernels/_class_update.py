"""The optimizer step of a class weight inside the backward of its softmax: dW is never allocated.

Each block of classes gets its gradient G^T x and its update in one pass, equal to
torch.optim.AdamW (decoupled decay, bias correction) or torch.optim.SGD (momentum, coupled decay) on
the dense gradient: on CUDA a tile product with the optimizer in its epilogue, elsewhere a product
that stays in cache and torch's own fused step on the block. A step whose incoming gradient is not
finite changes nothing. Classes that were not sampled have the gradient 0: they still decay, and
still move by their momentum. If they were skipped, a class would move in bursts, and the second
moment of a class sampled in a share r of the steps would be 1 / r of the dense one. A bias takes
the same step, all of it at the end: it is one number for each class.

Shapes: N batch, D embedding, K classes, C classes in a block, S sampled classes.
"""

# mypy: allow-untyped-defs
# (autograd callbacks carry no types)

from typing import NamedTuple

import torch
from torch import Tensor

from fastssl_kernels._class_softmax import (
    SavedForBackward,
    Statistics,
    block_classes,
    blocks,
    class_statistics,
    gradient_blocks,
    zeros_for_none,
)
from fastssl_kernels._dispatch import matmul_t, use_triton
from fastssl_kernels._precision import accumulation_dtype
from fastssl_kernels._triton import class_update as kernels

STALE = (
    "DIETHead: the weight was updated after this forward, so this backward would see other "
    "logits than the forward. A head with a fused optimizer takes one backward() for each forward; "
    "losses of several forwards in one backward, and gradient accumulation, need "
    "DIETHead(optimizer=None) and an optimizer of your own"
)


class OptimizerStep(NamedTuple):
    """One optimizer step: the rule and its numbers, and tensors that only the device can read."""

    rule: str  # "adamw" | "sgd"
    first: float  # AdamW: beta1; SGD: momentum
    second: float  # AdamW: beta2
    eps: float
    weight_decay: float
    number: Tensor  # () float32, counted from 1, as torch's fused optimizers take it
    lr: Tensor  # () float64
    skip: Tensor  # () float32, 1 to change nothing
    numbers: Tensor  # (4,) float64: healthy; AdamW: decay, lr / bias1, 1 / sqrt(bias2); SGD: lr
    hyper: Tensor  # those in float32, which the kernel reads


def _update_block(
    g: Tensor,
    x: Tensor,
    parts: tuple[Tensor, ...],
    unscale: Tensor,
    start: int,
    stop: int,
    opt: OptimizerStep,
) -> None:
    """kernels.update_block with torch's fused optimizers; g was not scaled."""
    w, m, v = ([part[start:stop]] if len(part) else [] for part in parts)
    dw = matmul_t(g.T, x.T).to(w[0].dtype) if len(x) else torch.zeros_like(w[0])  # (C, D)
    if opt.rule == "adamw":
        torch._fused_adamw_(
            w,
            [dw],
            m,
            v,
            [],
            [opt.number],
            lr=opt.lr,
            beta1=opt.first,
            beta2=opt.second,
            weight_decay=opt.weight_decay,
            eps=opt.eps,
            amsgrad=False,
            maximize=False,
            found_inf=opt.skip,
        )
    else:
        torch._fused_sgd_(
            w,
            [dw],
            m,
            lr=opt.lr,
            momentum=opt.first,
            weight_decay=opt.weight_decay,
            dampening=0.0,
            nesterov=False,
            maximize=False,
            is_first_step=False,  # the buffer starts at zero, with the same result
            found_inf=opt.skip,
        )


def _update_bias(g: Tensor, parts: tuple[Tensor, ...], opt: OptimizerStep) -> None:
    """`_update_block` of a bias and its moments (K,), or moments (0,), from its gradient (K,)."""
    b, m, v = parts
    old, first, second = b.to(g.dtype), opt.first, opt.second
    healthy, one, two, three = opt.numbers.to(g.dtype).unbind()
    if opt.rule == "adamw":
        first_moment = first * m + (1 - first) * g
        second_moment = second * v + (1 - second) * g * g
        new = one * old - two * first_moment / (second_moment.sqrt() * three + opt.eps)
        updates = [(b, new), (m, first_moment), (v, second_moment)]
    else:
        g = g + opt.weight_decay * old
        if len(m):
            g = g + first * m
        updates = [(b, old - one * g), *([(m, g)] if len(m) else [])]
    for part, value in updates:
        part.copy_(value.to(part.dtype).where(healthy > 0, part))


def _optimizer_step(
    healthy: Tensor,
    step: Tensor,
    lr: Tensor,
    rule: str,
    first: float,
    second: float,
    eps: float,
    weight_decay: float,
) -> OptimizerStep:
    """The step, its numbers formed in float64 without a host sync."""
    rate, t = lr.double(), step.double()
    if rule == "sgd":
        numbers = [healthy.double(), rate, rate, rate]
    else:
        root = (1 - second**t).rsqrt()
        numbers = [healthy.double(), 1 - rate * weight_decay, rate / (1 - first**t), root]
    skip, stacked = healthy.logical_not().float(), torch.stack(numbers)
    settings = (rule, first, second, eps, weight_decay, step.float(), lr)
    return OptimizerStep(*settings, skip, stacked, stacked.float())


MUTATED = ("w", "m", "v", "step", "b", "b_m", "b_v")


@torch.library.custom_op("fastssl::class_update", mutates_args=MUTATED)
def class_update(
    g_lse: Tensor,
    g_target: Tensor,
    g_sum: Tensor,
    x: Tensor,
    copy: Tensor | None,
    labels: Tensor,
    lse: Tensor,
    target: Tensor,
    lse_lo: Tensor,
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
    b: Tensor | None = None,
    b_m: Tensor | None = None,
    b_v: Tensor | None = None,
) -> Tensor:
    """Updates w, m, v (K, D), the bias b, b_m, b_v (K,) and step () in place; returns dx (N, D).

    copy: what the forward multiplied by, where that was not w: another dtype, or w[rows].
    rows: (S,) the sampled classes, in whose order `copy` and `labels` count; None for all.
    """
    if not len(x):
        return torch.empty_like(x)  # the mean loss of no rows is NaN: nothing is updated
    x, labels = x.contiguous(), labels.contiguous()
    weight, bias = w if copy is None else copy, _rows_of(b, rows)
    s = SavedForBackward(x, weight, bias, labels, lse, target, lse_lo, exponentials, references)
    db = None if bias is None else torch.empty_like(bias, dtype=accumulation_dtype(x))
    dx = torch.zeros_like(x, dtype=accumulation_dtype(x))
    healthy = g_lse.isfinite().all()
    step += healthy
    opt = _optimizer_step(healthy, step, lr, rule, first, second, eps, weight_decay)
    state: tuple[Tensor, ...] = (w, m, v)
    parts = state
    if rows is not None:
        parts = tuple(t.index_select(0, rows) if len(t) else t for t in state)
    update_block = kernels.update_block if use_triton(x) else _update_block
    with torch.autocast(x.device.type, enabled=False):
        for start, stop, g, unscale in gradient_blocks(s, g_lse, g_target, g_sum, dx):
            update_block(g, x, parts, unscale, start, stop, opt)
            if db is not None:
                db[start:stop] = g.sum(0, dtype=db.dtype) * unscale
        if rows is not None:
            # all classes step with the gradient 0, of no rows; then the sampled ones are written
            for _, start, stop in blocks(len(w), block_classes(x)):
                no_rows = x.new_empty(0, stop - start)
                update_block(no_rows, x[:0], state, torch.ones_like(opt.skip), start, stop, opt)
            for t, part in zip(state, parts, strict=True):
                if len(t):
                    t.index_copy_(0, rows, part)
        if db is not None:
            assert b is not None and b_m is not None and b_v is not None
            if rows is not None:
                db = torch.zeros_like(b, dtype=db.dtype).index_copy_(0, rows, db)
            _update_bias(db, (b, b_m, b_v), opt)
    return dx.to(x.dtype)


def _rows_of(bias: Tensor | None, rows: Tensor | None) -> Tensor | None:
    """The bias of the sampled classes."""
    return bias if bias is None or rows is None else bias.index_select(0, rows)


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
    b: Tensor | None = None,
    b_m: Tensor | None = None,
    b_v: Tensor | None = None,
) -> Statistics:
    """class_statistics(x, copy or w, b) whose backward is class_update: w and b change there."""
    return class_statistics(x, w if copy is None else copy, _rows_of(b, rows), labels, save)


@class_statistics_updating.register_fake
def _(x, copy, labels, save, rows, w, *_):
    return class_statistics(x, w if copy is None else copy, None, labels, save)


def _setup_context(ctx, inputs, output) -> None:
    x, copy, labels, _, rows, w, m, v, step, lr, *ctx.rule, b, b_m, b_v = inputs
    lse, target, _, lse_lo, exponentials, references = output
    ctx.mark_non_differentiable(lse_lo, exponentials, references)
    ctx.set_materialize_grads(False)
    results = (lse, target, lse_lo, exponentials, references)
    ctx.save_for_backward(x, copy, labels, *results, rows, w, m, v, step, lr, b, b_m, b_v)


def _backward(ctx, g_lse, g_target, g_sum, *_):
    try:
        saved = ctx.saved_tensors
    except RuntimeError as error:
        if "inplace" not in str(error):
            raise
        raise ValueError(STALE) from error
    grads = zeros_for_none((g_lse, g_target, g_sum), saved[3])
    *state, b, b_m, b_v = saved
    dx = class_update(*grads, *state, *ctx.rule, b, b_m, b_v)
    return dx, *[None] * 17


class_statistics_updating.register_autograd(_backward, setup_context=_setup_context)
