"""Triton kernels of second_moment.py, in one process: Gram reductions, tiles of Xa^T Xb.

Shapes: V views, N batch, D embedding.
"""
# mypy: allow-untyped-defs
# (a Triton kernel's arguments have no Python types)

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastssl_kernels._dispatch import architecture
from fastssl_kernels._triton.class_softmax import dot_precision
from fastssl_kernels.second_moment import slabs

ENTRIES = 2048  # entries of a Gram matrix that one program reduces
TILES = {  # (bytes of an element, on tcgen05): rows, columns, depth of a tile, warps, stages
    (2, False): (128, 128, 64, 8, 3),
    (2, True): (128, 128, 64, 4, 3),  # 8 warps spill there
    (4, False): (64, 64, 32, 4, 3),
    (4, True): (64, 64, 32, 4, 3),
}


@triton.jit
def _gram_kernel(
    k_ptr, partial_ptr, V, size, PAIRS: tl.constexpr, WRITE: tl.constexpr, BLOCK: tl.constexpr
):
    """Of V Gram matrices k (V, size): a partial energy; for pairs, each k becomes sum - k."""
    entries = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = entries < size
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    if PAIRS:
        for v in range(V):
            total += tl.load(k_ptr + v * size + entries, mask=inside, other=0.0).to(tl.float32)
    energy = tl.zeros((BLOCK,), dtype=tl.float32)
    for v in range(V):
        k = tl.load(k_ptr + v * size + entries, mask=inside, other=0.0).to(tl.float32)
        if PAIRS:
            others = total - k
            energy += 0.5 * k * others
            if WRITE:
                tl.store(k_ptr + v * size + entries, others, mask=inside)
        else:
            energy += k * k
    tl.store(partial_ptr + tl.program_id(0), tl.sum(energy))


@triton.jit
def _tile_kernel(
    a_ptr,
    b_ptr,
    slab_ptr,
    partial_ptr,
    N,
    D,
    first,
    width,
    scale,
    WRITE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A tile of scale * A^T B[:, first : first + width] without its diagonal: its squares' sum.

    A and B are (N, D). The tile stays in registers, unless WRITE puts it in the slab (D, width).
    """
    i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    j = tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)
    c = tl.zeros((BLOCK_I, BLOCK_J), dtype=tl.float32)
    for start in range(0, N, BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N).to(tl.int64)[:, None]  # int64: N * D
        a = tl.load(a_ptr + rows * D + i[None, :], mask=(rows < N) & (i < D)[None, :], other=0.0)
        inside = (rows < N) & (j < width)[None, :]
        b = tl.load(b_ptr + rows * D + first + j[None, :], mask=inside, other=0.0)
        c = tl.dot(tl.trans(a), b, c, input_precision=PRECISION)
    c = tl.where(i[:, None] == first + j[None, :], 0.0, c * scale)
    if WRITE:
        inside = (i < D)[:, None] & (j < width)[None, :]
        tl.store(slab_ptr + i[:, None] * width + j[None, :], c, mask=inside)  # a slab is < 2^31
    slot = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(partial_ptr + slot, tl.sum(c * c))


def fused_energy_and_product(
    x: Tensor, *, pairs: bool, path: str, scale: float, product: bool
) -> tuple[Tensor, Tensor]:
    """As `energy_and_product` for one process, by Triton; the energy as fp32 partial sums."""
    return (_fused_gram if path == "gram" else _fused_direct)(x, pairs, scale, product)


def _fused_gram(x: Tensor, pairs: bool, scale: float, product: bool) -> tuple[Tensor, Tensor]:
    views, n, _ = x.shape
    out = torch.empty_like(x) if product else x.new_empty(0)
    partials = []
    for r in slabs(n, n, views * n, x):
        k = torch.baddbmm(x.new_empty(()), x[:, r], x.transpose(1, 2), beta=0, alpha=scale)
        size = k[0].numel()
        partial = x.new_empty(triton.cdiv(size, ENTRIES), dtype=torch.float32)
        _gram_kernel[(len(partial),)](
            k, partial, views, size, PAIRS=pairs, WRITE=product, BLOCK=ENTRIES
        )
        partials.append(partial)
        if product:
            torch.bmm(k, x, out=out[:, r])
    return _joined(partials), out


def _fused_direct(x: Tensor, pairs: bool, scale: float, product: bool) -> tuple[Tensor, Tensor]:
    views, n, width = x.shape
    out = torch.zeros_like(x) if product else x.new_empty(0)
    tcgen05 = 100 <= architecture(x) < 120
    block_i, block_j, block_n, warps, stages = TILES[x.element_size(), tcgen05]
    partials = []
    for j in slabs(width, -(-width // 2), width, x):
        columns = j.stop - j.start
        grid = (triton.cdiv(width, block_i), triton.cdiv(columns, block_j))
        slab = x.new_empty((width, columns) if product else 1)
        for a in range(views):
            for b in range(a + 1, views) if pairs else (a,):
                partial = x.new_empty(grid[0] * grid[1], dtype=torch.float32)
                _tile_kernel[grid](
                    x[a],
                    x[b],
                    slab,
                    partial,
                    n,
                    width,
                    j.start,
                    columns,
                    scale,
                    WRITE=product,
                    PRECISION=dot_precision(),
                    BLOCK_I=block_i,
                    BLOCK_J=block_j,
                    BLOCK_N=block_n,
                    num_warps=warps,
                    num_stages=stages,
                )
                partials.append(partial)
                if product:
                    out[b][:, j].addmm_(x[a], slab)
                    if pairs:
                        out[a].addmm_(x[b][:, j], slab.T)
    return _joined(partials), out


def _joined(partials: list[Tensor]) -> Tensor:
    return partials[0] if len(partials) == 1 else torch.cat(partials)
