"""Triton kernels of _class_softmax.py: statistics of logits tiles, blocks of their gradient.

A program of the statistics kernel holds BLOCK_N rows and walks over a span of classes with a
running maximum, so partial results are four numbers for each row and span. Rows vary fastest over
programs: all rows use a tile of weights while it is in the L2 cache. The class tile is the same in
the forward and in the recompute.

Shapes: N batch, D embedding, K classes, C classes in a block.
"""

# mypy: allow-untyped-defs
# (a Triton kernel's arguments have no Python types)

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastssl_kernels._dispatch import architecture
from fastssl_kernels._precision import log_sum

PROGRAMS = 1056  # eight rounds on an H200's 132 multiprocessors, one program on each at a time
LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1e38)  # below every logit; times log2(e) still a float32


def tile(x: Tensor, extra: bool) -> dict[str, int]:
    """Tile sides, warps and stages for logits of x's dtype; each compiles without spills.

    extra: a bias, class weights, a soft cap or saved exponentials, which need registers.
    """
    if x.dtype == torch.float32:
        side = 32 if extra else 64
        sides = {"BLOCK_N": side, "BLOCK_K": side, "BLOCK_D": 32}
        return {**sides, "num_warps": 4, "num_stages": 3}
    if extra:
        rows, classes = 64, 128
    else:
        rows, classes = {90: (128, 256), 100: (128, 64)}.get(architecture(x), (128, 128))
    sides = {"BLOCK_N": rows, "BLOCK_K": classes, "BLOCK_D": 64}
    return {**sides, "num_warps": 8, "num_stages": 3}


