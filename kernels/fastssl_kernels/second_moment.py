"""Sums over second-moment matrices that are never written.

    E = sum_{ij} (Xa^T Xb)_ij^2,    dE/dXa = 2 Xb (Xb^T Xa)

for all pairs a < b of V views, or for each view with itself (b = a; the gradient doubles), with or
without the diagonals i = j. Three paths to the same number:

- gram: ||Xa^T Xb||_F^2 = <Ka, Kb> with Ka = Xa Xa^T, (N, N). All pairs are one sum of Grams:
  sum_{a<b} <Ka, Kb> = 1/2 sum_a <Ka, S - Ka> with S = sum_a Ka, and dE/dXa = 2 (S - Ka) Xa.
  4 N^2 D V multiply-adds; rows of K at a time, so no N x N matrix is stored when N is large.
- direct: slabs of columns of Xa^T Xb, squared and used at once. 3 N D^2 per pair, 2 N D^2 per view.
- eager: the reference, which writes D x D matrices.

Identity from arXiv:2206.02574, section 3.

Shapes: V views, N batch, n rows of this rank, D embedding.
"""

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from fastssl_kernels._autograd import (
    eager_loss,
    register_scaled_gradient,
    wants_gradient,
)
from fastssl_kernels._columns import column_dots, cross_dots
from fastssl_kernels._precision import accumulation_dtype, without_autocast
from fastssl_kernels._validation import Path, check_views
from fastssl_kernels.distributed import all_gather_padded, all_reduce_sum, row_counts

SLAB = 2**20  # elements of a slab on a CPU (4 MiB of fp32)
SLAB_CUDA = 2**24  # elements of a slab on a GPU (32 MiB of bf16, less than its L2 cache)


def second_moment_energy_reference(
    views: Tensor | Sequence[Tensor], *, pairs: bool = True, diagonal: bool = True
) -> Tensor:
    """The formula above in eager PyTorch: any device, any dtype. (V, N, D) -> ()"""
    views = list(views)
    chosen = combinations(views, 2) if pairs else zip(views, views, strict=True)
    total = []
    for a, b in chosen:
        c = a.T @ b  # (D, D)
        total.append((c if diagonal else c - torch.diag(c.diagonal())).square().sum())
    return torch.stack(total).sum()


def choose_path(path: str, x: Tensor, total: int, pairs: bool) -> str:
    """`path`, or for "auto" the one of "gram" and "direct" that multiplies less.

    x is (V, n, D) and `total` the rows of all ranks.
    """
    if path != "auto":
        return path
    views, _, width = x.shape
    return "gram" if total < (0.75 * (views - 1) if pairs else 1.0) * width else "direct"


def energy_and_product(
    x: Tensor, rows: list[int], *, pairs: bool, path: str, scale: float, group: str, product: bool
) -> tuple[Tensor, Tensor]:
    """E of (scale * Xa^T Xb) over all ranks, (), and scale * sum_b Xb Xb^T Xa, (V, n, D) like x.

    x (V, n, D) holds this rank's rows, `rows` each rank's number of them. dE/dXa is 2 * scale times
    the product for pairs, 4 * scale for each view with itself. Path "gram" includes the diagonals
    i = j, in the energy and in the product; path "direct" leaves them out of both.
    """
    if path == "gram":
        return _gram(x, all_gather_padded(x, rows, group), pairs, scale, group, product)
    return _direct(x, pairs, scale, group, product)


def _gram(
    x: Tensor, gathered: Tensor, pairs: bool, scale: float, group: str, product: bool
) -> tuple[Tensor, Tensor]:
    """Through rows of the Gram matrices: this rank's rows against all ranks' (V, N, D)."""
    views, n, _ = x.shape
    out = torch.empty_like(x) if product else x.new_empty(0)
    energy = x.new_zeros((), dtype=accumulation_dtype(x))
    for r in slabs(n, n, views * gathered.shape[1], x):
        columns = gathered.transpose(1, 2)
        k = torch.baddbmm(x.new_empty(()), x[:, r], columns, beta=0, alpha=scale)  # (V, rows, N)
        others = k.sum(0) - k if pairs else k
        energy += (k.to(energy.dtype) * others).sum() * (0.5 if pairs else 1.0)
        if product:
            torch.bmm(others, gathered, out=out[:, r])
    return all_reduce_sum(energy, group), out


