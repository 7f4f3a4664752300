"""Statistics of a softmax over very many classes: three numbers per row, and their gradient.

    z = x w^T + b,   lse_i = log sum_k exp z_ik,   target_i = z_{i, y_i},   sum_i = sum_k v_k z_ik
    G_ik = dL/dz_ik = g_lse_i exp(z_ik - lse_i) + v_k g_sum_i                       for k != y_i
    G_iy = g_lse_i expm1(z_iy - lse_i) + (g_lse_i + g_target_i) + v_y g_sum_i
    dx = G w,   dw = G^T x,   db = sum_i G_i

v are class weights, 1 unless given, and a class of weight 0 is not in the sum, though its logit be
-inf. With a soft cap s, z = s tanh((x w^T + b) / s) and G is multiplied by 1 - (z / s)^2.

Any cross-entropy whose target mixes one class with the uniform distribution is a combination of
these three (linear_cross_entropy.py), and they combine over shards of the classes. G is formed in
float32, smoothing included, before anything is rounded: with e = 0.8 and a million classes the
gradient is p - e / K almost everywhere. The label's entry is computed separately: p - 1 would
cancel where p is near 1. For the same reason lse is kept as two floats (_precision.py):
(lse - target) + lse_lo is accurate even where the loss of a row is 1e-6. Logits exist one block of
classes at a time.

A batch of no rows has statistics of no rows, and the gradient 0.

Shapes: N batch, D embedding, K classes, C classes in a block.
"""

# mypy: allow-untyped-defs
# (autograd callbacks carry no types)

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastssl_kernels._dispatch import matmul_t, use_triton
from fastssl_kernels._precision import accumulation_dtype, log_sum, power_of_two_scale
from fastssl_kernels._triton import class_softmax as kernels

Statistics = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class SavedForBackward(NamedTuple):
    """Inputs and results of the forward that its backward reads."""

    x: Tensor  # (N, D)
    w: Tensor  # (K, D)
    bias: Tensor | None  # (K,)
    labels: Tensor  # (N,) int64; outside [0, K) where the class is another rank's
    lse: Tensor  # (N,), as are target and lse_lo
    target: Tensor
    lse_lo: Tensor
    exponentials: Tensor  # (ceil(K / C), N, C), exp(z - reference), or empty: recompute
    references: Tensor  # (blocks or tiles, N)
    class_weight: Tensor | None = None  # (K,) in the accumulation dtype
    softcap: float = 0.0  # 0 for none