def dot_precision() -> str:
    """How tl.dot multiplies float32, as set for torch.matmul; other dtypes ignore it."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def block_classes(n: int) -> int:
    """Classes in a block of G: about 2^24 entries, 32 MiB in bf16, which an H200's L2 holds."""
    return max(256, min(8192, 2**24 // max(1, n) // 256 * 256))


@triton.jit
def logits_tile(
    x_ptr,
    w_ptr,
    rows,
    classes,
    D,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """x[rows] @ w[classes].T in float32; rows and classes must lie inside."""
    x_ptrs = x_ptr + rows.to(tl.int64)[:, None] * D
    w_ptrs = w_ptr + classes.to(tl.int64)[None, :] * D  # int64: K * D passes 2^31
    z = tl.zeros((rows.shape[0], classes.shape[0]), tl.float32)
    for d in range(0, D, BLOCK_D):
        cols = d + tl.arange(0, BLOCK_D)
        if EVEN_D:
            x = tl.load(x_ptrs + cols[None, :])
            w = tl.load(w_ptrs + cols[:, None])
        else:
            x = tl.load(x_ptrs + cols[None, :], mask=cols[None, :] < D, other=0.0)
            w = tl.load(w_ptrs + cols[:, None], mask=cols[:, None] < D, other=0.0)
        z = tl.dot(x, w, z, input_precision=PRECISION)
    return z


@triton.jit
def _soft_cap(z, cap):
    """cap * tanh(z / cap) to float32's precision, which exp alone loses near 0 (Cephes' tanhf)."""
    # beyond 10 it is 1 to the last bit; NaN stays NaN
    u = tl.minimum(z / cap, 10.0, propagate_nan=tl.PropagateNan.ALL)
    u = tl.maximum(u, -10.0, propagate_nan=tl.PropagateNan.ALL)
    square = u * u
    p = (-5.70498872745e-3 * square + 2.06390887954e-2) * square - 5.37397155531e-2
    small = ((p * square + 1.33314422036e-1) * square - 3.33332819422e-1) * square * u + u
    large = 1.0 - 2.0 / (tl.exp2(tl.abs(u) * (2.0 * LOG2E)) + 1.0)
    return cap * tl.where(tl.abs(u) < 0.625, small, tl.where(u < 0, -large, large))


@triton.jit
def _statistics_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    weight_ptr,  # (K,) float32, of classes in the sum of logits
    labels_ptr,
    partial_ptr,  # (4, spans, N): maximum, sum of exponentials, target, sum
    exp_ptr,  # (ceil(K / C), N, C)
    reference_ptr,  # (ceil(K / BLOCK_K), N)
    N,
    K,
    D,
    C,
    span,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_CAP: tl.constexpr,
    SAVE: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row_tiles = tl.cdiv(N, BLOCK_N)
    part = tl.program_id(0) // row_tiles
    rows = (tl.program_id(0) % row_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = rows < N
    safe_rows = tl.minimum(rows, N - 1)
    n = tl.full((), 0, tl.int64) + N  # int64: N * K passes 2^31
    label = tl.load(labels_ptr + safe_rows).to(tl.int32)  # int64 would take twice the registers
    top = tl.full((BLOCK_N,), LOWEST, tl.float32)  # not -inf: a tile may hold masked classes only
    exps = tl.zeros((BLOCK_N,), tl.float32)
    target = tl.zeros((BLOCK_N,), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(part * span, tl.minimum(part * span + span, K), BLOCK_K):
        classes = start + tl.arange(0, BLOCK_K)
        safe_classes = tl.minimum(classes, K - 1)
        z = logits_tile(x_ptr, w_ptr, safe_rows, safe_classes, D, BLOCK_D, EVEN_D, PRECISION)
        if HAS_BIAS:
            z += tl.load(bias_ptr + safe_classes).to(tl.float32)[None, :]
        if HAS_CAP:
            z = _soft_cap(z, softcap)
        inside = (classes < K)[None, :]
        if HAS_WEIGHT:
            v = tl.load(weight_ptr + safe_classes)[None, :]
            total += tl.sum(v * tl.where(inside & (v != 0.0), z, 0.0), 1)  # z may be -inf
        else:
            total += tl.sum(tl.where(inside, z, 0.0), 1)
        target += tl.sum(tl.where(inside & (classes[None, :] == label[:, None]), z, 0.0), 1)
        z = tl.where(inside, z, float("-inf"))
        maximum = tl.maximum(top, tl.max(z, 1))
        e = tl.exp2((z - maximum[:, None]) * LOG2E)
        exps = exps * tl.exp2((top - maximum) * LOG2E) + tl.sum(e, 1)
        top = maximum
        if SAVE:
            row_offsets = ((start // C) * n + rows)[:, None] * C + start % C
            offsets = row_offsets + tl.arange(0, BLOCK_K)[None, :]
            mask = row_mask[:, None] & inside
            tl.store(exp_ptr + offsets, e.to(exp_ptr.dtype.element_ty), mask=mask)
            tl.store(reference_ptr + (start // BLOCK_K) * n + rows, maximum, mask=row_mask)
    slots = tl.num_programs(0) // row_tiles * N
    out = partial_ptr + part * N + rows
    tl.store(out, top, mask=row_mask)
    tl.store(out + slots, exps, mask=row_mask)
    tl.store(out + 2 * slots, target, mask=row_mask)
    tl.store(out + 3 * slots, total, mask=row_mask)


def _needs_registers(
    save: bool, bias: Tensor | None, class_weight: Tensor | None, softcap: float
) -> bool:
    return save or bias is not None or class_weight is not None or softcap > 0


def statistics(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    save: bool,
    class_weight: Tensor | None,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """lse, target, sum, lse_lo (N,) float32; exponentials (ceil(K / C), N, C) and references."""
    n, classes, dim = len(x), len(w), x.shape[1]
    config = tile(x, _needs_registers(save, bias, class_weight, softcap))
    row_tiles = triton.cdiv(n, config["BLOCK_N"])
    class_tiles = triton.cdiv(classes, config["BLOCK_K"])
    span_tiles = triton.cdiv(class_tiles, max(1, PROGRAMS // row_tiles))
    spans = triton.cdiv(class_tiles, span_tiles)
    partial = x.new_empty(4, spans, n, dtype=torch.float32)
    exponentials, references = saved_like(x, classes, save)
    _statistics_kernel[(row_tiles * spans,)](
        x,
        w,
        w if bias is None else bias,
        w if class_weight is None else class_weight,
        labels,
        partial,
        exponentials,
        references,
        n,
        classes,
        dim,
        block_classes(n),
        span_tiles * config["BLOCK_K"],
        softcap,
        HAS_BIAS=bias is not None,
        HAS_WEIGHT=class_weight is not None,
        HAS_CAP=softcap > 0,
        SAVE=save,
        EVEN_D=dim % config["BLOCK_D"] == 0,
        PRECISION=dot_precision(),
        **config,
    )
    lse, lse_lo = log_sum(partial[0], partial[1])
    # sums in a fixed order: the same input gives the same bits
    return lse, partial[2].sum(0), partial[3].sum(0), lse_lo, exponentials, references


def saved_like(x: Tensor, classes: int, save: bool) -> tuple[Tensor, Tensor]:
    """Empty tensors for exponentials and their references; without `save` of no elements.

    Those of two-byte inputs are float16: in [0, 1] it has three bits more than bfloat16.
    """
    n, size = len(x), block_classes(len(x))
    dtype = torch.float32 if x.dtype == torch.float32 else torch.float16
    if not save:
        return x.new_empty(0, dtype=dtype), x.new_empty(0, dtype=torch.float32)
    exponentials = x.new_empty(triton.cdiv(classes, size), n, size, dtype=dtype)
    tiles = triton.cdiv(classes, tile(x, True)["BLOCK_K"])
    return exponentials, x.new_empty(tiles, n, dtype=torch.float32)


@triton.jit
def _gradient_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    weight_ptr,  # (K,) float32, of classes in the sum of logits
    labels_ptr,
    lse_ptr,
    grads_ptr,  # (3, N): of lse, the label's logit, of sum
    exp_ptr,  # (N, C), this block's
    reference_ptr,  # (tiles, N), from this block's first tile on
    g_ptr,  # (N, C)
    first,  # this block's first class
    stop,
    N,
    D,
    C,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_CAP: tl.constexpr,
    SAVED: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row_tiles = tl.cdiv(N, BLOCK_N)
    column_tile = tl.program_id(0) // row_tiles
    rows = (tl.program_id(0) % row_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = column_tile * BLOCK_K + tl.arange(0, BLOCK_K)
    classes = first + columns
    inside = (rows < N)[:, None] & (classes < stop)[None, :]
    safe_rows = tl.minimum(rows, N - 1)
    offsets = rows.to(tl.int64)[:, None] * C + columns[None, :]
    lse = tl.load(lse_ptr + safe_rows)
    g_lse = tl.load(grads_ptr + safe_rows)
    g_label = tl.load(grads_ptr + N + safe_rows)
    g_sum = tl.load(grads_ptr + 2 * N + safe_rows)
    safe_classes = tl.minimum(classes, stop - 1)
    if SAVED:
        e = tl.load(exp_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        reference = tl.load(reference_ptr + column_tile.to(tl.int64) * N + safe_rows)
        p = e * tl.exp2((reference - lse) * LOG2E)[:, None]
    else:
        z = logits_tile(x_ptr, w_ptr, safe_rows, safe_classes, D, BLOCK_D, EVEN_D, PRECISION)
        if HAS_BIAS:
            z += tl.load(bias_ptr + safe_classes).to(tl.float32)[None, :]
        if HAS_CAP:
            z = _soft_cap(z, softcap)
        p = tl.exp2((z - lse[:, None]) * LOG2E)
    is_label = classes[None, :] == tl.load(labels_ptr + safe_rows).to(tl.int32)[:, None]
    if HAS_WEIGHT:
        g = g_lse[:, None] * p + g_sum[:, None] * tl.load(weight_ptr + safe_classes)[None, :]
    else:
        g = g_lse[:, None] * p + g_sum[:, None]
    if HAS_CAP:
        tanh = z / softcap  # never with SAVED, which has no z
        g *= 1.0 - tanh * tanh
    g = tl.where(is_label, g_label[:, None], g)  # in float32
    tl.store(g_ptr + offsets, g.to(g_ptr.dtype.element_ty), mask=inside)


def gradient_block(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    lse: Tensor,
    grads: Tensor,
    exponentials: Tensor,
    references: Tensor,
    start: int,
    stop: int,
    class_weight: Tensor | None,
    softcap: float,
) -> Tensor:
    """G (N, stop - start) in x's dtype. grads (3, N): of lse, the label's logit, of sum."""
    n, dim, size = len(x), x.shape[1], block_classes(len(x))
    save = len(exponentials) > 0
    config = tile(x, _needs_registers(save, bias, class_weight, softcap))
    g = x.new_empty(n, size)
    programs = triton.cdiv(n, config["BLOCK_N"]) * triton.cdiv(stop - start, config["BLOCK_K"])
    _gradient_kernel[(programs,)](
        x,
        w,
        w if bias is None else bias,
        w if class_weight is None else class_weight,
        labels,
        lse,
        grads,
        exponentials[start // size] if save else exponentials,
        references[start // config["BLOCK_K"] :] if save else references,
        g,
        start,
        stop,
        n,
        dim,
        size,
        softcap,
        HAS_BIAS=bias is not None,
        HAS_WEIGHT=class_weight is not None,
        HAS_CAP=softcap > 0,
        SAVED=save,
        EVEN_D=dim % config["BLOCK_D"] == 0,
        PRECISION=dot_precision(),
        **config,
    )
    return g[:, : stop - start]