def _direct(
    x: Tensor, pairs: bool, scale: float, group: str, product: bool
) -> tuple[Tensor, Tensor]:
    """Through slabs of columns of Xa^T Xb, without their diagonals."""
    views, _, width = x.shape
    out = torch.zeros_like(x) if product else x.new_empty(0)
    energy = x.new_zeros((), dtype=accumulation_dtype(x))
    for j in slabs(width, -(-width // 2), width, x):
        for a in range(views):
            for b in range(a + 1, views) if pairs else (a,):
                right = x[b][:, j]
                c = all_reduce_sum(x[a].T @ right, group).mul_(scale)  # (D, columns)
                c[j].fill_diagonal_(0)
                energy += c.to(energy.dtype).square().sum()
                if product:
                    out[b][:, j].addmm_(x[a], c)
                    if pairs:
                        out[a].addmm_(right, c.T)
    return energy, out


def slabs(length: int, longest: int, depth: int, x: Tensor) -> Iterator[slice]:
    """Slices of range(length) of at most `longest`; times `depth` each fits a slab."""
    step = max(1, min(longest, (SLAB_CUDA if x.is_cuda else SLAB) // max(depth, 1)))
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


@torch.library.custom_op("fastssl::second_moment_energy", mutates_args=())
def _energy(
    z: Tensor, pairs: bool, diagonal: bool, path: str, group: str, gradient: bool
) -> tuple[Tensor, Tensor]:
    """(E, dE/dz), the gradient empty where not requested. dE/dz is kept in fp32 or fp64."""
    x = z.to(accumulation_dtype(z))
    rows = row_counts(z, group)
    resolved_path = choose_path(path, z, sum(rows), pairs)
    with without_autocast(z):
        energy, product = energy_and_product(
            x, rows, pairs=pairs, path=resolved_path, scale=1.0, group=group, product=gradient
        )
    includes_diagonal = resolved_path == "gram"  # of the energy and the product so far
    correction = int(diagonal) - int(includes_diagonal)
    if correction:
        if pairs:
            dots = all_reduce_sum(cross_dots(x), group)
            for a in range(len(x)):
                dots[a, a] = 0
        else:
            dots = torch.diag_embed(all_reduce_sum(column_dots(x, x), group).T).permute(1, 2, 0)
        energy = energy + correction * dots.square().sum() * (0.5 if pairs else 1.0)
        if gradient:
            for a in range(len(x)):
                for b in range(len(x)) if pairs else (a,):
                    product[a].addcmul_(x[b], dots[a, b], value=correction)
    if gradient:
        product.mul_((2.0 if pairs else 4.0) * len(rows))
    return energy, product


@_energy.register_fake
def _(
    z: Tensor, pairs: bool, diagonal: bool, path: str, group: str, gradient: bool
) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(z)
    return z.new_empty((), dtype=dtype), z.new_empty(z.shape if gradient else (0,), dtype=dtype)


def _formula(z: Tensor, pairs: bool, diagonal: bool, _: str) -> Tensor:
    return second_moment_energy_reference(z, pairs=pairs, diagonal=diagonal)


register_scaled_gradient(_energy, _formula)


def second_moment_energy(
    views: Tensor | Sequence[Tensor],
    *,
    pairs: bool = True,
    diagonal: bool = True,
    path: Path = "auto",
    group: Any = None,
) -> Tensor:
    """sum_{ij} (Xa^T Xb)_ij^2, over all pairs a < b of views or over each view with itself -> ().

    views: (V, N, D), or a sequence of V tensors (N, D); float64, float32, float16 or bfloat16.
    pairs: all pairs of V >= 2 views; False: each of V >= 1 views with itself.
    diagonal: whether the terms i = j count.
    path: "gram" | "direct", "auto" for the one that multiplies less, or "eager", the reference.
    group: ranks whose rows form one batch (distributed.py has the contract for value and gradient).

    Returns float32 (float64 for float64 input). ValueError on shapes, dtypes, devices, path, group.
    """
    min_views = 2 if pairs else 1
    z, ranks = check_views(
        views, "second_moment_energy", path=path, group=group, min_views=min_views, min_rows=0
    )
    if path == "eager":
        settings = {"pairs": pairs, "diagonal": diagonal}
        return eager_loss(second_moment_energy_reference, z, ranks, **settings)
    return _energy(z.contiguous(), pairs, diagonal, path, ranks, wants_gradient(z))[0]