def block_classes(x: Tensor) -> int:
    """C: a block fits a cache, and its matrix products still run at full rate."""
    if use_triton(x):
        return kernels.block_classes(len(x))
    return max(
        512, min(4096, 2**18 // max(1, len(x)))
    )  # 1 MiB of logits; flat from 512 to 4096, N = 256


def blocks(classes: int, size: int) -> Iterator[tuple[int, int, int]]:
    """(number, start, stop) of each block."""
    for number, start in enumerate(range(0, classes, size)):
        yield number, start, min(start + size, classes)


def _saved_like(x: Tensor, classes: int, save: bool) -> tuple[Tensor, Tensor]:
    """Empty exponentials and references, or tensors of no elements."""
    if use_triton(x):
        return kernels.saved_like(x, classes, save)
    size, dtype = min(block_classes(x), classes), accumulation_dtype(x)
    count = -(-classes // size) if save else 0
    return x.new_empty(count, len(x), size, dtype=dtype), x.new_empty(count, len(x), dtype=dtype)


def _logits(
    x: Tensor, w: Tensor, bias: Tensor | None, start: int, stop: int, softcap: float
) -> Tensor:
    z = matmul_t(x, w[start:stop])  # (N, C)
    if bias is not None:
        z.add_(bias[start:stop])
    return z.div_(softcap).tanh_().mul_(softcap) if softcap else z


def _label_columns(labels: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Each label's column in the block (N, 1), clamped, and whether it is inside (N, 1)."""
    column = (labels - start)[:, None]
    return column.clamp(0, stop - start - 1), (column >= 0) & (column < stop - start)


def _weighted_sum(z: Tensor, v: Tensor) -> Tensor:
    """sum_k v_k z_ik (N,) of a block z (N, C), where z may be -inf if v (C,) is 0."""
    return (z * v).masked_fill_(v == 0, 0).sum(1)


def _statistics(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    save: bool,
    class_weight: Tensor | None,
    softcap: float,
) -> Statistics:
    """The statistics in torch, block by block; bf16 and fp16 are computed in float32 on a CPU."""
    n, size, dtype = len(x), block_classes(x), accumulation_dtype(x)
    exponentials, references = _saved_like(x, len(w), save)
    if not x.is_cuda:
        x = x.to(dtype)
    target = x.new_zeros(n, 1, dtype=dtype)
    total = x.new_zeros(n, dtype=dtype)
    maxima, sums = [], []
    for i, start, stop in blocks(len(w), size):
        z = _logits(x, w, bias, start, stop, softcap)
        column, in_block = _label_columns(labels, start, stop)
        target += z.gather(1, column).where(in_block, 0)
        total += z.sum(1) if class_weight is None else _weighted_sum(z, class_weight[start:stop])
        maximum = z.amax(1).clamp_(min=torch.finfo(dtype).min)  # -inf where all are masked
        z.sub_(maximum[:, None])
        e = torch.exp(z, out=exponentials[i, :, : stop - start] if save else z)
        maxima.append(maximum)
        sums.append(e.sum(1))
        if save:
            references[i] = maximum
    lse, lse_lo = log_sum(torch.stack(maxima), torch.stack(sums))
    return lse, target[:, 0], total, lse_lo, exponentials, references


def _gradient_block(s: SavedForBackward, grads: Tensor, i: int, start: int, stop: int) -> Tensor:
    """G (N, C) of block i, in the accumulation dtype. grads (3, N) as in `gradient_blocks`."""
    g_lse, g_label, g_sum = grads[:, :, None]
    slope = None
    if len(s.exponentials):
        scale = g_lse * (s.references[i] - s.lse).exp()[:, None]
        g = s.exponentials[i, :, : stop - start] * scale
    else:
        g = _logits(s.x, s.w, s.bias, start, stop, s.softcap)
        slope = _cap_slope(g, s.softcap) if s.softcap else None
        g.sub_(s.lse[:, None]).exp_().mul_(g_lse)
    g.add_(g_sum if s.class_weight is None else g_sum * s.class_weight[start:stop])
    if slope is not None:
        g.mul_(slope)
    column, in_block = _label_columns(s.labels, start, stop)
    return g.scatter_(1, column, g_label.where(in_block, g.gather(1, column)))


def _cap_slope(z: Tensor, softcap: float) -> Tensor:
    """The derivative of the soft cap, from its result z."""
    return 1 - (z / softcap).square_()


def _row_gradients(
    s: SavedForBackward, g_lse: Tensor, g_target: Tensor, g_sum: Tensor
) -> tuple[Tensor, Tensor]:
    """grads (3, N) as `gradient_blocks` passes them on: of lse, the label's logit, of sum; and a
    bound of |G|, ()."""
    of_sum, largest = g_sum, g_sum
    if s.class_weight is not None:
        of_sum = g_sum * s.class_weight[s.labels.clamp(0, len(s.w) - 1)]
        largest = g_sum * s.class_weight.abs().max()
    g_label = g_lse * torch.expm1((s.target - s.lse) - s.lse_lo) + ((g_lse + g_target) + of_sum)
    if s.softcap:
        g_label = g_label * _cap_slope(s.target, s.softcap)
    grads = torch.stack([g_lse * (-s.lse_lo).exp(), g_label, g_sum])
    return grads, (grads[0].abs() + grads[1].abs() + largest.abs()).max()


def gradient_blocks(
    s: SavedForBackward, g_lse: Tensor, g_target: Tensor, g_sum: Tensor, dx: Tensor
) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """(start, stop, G, unscale) of each block, whose gradient is unscale * G; dx (N, D) += G w."""
    grads, bound = _row_gradients(s, g_lse, g_target, g_sum)
    unscale = torch.ones_like(grads[0, 0])
    triton = use_triton(s.x)
    if triton and s.x.dtype == torch.float16:
        # |G| is brought to at most 2^15, of which the least float16 is 2^-39. Unscaled, gradients
        # of 1e-8, which are DIET's, would be lost.
        scale = power_of_two_scale(bound, exponent=15)
        grads, unscale = grads * scale, 1 / scale
    for i, start, stop in blocks(len(s.w), block_classes(s.x)):
        if triton:
            g = kernels.gradient_block(
                s.x,
                s.w,
                s.bias,
                s.labels,
                s.lse,
                grads,
                s.exponentials,
                s.references,
                start,
                stop,
                s.class_weight,
                s.softcap,
            )
        else:
            g = _gradient_block(s, grads, i, start, stop)
        dx += matmul_t(g, s.w[start:stop].T)
        yield start, stop, g, unscale
    dx *= unscale


@torch.library.custom_op("fastssl::class_statistics", mutates_args=())
def class_statistics(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    save: bool,
    class_weight: Tensor | None = None,
    softcap: float = 0.0,
) -> Statistics:
    """lse, target, sum, lse_lo, each (N,); with `save` also exponentials and references.

    class_weight (K,) is in the accumulation dtype and gets no gradient. A softcap, 0 for none, does
    not go with `save`: its derivative needs the logits.
    """
    assert not (save and softcap)
    if not len(x):
        return _empty_statistics(x, w, save)
    run = kernels.statistics if use_triton(x) else _statistics
    x, w, labels = x.contiguous(), w.contiguous(), labels.contiguous()
    with torch.autocast(x.device.type, enabled=False):
        return run(x, w, bias, labels, save, class_weight, softcap)


def _empty_statistics(x: Tensor, w: Tensor, save: bool) -> Statistics:
    """Uninitialised statistics, shaped and typed as the op's."""
    dtype = accumulation_dtype(x)
    lse, target, total, lse_lo = (x.new_empty(len(x), dtype=dtype) for _ in range(4))
    return lse, target, total, lse_lo, *_saved_like(x, len(w), save)


@class_statistics.register_fake
def _(x, w, bias, labels, save, class_weight=None, softcap=0.0) -> Statistics:
    return _empty_statistics(x, w, save)


@torch.library.custom_op("fastssl::class_statistics_backward", mutates_args=())
def class_statistics_backward(
    g_lse: Tensor,
    g_target: Tensor,
    g_sum: Tensor,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    lse: Tensor,
    target: Tensor,
    lse_lo: Tensor,
    exponentials: Tensor,
    references: Tensor,
    class_weight: Tensor | None = None,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx (N, D), dw (K, D), db (K,), or db (0,) without a bias."""
    if not len(x):
        db = w.new_empty(0) if bias is None else torch.zeros_like(bias)
        return torch.empty_like(x), torch.zeros_like(w), db
    x, w, labels = x.contiguous(), w.contiguous(), labels.contiguous()
    results = (lse, target, lse_lo, exponentials, references)
    s = SavedForBackward(x, w, bias, labels, *results, class_weight, softcap)
    dx = torch.zeros_like(x, dtype=accumulation_dtype(x))
    dw = torch.empty_like(w)
    db = w.new_empty(0) if bias is None else torch.empty_like(bias)
    with torch.autocast(x.device.type, enabled=False):
        for start, stop, g, unscale in gradient_blocks(s, g_lse, g_target, g_sum, dx):
            dw[start:stop] = matmul_t(g.T, x.T).mul_(unscale)
            if bias is not None:
                db[start:stop] = g.sum(0, dtype=accumulation_dtype(x)) * unscale
    return dx.to(x.dtype), dw, db


@class_statistics_backward.register_fake
def _(g_lse, g_target, g_sum, x, w, bias, *_):
    db = w.new_empty(0) if bias is None else torch.empty_like(bias)
    return torch.empty_like(x), torch.empty_like(w), db


def zeros_for_none(grads: tuple[Tensor | None, ...], like: Tensor) -> list[Tensor]:
    """The gradients of the statistics (N,), zero where the loss does not depend on one."""
    return [torch.zeros_like(like) if g is None else g for g in grads]


def _setup_context(ctx, inputs, output) -> None:
    x, w, bias, labels, _, class_weight, ctx.softcap = inputs
    lse, target, _, lse_lo, exponentials, references = output
    ctx.mark_non_differentiable(lse_lo, exponentials, references)
    ctx.set_materialize_grads(False)  # else backward would get zeros as large as the exponentials
    results = (lse, target, lse_lo, exponentials, references)
    ctx.save_for_backward(x, w, bias, labels, *results, class_weight)


def _backward(ctx, g_lse, g_target, g_sum, *_):
    bias = ctx.saved_tensors[2]
    grads = zeros_for_none((g_lse, g_target, g_sum), ctx.saved_tensors[4])
    dx, dw, db = class_statistics_backward(*grads, *ctx.saved_tensors, ctx.softcap)
    return dx, dw, None if bias is None else db, *[None] * 4


class_statistics.register_autograd(_backward, setup_context=_setup_context)
